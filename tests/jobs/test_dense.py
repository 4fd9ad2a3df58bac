"""The tables against a dense computation that shares no code with the pipeline: transformers, torch, numpy, Python.

Everything is computed anew from the text, in double precision, over all tokens at once. Double and single precision
differ in the last bits: where that alone decides (a value halfway between two stored ones, two latents that compete
for the last place), the stored choice is taken, and it is checked that this is rare and that it is a near tie.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae.jobs.lake import connect
from tests.no_ray import without_ray
from tests.tiny_run import CONTEXT_LENGTH, CORPUS, NAME, Lab

Array = npt.NDArray[Any]
Example = tuple[int, int, float]

SEED, K, BIN_WIDTH, EXAMPLES = 7, 4, 0.2, 50
# Single precision through a block of width 32 and a product with 64 latents; activations are about 1.
CLOSE = 1e-5
# How often single precision may decide: 2e-6 of error against steps of 1e-3 between stored values.
RARE = 0.01
U64 = 2**64


@dataclass(frozen=True)
class Dense:
    """t kept tokens in order of (context_id, pos) and their dense activations [t, n] as the lake should store them."""

    context_id: Array
    pos: Array
    tokens: dict[int, list[int]]
    document: dict[int, int]
    acts: Array


def windows(lab: Lab) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Token ids and document number of every context, from the files."""
    tokenizer = AutoTokenizer.from_pretrained(lab.folder / "model")
    tokens: dict[int, list[int]] = {}
    document: dict[int, int] = {}
    for number, path in enumerate(sorted((lab.folder / "texts").iterdir())):
        ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), CONTEXT_LENGTH):
            document[len(tokens)] = number
            tokens[len(tokens)] = ids[start : start + CONTEXT_LENGTH]
    return tokens, document


def residual_stream(lab: Lab, tokens: dict[int, list[int]]) -> tuple[Array, Array, Array]:
    """context_id [t], pos [t] and the input of block 1 [t, d], position 0 left out."""
    model = AutoModelForCausalLM.from_pretrained(lab.folder / "model").double().eval()
    parts = []
    with torch.no_grad():
        for context, ids in tokens.items():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, 1:]
            parts.append((np.full(len(states), context), np.arange(1, len(ids)), states.numpy()))
    context_id, pos, x = (np.concatenate(part) for part in zip(*parts, strict=True))
    return context_id, pos, x


def weights(lab: Lab) -> dict[str, Array]:
    """The averaged weights of the last checkpoint that the log names."""
    entries = [json.loads(path.read_text()) for path in sorted((lab.lake / "_log").iterdir())]
    states = [entry["set"][f"autoencoder/{NAME}"] for entry in entries if f"autoencoder/{NAME}" in entry["set"]]
    return {
        name: value.astype(np.float64)
        for name, value in load_file(lab.lake / states[-1]["checkpoints"][-1]["model"][0]["path"]).items()
    }


def pre_activations(lab: Lab, x: Array) -> Array:
    w = weights(lab)
    x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    return np.asarray((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])


def to_ten_bits(values: Array) -> Array:
    """The nearest number with ten mantissa bits behind the leading one, ties to even."""
    mantissa, exponent = np.frexp(values)
    rounded: Array = np.ldexp(np.rint(mantissa * 2**11), exponent - 11)
    return rounded


def stored_dense(lab: Lab, context_id: Array, pos: Array, n_latents: int) -> Array:
    """The latents table as a dense matrix [t, n]."""
    at = {key: i for i, key in enumerate(zip(context_id.tolist(), pos.tolist(), strict=True))}
    dense = np.zeros((len(at), n_latents))
    for atom, context, position, act in (
        connect(str(lab.lake)).sql("select atom, context_id, pos, act from latents").fetchall()
    ):
        token = at[context, position]
        assert dense[token, atom] == 0, "the same latent twice"
        assert act > 0
        dense[token, atom] = act
    return dense


def settle(pre_act: Array, stored: Array) -> Array:
    """Double-precision activations as they are stored, near ties as the table has them."""
    kth = np.sort(pre_act, axis=1)[:, -K, None]
    active = (pre_act >= kth) & (pre_act > 0)
    differ = active != (stored > 0)
    near = (np.abs(pre_act - kth) < CLOSE) | (np.abs(pre_act) < CLOSE)
    assert near[differ].all()
    active ^= differ
    expected = np.where(active, to_ten_bits(pre_act), 0.0)
    rounded_otherwise = expected != stored
    off = np.abs(pre_act - stored)[rounded_otherwise]
    assert (off <= stored[rounded_otherwise] * 2.0**-11 + CLOSE).all()
    assert rounded_otherwise.sum() + differ.sum() < RARE * active.sum()
    return np.where(rounded_otherwise, stored, expected)


@pytest.fixture(scope="module")
def dense(finished: Lab) -> Dense:
    tokens, document = windows(finished)
    context_id, pos, x = residual_stream(finished, tokens)
    pre_act = pre_activations(finished, x)
    return Dense(context_id, pos, tokens, document, settle(pre_act, stored_dense(finished, context_id, pos, 64)))


@pytest.fixture(scope="module")
def compacted(finished: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    there = finished.copy(tmp_path_factory.mktemp("compacted"))
    with without_ray():
        there.done("compact")
    return there


@pytest.fixture(params=["runs", "ranges"])
def lab_either(request: pytest.FixtureRequest, finished: Lab, compacted: Lab) -> Lab:
    """The finished run, as encode left it and compacted."""
    return finished if request.param == "runs" else compacted


def active_rows(dense: Dense, atom: int) -> list[Example]:
    at = np.flatnonzero(dense.acts[:, atom])
    columns = dense.context_id[at], dense.pos[at], dense.acts[at, atom]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def top_contexts(rows: list[Example]) -> list[Example]:
    best: dict[int, Example] = {}
    for row in rows:
        if row[0] not in best or row[2] > best[row[0]][2]:
            best[row[0]] = row
    return sorted(best.values(), key=lambda row: (-row[2], row[0]))[:EXAMPLES]


def split_mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % U64
    return x ^ (x >> 31)


def random_sample(rows: list[Example], atom: int) -> list[Example]:
    def hashed(row: Example) -> int:
        state = split_mix(SEED)
        for key in (atom, row[0], row[1]):
            state = split_mix(state ^ key)
        return state

    return sorted(rows, key=hashed)[:EXAMPLES]


def test_the_run_is_worth_comparing(dense: Dense) -> None:
    """Enough of everything that a wrong cut, a wrong tie or a wrong merge would be seen."""
    n_active = (dense.acts > 0).sum(0)
    assert (n_active > EXAMPLES).sum() > 50
    assert len(dense.tokens) > 200
    assert {len(ids) for ids in dense.tokens.values()} >= {1, CONTEXT_LENGTH}


def test_latents_are_the_dense_activations(dense: Dense, lab_either: Lab) -> None:
    assert (stored_dense(lab_either, dense.context_id, dense.pos, 64) == dense.acts).all()


def test_atoms_have_the_density_and_moments_of_the_dense_activations(dense: Dense, lab_either: Lab) -> None:
    n_tokens = len(dense.acts)
    moments = [(dense.acts**power).sum(0) / n_tokens for power in (1, 2, 3, 4)]
    found = connect(str(lab_either.lake)).sql("select * from atoms order by atom").fetchnumpy()
    assert found["atom"].tolist() == list(range(64))
    assert (found["n_tokens"] == n_tokens).all()
    assert (found["n_active"] == (dense.acts > 0).sum(0)).all()
    assert (found["density"] == (dense.acts > 0).mean(0)).all()
    assert (found["max_act"] == dense.acts.max(0)).all()
    np.testing.assert_allclose(found["mean_act"], moments[0], rtol=1e-6)
    np.testing.assert_allclose(found["mean_act_squared"], moments[1], rtol=1e-6)
    np.testing.assert_allclose(found["skew"], moments[2] / moments[1] ** 1.5, rtol=1e-6)
    np.testing.assert_allclose(found["kurtosis"], moments[3] / moments[1] ** 2, rtol=1e-6)


def histogram(dense: Dense, atom: int) -> dict[int, int]:
    return Counter(math.ceil(act / BIN_WIDTH) for act in dense.acts[:, atom].tolist() if act > 0)


def test_every_histogram_count(dense: Dense, lab_either: Lab) -> None:
    expected = {(atom, bin_): n for atom in range(64) for bin_, n in histogram(dense, atom).items()}
    found = (
        connect(str(lab_either.lake))
        .sql("select atom, bin, sum(n)::bigint from histograms group by atom, bin")
        .fetchall()
    )
    assert {(atom, bin_): n for atom, bin_, n in found} == expected


@pytest.mark.parametrize("kind", ["top", "random"])
def test_examples(dense: Dense, lab_either: Lab, kind: str) -> None:
    query = "select atom, context_id, pos, act from examples where kind = $kind order by atom, rank"
    found: dict[int, list[Example]] = {}
    for atom, *row in connect(str(lab_either.lake)).execute(query, {"kind": kind}).fetchall():
        found.setdefault(atom, []).append((row[0], row[1], row[2]))
    for atom in range(64):
        rows = active_rows(dense, atom)
        assert found.get(atom, []) == (top_contexts(rows) if kind == "top" else random_sample(rows, atom))


@pytest.fixture(scope="module")
def exported(compacted: Lab) -> Path:
    compacted.done("export")
    (folder,) = {path.parent for path in (compacted.lake.parent / "viewer").rglob("*.json") if path.stem.isdigit()}
    return folder


def test_exported_json_has_the_dense_statistics(dense: Dense, exported: Path) -> None:
    for atom in range(64):
        found = json.loads((exported / f"{atom}.json").read_text())
        acts = dense.acts[:, atom]
        moments = [float((acts**power).mean()) for power in (1, 2, 3, 4)]
        assert {int(bin_): n for bin_, n in found["hist"].items()} == histogram(dense, atom)
        expected = {
            "density": float((acts > 0).mean()),
            "mean_act": moments[0],
            "mean_act_squared": moments[1],
            "skew": moments[2] / moments[1] ** 1.5,
            "kurtosis": moments[3] / moments[1] ** 2,
        }
        # Numbers are exported with at least four decimals or digits.
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=6e-5)


def test_exported_json_has_the_dense_examples(dense: Dense, exported: Path) -> None:
    row_of = {key: i for i, key in enumerate(zip(dense.context_id.tolist(), dense.pos.tolist(), strict=True))}
    for atom in range(64):
        found = json.loads((exported / f"{atom}.json").read_text())
        rows = active_rows(dense, atom)
        for kind, expected in (("top", top_contexts(rows)), ("random", random_sample(rows, atom))):
            assert len(found[kind]) == len(expected)
            for sequence, (context, pos, act) in zip(found[kind], expected, strict=True):
                ids = dense.tokens[context]
                over_context = [dense.acts[row_of[context, p], atom] if p else 0.0 for p in range(len(ids))]
                assert sequence["token_ints"] == ids
                assert sequence["idx"] == pos
                assert sequence["doc_id"] == dense.document[context]
                assert sequence["act"] == pytest.approx(act, abs=6e-5)
                assert sequence["acts"] == pytest.approx(over_context, abs=6e-5)
                assert sequence["density"] == pytest.approx(np.count_nonzero(over_context) / len(ids), abs=6e-5)


def test_ids_of_the_tables_are_those_of_the_files(dense: Dense, finished: Lab) -> None:
    connection = connect(str(finished.lake))
    contexts = connection.sql("select context_id, doc_id, token_ids from contexts order by context_id").fetchall()
    assert contexts == [(number, dense.document[number], ids) for number, ids in dense.tokens.items()]
    names = connection.sql("select external_id, source, corpus from documents order by doc_id").fetchall()
    assert names == [(path.name, CORPUS, CORPUS) for path in sorted((finished.folder / "texts").iterdir())]


def test_the_log_tells_every_file_as_it_is(finished: Lab) -> None:
    for path in (finished.lake / "_log").iterdir():
        for file in json.loads(path.read_text())["add"]:
            data = (finished.lake / file["path"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
