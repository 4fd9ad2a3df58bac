"""Latents of two kinds never mix: of other weights, other settings or another model's tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae import device_statistics
from sae.jobs import checkpoints, encode, runs
from sae.jobs.lake import Lake
from sae.schemas.errors import ConfigError, LakeError
from tests.in_process import encode_all, encoder, run_of, train
from tests.models import tiny_gpt2
from tests.tiny_run import CORPUS, NAME, Lab

SHORT = 640
TABLES = ("latents", "moments", "histograms", "top", "samples")


@pytest.fixture(scope="module")
def briefly(tokenized: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run, trained for ten steps; not to be changed."""
    there = tokenized.copy(tmp_path_factory.mktemp("briefly"))
    train(there, training__tokens=SHORT)
    return there


def test_a_worker_refuses_weights_that_are_newer_than_its_command(briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    config = run_of(lab)
    lake = Lake(str(lab.lake))
    encoding = encode._encoding(lake, config)
    plan, _ = runs.outstanding(lake.snapshot(), "encode", NAME, CORPUS, encoding["run_tokens"])
    train(lab, training__tokens=2 * SHORT)
    assert checkpoints.identity(lake.snapshot(), NAME) != encoding["checkpoint"]
    with pytest.raises(LakeError, match="was trained on meanwhile; run sae encode again"):
        encode.Encoder(config, encoding, plan, 1)


def test_other_weights_than_those_that_encoded_are_told_by_their_keys(briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    encode_all(lab)
    lake, other = Lake(str(lab.lake)), {"encode__weights": "plain"}
    before = "^encode.weights, encode.checkpoint: got {} and last, but the latents of tiny in .* other weights; "
    drop = rf"encode anew after: sae drop {lab.lake} --latents {NAME}$"
    with pytest.raises(ConfigError, match=before.format("plain") + f"give average and last, or {drop}"):
        encode._encoding(lake, run_of(lab, **other))
    train(lab, training__tokens=2 * SHORT)
    for overrides, given in (({}, "average"), (other, "plain")):
        with pytest.raises(ConfigError, match=before.format(given) + f"no checkpoint .* any more, so {drop}"):
            encode._encoding(lake, run_of(lab, training__tokens=2 * SHORT, **overrides))


def test_the_best_checkpoint_can_be_chosen(briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    train(lab, training__tokens=2 * SHORT)
    config, lake = run_of(lab), Lake(str(lab.lake))
    best = config.model_copy(update={"encode": config.encode.model_copy(update={"checkpoint": "best"})})
    known = lake.snapshot().properties[f"autoencoder/{NAME}"]

    def encoded_with(*scores: float | None) -> tuple[str, str]:
        scored = [{**one, "fvu": fvu} for one, fvu in zip(known["checkpoints"], scores, strict=True)]
        with lake.transaction("test") as transaction:
            transaction.set(f"autoencoder/{NAME}", {**known, "checkpoints": scored})
        return encode._encoding(lake, config)["checkpoint"], encode._encoding(lake, best)["checkpoint"]

    last, first = encoded_with(0.1, 0.2)
    assert last != first
    assert encoded_with(0.2, 0.1) == (last, last)
    plain, loaded = checkpoints.load(lake, NAME), checkpoints.load(lake, NAME, which="best")
    assert torch.equal(plain.encoder.weight, loaded.encoder.weight)
    encoded_with(0.1, 0.2)
    loaded = checkpoints.load(lake, NAME, which="best")
    assert not torch.equal(plain.encoder.weight, loaded.encoder.weight)
    with pytest.raises(
        ConfigError, match=r"^encode\.checkpoint: got best, but nothing was held out .*; give last, or "
    ):
        encoded_with(None, None)


def test_runs_sorted_on_the_device_and_on_the_host_have_the_same_tables(
    briefly: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rows may stay on the device, or all; where there is no GPU, torch sorts them on the CPU."""

    def encoded(rows: int) -> dict[str, pa.Table]:
        lab = briefly.copy(tmp_path / str(rows))
        monkeypatch.setattr(device_statistics, "room", lambda device: rows)
        encoder(lab)({"run": [0]})
        lake = Lake(str(lab.lake))
        return {table: lake.read(lake.snapshot().select(table)) for table in TABLES}

    host, device = encoded(0), encoded(10**9)
    assert host["latents"].num_rows > 1000
    for table in TABLES:
        for name in host[table].column_names:
            found, expected = (side[table][name].to_numpy() for side in (device, host))
            # Sums of positive doubles in another order; all else is the same.
            np.testing.assert_allclose(found, expected, rtol=1e-12 if name.startswith("sum_") else 0, err_msg=name)


@pytest.mark.parametrize("other", [{"encode__bin_width": 0.5}, {"seed": 8}])
def test_two_commands_with_other_settings_do_not_mix(other: dict[str, Any], briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    one, two = encoder(lab), encoder(lab, **other)
    one({"run": [0]})
    before = lab.bytes()
    with pytest.raises(LakeError, match="let only one go on"):
        two({"run": [1]})
    assert lab.bytes() == before
    one({"run": [1]})
    assert [file.run for file in Lake(str(lab.lake)).snapshot().select("histograms")] == [0, 1]


def test_bins_too_narrow_to_be_numbered_are_refused(briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    before = lab.bytes()
    with pytest.raises(ConfigError, match=r"encode\.bin_width: got 1e-12, too narrow .*; widen it"):
        encoder(lab, encode__bin_width=1e-12)({"run": [0]})
    assert lab.bytes() == before


def test_a_corpus_of_another_models_tokens_is_refused(briefly: Lab, tmp_path: Path) -> None:
    lab = briefly.copy(tmp_path)
    given: dict[str, Any] = {"corpus__name": "foreign"}
    lab.done("tokenize", subject__model=str(tiny_gpt2(tmp_path / "other", d=16)), **given)
    before = lab.bytes()
    result = lab.sae("encode", **given)
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert f"corpus foreign is tokenized for {tmp_path / 'other'}" in result.stderr
    assert lab.bytes() == before
