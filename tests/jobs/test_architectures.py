"""Every kind of autoencoder through every step: trained, encoded, aggregated, evaluated, exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.jobs import checkpoints
from sae.jobs.contexts import load
from sae.jobs.lake import Lake, connect
from sae.jobs.measure import measure
from sae.subject import Subject
from tests.in_process import encode_all, harvest_all, run_of, train
from tests.tiny_run import CORPUS, NAME, Lab

INPUT, OUTPUT = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
TRANSCODER = {"subject__hook": INPUT, "subject__output_hook": OUTPUT}
KINDS: dict[str, dict[str, Any]] = {
    "batchtopk": {"autoencoder__activation": "batchtopk"},
    "groupmax": {"autoencoder__activation": "groupmax"},
    "jumprelu": {"autoencoder__activation": "jumprelu", "training__l0_coef": 0.01},
    "relu": {"autoencoder__activation": "relu", "training__l1_coef": 0.1},
    "matryoshka": {"autoencoder__prefixes": [8, 16]},
    "matryoshka of batchtopk": {"autoencoder__activation": "batchtopk", "autoencoder__prefixes": [8, 16]},
    "transcoder": TRANSCODER,
    "transcoder with a skip connection": {**TRANSCODER, "autoencoder__skip": True, "autoencoder__normalize": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_takes_it(kind: str, tokenized: Lab, tmp_path: Path) -> None:
    lab, given = tokenized.copy(tmp_path), KINDS[kind]
    train(lab, **given)
    encode_all(lab, **given)
    lab.done("aggregate", **given)
    figures = measure(run_of(lab, **given), {}).metrics
    assert figures["fvu"] < figures["fvu_untrained"]
    assert all(np.isfinite(value) for value in figures.values())
    lab.done("export", **given)
    exported = [path for path in (tmp_path / "viewer").rglob("*.json") if path.stem.isdigit()]
    assert len(exported) == 64
    assert any(json.loads(path.read_text())["top"] for path in exported)
    found, expected = stored(lab), computed(lab, **given)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= np.maximum(2**-10 * np.abs(expected), 1e-5)).all()


def stored(lab: Lab) -> Any:
    """[t, n]: the latents table as a matrix, without rows of tokens that have no latent."""
    found = connect(str(lab.lake)).sql("select context_id, pos, atom, act from latents").fetchnumpy()
    _, row = np.unique(found["context_id"].astype(np.int64) * 1000 + found["pos"], return_inverse=True)
    dense = np.zeros((row.max() + 1, 64))
    dense[row, found["atom"]] = found["act"]
    return dense


def computed(lab: Lab, **given: Any) -> Any:
    """The same from the weights and the activations of each hook, one token after the other."""
    config, lake = run_of(lab, **given), Lake(str(lab.lake))
    autoencoder = checkpoints.load(lake, NAME)
    hooks = [hook for hook in (config.subject.hook, config.subject.output_hook) if hook is not None]
    one = config.subject.model_dump(exclude={"hook", "output_hook"})
    subjects = [Subject.load(hook=hook, **one) for hook in hooks]
    corpus, parts = load(lake, CORPUS), []
    for row in range(len(corpus)):
        token_ids, lengths = corpus.padded(np.array([row]))
        x = torch.cat([subject.activations(token_ids) for subject in subjects], dim=2)
        parts.append(autoencoder.encode(x[subjects[0].keep_mask(lengths, x.shape[1])])[0].relu())
    dense = torch.cat(parts).numpy()
    return dense[dense.any(axis=1)]


def test_a_transcoder_is_trained_the_same_from_the_cache(tokenized: Lab, tmp_path: Path) -> None:
    """Vectors of both hooks lie in it; they are float16 there, so the last digits differ."""
    fvu = []
    for source in ("live", "cached"):
        lab = tokenized.copy(tmp_path / source)
        given = {**TRANSCODER, "training__source": source}
        if source == "cached":
            harvest_all(lab, **given)
        train(lab, **given)
        (row,) = (
            connect(str(lab.lake))
            .sql("select value from metrics where metric = 'fvu' and phase = 'validation' order by step desc limit 1")
            .fetchall()
        )
        fvu.append(row[0])
    assert fvu[0] == pytest.approx(fvu[1], rel=0.02)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"subject__output_hook": "blocks.0.hook_resid_pre"},
            "subject.output_hook: blocks.0.hook_resid_pre is not behind",
        ),
        ({"autoencoder__skip": True}, "autoencoder.skip of tiny is for transcoders"),
        ({**TRANSCODER, "autoencoder__tied": True}, "autoencoder.tied of tiny can't be true with subject.output_hook"),
    ],
)
def test_transcoders_that_can_not_be_are_refused(
    given: dict[str, Any], expected: str, tokenized: Lab, no_ray: None, tmp_path: Path
) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    result = lab.sae("train", **given)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert expected in result.stderr
    assert lab.bytes() == before
