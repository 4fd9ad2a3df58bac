"""Changes of predictions against plain formulas in double precision, and votes against a sort."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels import dispatch
from sae.kernels.changes import Changes, changes

VOTES = 5
WIDTHS = [6, 31, 32, 33, 200, 1000, 4095, 4096, 4100]
DEVICES = ["twin", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


def body(device: str) -> Any:
    return dispatch.interpreter() if device == "interpreter" else nullcontext()


def found_on(device: str, *given: Tensor, votes: int = VOTES) -> Changes:
    clean, ablated, shared, following = (one.to("cuda" if device == "cuda" else "cpu") for one in given)
    with body(device):
        found = changes(clean, ablated, shared, following, votes)
    return Changes(*(column.cpu() for column in found))


def assert_right(found: Changes, clean: Tensor, ablated: Tensor, following: Tensor, votes: int) -> None:
    """Of pairs of logits [m, V] in double precision."""
    p, q = clean.softmax(-1), ablated.softmax(-1)
    at = torch.arange(len(following))
    torch.testing.assert_close(found.loss_diff.double(), (q.log() - p.log())[at, following], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.kl.double(), (p * (p.log() - q.log())).sum(-1), atol=1e-4, rtol=1e-4)
    assert (found.kl >= 0).all()
    for scores, (up, up_by, down, down_by) in ((clean - ablated, found[2:6]), (p - q, found[6:])):
        for tokens, values, largest in ((up, up_by, True), (down, down_by, False)):
            # In which order equal ones come is open.
            best = scores.topk(min(votes, scores.shape[1]), largest=largest).values
            torch.testing.assert_close(values.double(), best, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(values.double(), scores.gather(1, tokens), atol=1e-4, rtol=1e-4)
            assert all(len(set(row)) == len(row) for row in tokens.tolist())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(WIDTHS))
def test_changes_equal_plain_formulas_and_votes_a_sort(device: str, seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(7, vocabulary, generator=generator)
    shared, following = torch.tensor([0, 0, 1, 2]), torch.randint(vocabulary, (4,), generator=generator)
    found = found_on(device, logits[:3], logits[3:], shared, following)
    assert_right(found, logits[:3][shared].double(), logits[3:].double(), following, VOTES)


@pytest.mark.parametrize("device", DEVICES)
def test_votes_that_are_all_in_one_group_are_found(device: str) -> None:
    """And rows of one pair: a size of 1 is another program to the compiler."""
    clean, ablated = torch.zeros(1, 9000), torch.zeros(1, 9000)
    raised = 4096 + 7 + 128 * torch.arange(VOTES)
    clean[0, raised] = torch.arange(VOTES, dtype=torch.float32) + 1
    found = found_on(device, clean, ablated, torch.tensor([0]), torch.tensor([3]))
    assert found.up_tokens_by_logits[0].tolist() == raised.flip(0).tolist()
    assert_right(found, clean.double(), ablated.double(), torch.tensor([3]), VOTES)


@pytest.mark.parametrize("device", ["twin", "interpreter"])
def test_no_pairs_have_no_changes(device: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = found_on(device, torch.zeros(0, 50), torch.zeros(0, 50), none, none)
    assert [len(column) for column in found] == [0] * len(found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [49152, 50257])
def test_a_model_s_vocabulary_in_its_types(dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(700, vocabulary, generator=generator)).to(dtype)
    shared, following = torch.arange(500) * 200 // 500, torch.randint(vocabulary, (500,), generator=generator)
    found = found_on("cuda", logits[:200], logits[200:], shared, following, votes=10)
    assert_right(found, logits[:200][shared].double(), logits[200:].double(), following, 10)


def test_what_does_not_fit_is_told() -> None:
    logits, ids = torch.zeros(2, 9), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="changes expects clean"):
        changes(logits, logits[:, :5], ids, ids, VOTES)
