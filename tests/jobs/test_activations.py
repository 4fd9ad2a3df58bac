"""Activations from the subject on the spot: of the kept tokens, in order; on a GPU made beside what uses them."""

from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.jobs.activations import Live
from sae.jobs.contexts import Contexts
from sae.jobs.stream import TokenStream
from sae.subject import Subject
from tests.models import tiny_gpt2

WIDTH = 32


def some_contexts(n: int) -> Contexts:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, WIDTH + 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Contexts(np.arange(n), np.arange(n), draw.integers(1, 320, offsets[-1]), offsets, WIDTH)


def test_live_activations_are_those_of_each_context_alone(tmp_path: Path) -> None:
    subject = Subject.load(str(tiny_gpt2(tmp_path)), "resid_post_mlp.0", masked_positions=(0, 3))
    contexts = some_contexts(11)
    rows = np.array([7, 2, 10, 0, 5])
    expected = []
    for row in rows:
        ids = torch.from_numpy(contexts.tokens[contexts.offsets[row] : contexts.offsets[row + 1]])
        kept = [position for position in range(len(ids)) if position not in (0, 3)]
        expected.append(subject.activations(ids[None])[0, kept])
    live = Live(subject, contexts, 2)
    assert torch.equal(live.vectors(rows), torch.cat(expected))
    assert live.vectors(rows[:0]).shape == (0, 32)


@pytest.mark.gpu
def test_batches_made_beside_their_use_are_the_same_bits(tmp_path: Path) -> None:
    subject = Subject.load(str(tiny_gpt2(tmp_path)), "resid_post_mlp.0", dtype="bfloat16", device="cuda")
    contexts = some_contexts(500)
    lengths = contexts.lengths
    stream = TokenStream(Live(subject, contexts, 16), np.arange(500), lengths, 300, 1500, 0)
    expected = [batch.clone() for batch in islice(stream.batches(), 60)]
    for start in (0, 20):
        with closing(stream.batches(start * 300, torch.device("cuda"))) as batches:
            for number, batch in enumerate(islice(batches, 60 - start), start=start):
                assert torch.equal(batch, expected[number]), number
