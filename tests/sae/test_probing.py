"""Probes find a planted label, in latents and in components, and lose nothing to a plain logistic regression."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sae.activations import TopK
from sae.evaluation.probing import (
    Dense,
    Pooling,
    Sparse,
    Split,
    chance,
    classes,
    newton,
    principal_components,
    probe_loss,
)
from sae.model import Autoencoder

DOCUMENTS = 80


def labels() -> list[str]:
    return ["yes" if at % 3 == 0 else "no" for at in range(DOCUMENTS)]


def features(planted: float) -> Tensor:
    """[80, 30]: the label is in column 7, the others are noise."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(DOCUMENTS, 30, generator=generator, dtype=torch.float64)
    values = values.where(values > 0.5, 0)
    inside = torch.tensor([one == "yes" for one in labels()])
    values[:, 7] += planted * inside
    return values


def sparse(values: Tensor) -> Sparse:
    row, column = values.nonzero(as_tuple=True)
    return Sparse(row, column, values[row, column], (values.shape[0], values.shape[1]))


@pytest.mark.parametrize("k", [1, 5])
def test_a_planted_label_is_found_and_noise_tells_nothing(k: int) -> None:
    split = Split.of(labels(), torch.Generator().manual_seed(0))
    nothing = chance(labels(), split)
    assert nothing == pytest.approx(-(27 / 80 * math.log(27 / 80) + 53 / 80 * math.log(53 / 80)), abs=0.01)
    assert probe_loss(sparse(features(3)), labels(), split, k) < 0.1
    assert probe_loss(sparse(features(0)), labels(), split, k) > nothing - 0.1


@pytest.mark.parametrize("k", [1, 3])
def test_sparse_and_dense_features_give_the_same(k: int) -> None:
    split = Split.of(labels(), torch.Generator().manual_seed(0))
    values = features(0.4)
    expected = probe_loss(Dense(values), labels(), split, k)
    assert probe_loss(sparse(values), labels(), split, k) == pytest.approx(expected, rel=1e-9)


def test_newton_finds_the_least_loss() -> None:
    x = torch.cat([features(0.4)[:, 5:9], torch.ones(DOCUMENTS, 1, dtype=torch.float64)], dim=1)
    y = torch.tensor([float(one == "yes") for one in labels()], dtype=torch.float64)
    w = newton(x, y).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") + w[:-1].square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.abs().max()) < 1e-6


def test_documents_that_are_wholly_separated_have_an_end() -> None:
    x = torch.tensor([[-1.0, 1.0]] * 20 + [[1.0, 1.0]] * 20, dtype=torch.float64)
    w = newton(x, (x[:, 0] > 0).double())
    assert bool(w.isfinite().all())
    assert 1 < float(w[0]) < 10


def test_classes_need_documents_inside_and_outside() -> None:
    assert classes(["a"] * 8 + ["b"] * 8) == ["a"]  # the probe for b is the same
    assert classes(["a"] * 8 + ["b"] * 7 + ["c"]) == ["a"]
    assert classes(["a"] * 20 + ["b"] * 7) == []
    assert classes(["a"] * 9 + ["b"] * 8 + ["c"] * 10) == ["a", "b", "c"]


def test_half_of_each_class_fits() -> None:
    fits = Split.of(labels(), torch.Generator().manual_seed(1)).fits
    for label, n in (("yes", 27), ("no", 53)):
        members = torch.tensor([one == label for one in labels()])
        assert int((fits & members).sum()) == -(-n // 2)


def test_documents_are_the_means_of_their_tokens() -> None:
    torch.manual_seed(0)
    model = Autoencoder(12, 6, TopK(3))
    x, document = torch.randn(10, 6), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    pooling = Pooling(model, 3)
    pooling.add(x[:5], document[:5])
    pooling.add(x[5:], document[5:])
    latents = model.encode(x)[0].detach().double()
    expected = torch.stack([latents[document == at].mean(dim=0) for at in range(3)])
    torch.testing.assert_close(pooling.latents().columns(torch.arange(12)), expected)
    acts = torch.stack([x[document == at].double().mean(dim=0) for at in range(3)])
    torch.testing.assert_close(pooling.activations(), acts)


def test_principal_components_find_a_label_that_no_dimension_has_alone() -> None:
    split = Split.of(labels(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    components = principal_components(features(3) @ rotation, split)
    assert probe_loss(components, labels(), split, 1) < 0.1
