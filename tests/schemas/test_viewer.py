"""The models take what the viewer can show, and nothing that would leave its page blank."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae.schemas.viewer import EFFECTS, AtomFile, Manifest, Sequence

Values = dict[str, Any]


def sequence(n: int = 4, idx: int = 1, act: float = 2.5) -> Values:
    acts = [0.0] * n
    acts[idx] = act
    return {
        "tokens": [" a"] * n,
        "acts": acts,
        "act": act,
        "idx": idx,
        "doc_id": 7,
        "density": 1 / n,
        "token_ints": [3] * n,
    }


def atom() -> Values:
    moments = {"mean_act": 0.1, "mean_act_squared": 0.2, "skew": 3.0, "kurtosis": 9.0}
    examples = {"top": [sequence(), sequence(act=1.5)], "random": [sequence()]}
    return {"density": 0.01, **moments, "hist": {"8": 1, "13": 1}, **examples}


def manifest() -> Values:
    texts = ("source", "autoencoder", "checkpoint", "model", "hook", "sign_convention")
    counts = ("n_tokens", "trained_tokens", "lake_version")
    return {
        **dict.fromkeys(texts, "x"),
        **dict.fromkeys(counts, 5),
        "complete": True,
        "masked_positions": [0],
        "corpora": ["texts"],
        "n_latents": 8,
        "k": 2,
        "bin_width": 0.2,
        "atoms": [0, 7],
        "decimals": 4,
        "versions": {},
    }


def effect(name: str, n: int) -> list[Any]:
    return [0.5] * n if name in ("ablate_loss_diff", "kl") else [["x"] if "tokens" in name else [0.5]] * n


@given(
    st.lists(st.tuples(st.text(), st.floats(0, 1e6), st.integers(0, 2**31)), min_size=1),
    st.data(),
    st.one_of(st.integers(0, 2**53), st.text()),
)
def test_every_valid_sequence_survives_json(
    rows: list[tuple[str, float, int]], data: st.DataObject, doc_id: int | str
) -> None:
    tokens, acts, token_ints = map(list, zip(*rows, strict=True))
    idx = data.draw(st.integers(0, len(rows) - 1))
    given_ = {"tokens": tokens, "acts": acts, "act": acts[idx], "idx": idx, "doc_id": doc_id, "density": 0.5}
    made = Sequence.model_validate({**given_, "token_ints": token_ints})
    text = made.model_dump_json(exclude_unset=True)
    assert Sequence.model_validate_json(text) == made
    assert json.loads(text) == {**given_, "token_ints": token_ints}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"acts": [0.0, 2.5, 0.0]}, "4 tokens, but 3 acts"),
        ({"token_ints": [3] * 5}, "5 token_ints"),
        ({"idx": 4}, "idx is 4, but there are 4 tokens"),
        ({"idx": 0}, r"act is 2.5, but acts\[0\] is 0.0"),
        ({"act": 2.4}, "act is 2.4"),
        ({"acts": [0.0, 2.5, float("nan"), 0.0]}, "finite"),
        ({"acts": [0.0, 2.5, -1.0, 0.0]}, "greater than or equal to 0"),
        ({"tokens": []}, "at least 1"),
        ({"density": 1.5}, "less than or equal to 1"),
        ({"doc_id": None}, "doc_id"),
        ({"tokens": [1, 2, 3, 4]}, "valid string"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_faulty_sequence_is_refused(change: Values, problem: str) -> None:
    Sequence.model_validate(sequence())
    with pytest.raises(ValidationError, match=problem):
        Sequence.model_validate({**sequence(), **change})


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_effects_speak_of_every_token_but_the_first(name: str) -> None:
    Sequence.model_validate({**sequence(), name: effect(name, 3)})
    for wrong in (effect(name, 4), effect(name, 2), None):
        with pytest.raises(ValidationError, match=f"{name} is .*expected length 3"):
            Sequence.model_validate({**sequence(), name: wrong})


@pytest.mark.parametrize("name", sorted(EFFECTS - {"ablate_loss_diff"}))
def test_effects_may_be_null_up_to_the_activation_only(name: str) -> None:
    entries = effect(name, 3)
    Sequence.model_validate({**sequence(), name: [None, None, entries[2]]})
    with pytest.raises(ValidationError, match="null after idx 1"):
        Sequence.model_validate({**sequence(), name: [*entries[:2], None]})


def test_the_loss_difference_is_never_null() -> None:
    with pytest.raises(ValidationError, match="valid number"):
        Sequence.model_validate({**sequence(), "ablate_loss_diff": [None, 0.5, 0.5]})


def test_the_eight_votes_loss_and_kl_are_the_effects() -> None:
    votes = {f"top_{vote}votes_{of}" for vote in ("up", "down") for of in ("logits", "probs")}
    tokens = {f"top_{vote}vote_tokens_{of}" for vote in ("up", "down") for of in ("logits", "probs")}
    assert votes | tokens | {"ablate_loss_diff", "kl"} == EFFECTS


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"density": 0.0}, "density is 0.0, but hist counts 2"),
        ({"hist": {}}, "density is 0.01, but hist counts 0"),
        ({"hist": {"8": 1}}, "top has 2 sequences, but hist counts 1"),
        ({"hist": {"8": 2, "0": 1}}, "pattern"),
        ({"hist": {"8": 2, "9": 0}}, "greater than or equal to 1"),
        ({"random": [sequence()] * 3}, "random has 3 sequences"),
        ({"top": [sequence(act=1.5), sequence()]}, "falling act"),
        ({"mean_act": float("inf")}, "finite"),
        ({"kurtosis": float("nan")}, "finite"),
        ({"max_act": 3.0}, "Extra inputs"),
    ],
)
def test_a_faulty_atom_is_refused(change: Values, problem: str) -> None:
    AtomFile.model_validate(atom())
    with pytest.raises(ValidationError, match=problem):
        AtomFile.model_validate({**atom(), **change})


@pytest.mark.parametrize("field", sorted(atom()))
def test_every_field_of_an_atom_must_be_there(field: str) -> None:
    values = atom()
    del values[field]
    with pytest.raises(ValidationError, match="Field required"):
        AtomFile.model_validate(values)


@pytest.mark.parametrize("atoms", [[0, 8], [3, 2]])
def test_a_manifest_tells_a_range_of_its_atoms(atoms: list[int]) -> None:
    Manifest.model_validate_json(json.dumps(manifest()))
    with pytest.raises(ValidationError, match="of 8"):
        Manifest.model_validate_json(json.dumps({**manifest(), "atoms": atoms}))
