"""Every activation: what it selects, what it learns, and that what is saved of it comes back."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae import model as model_module
from sae.activations import Activation, BatchTopK, GroupMax, Identity, JumpReLU, Own, ReLU, TopK, made
from sae.collectives import Group
from sae.kth import kth_largest
from sae.matryoshka import Nested
from sae.mesh import Mesh
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from sae.training import StepConfig, TrainStep

ALL = [ReLU(), Identity(), TopK(3), TopK(3, Identity()), BatchTopK(3), GroupMax(4), JumpReLU(0.2, 0.3)]
numbers = st.sampled_from([0.0, -1.0, 0.5, 1.0, 1.0, 1e-40, 3.0]) | st.floats(-10, 10, width=32)


@given(st.lists(numbers, max_size=40), st.integers(1, 45), st.booleans())
def test_the_kth_largest_is_that_of_a_sorted_list(values: list[float], k: int, double: bool) -> None:
    given_ = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    positive = sorted((value for value in given_.tolist() if value > 0), reverse=True)
    expected = positive[k - 1] if len(positive) >= k else 0.0
    assert kth_largest(given_, k, Group()).item() == expected


@given(st.integers(1, 12), st.integers(1, 40), st.lists(numbers, min_size=1, max_size=30), st.randoms())
def test_the_kth_largest_of_many_is_that_of_a_sorted_list(
    groups: int, k: int, values: list[float], random: Any
) -> None:
    many = torch.tensor([random.choice(values) for _ in range(32 * groups)])
    positive = sorted((value for value in many.tolist() if value > 0), reverse=True)
    expected = positive[k - 1] if len(positive) >= k else 0.0
    assert kth_largest(many, k, Group()).item() == expected


@given(st.integers(1, 6), st.integers(1, 8), st.randoms(use_true_random=False))
def test_batch_topk_takes_the_largest_of_the_whole_batch(k: int, rows: int, random: Any) -> None:
    pre_act = torch.tensor([[random.gauss(0, 1) for _ in range(8)] for _ in range(rows)])
    threshold = torch.tensor(-1.0)
    latents = BatchTopK(k).train(pre_act, {"threshold": threshold}, Mesh())
    taken = latents > 0
    assert torch.equal(latents[taken], pre_act[taken])
    n_positive = int((pre_act > 0).sum())
    assert int(taken.sum()) >= min(k * rows, n_positive)
    if n_positive > k * rows:
        cut = latents[taken].min()
        assert int((pre_act > cut).sum()) < k * rows
        assert torch.equal(taken, pre_act >= cut)
        assert threshold == cut


def test_batch_topk_encodes_a_row_whatever_its_batch_is() -> None:
    torch.manual_seed(0)
    model = Autoencoder(24, 6, BatchTopK(3))
    x = torch.randn(50, 6)
    train = TrainStep(model, StepConfig(ema_decay=None))
    for _ in range(30):
        train.step(x, 1e-3)
    whole = model.encode(x)[0]
    torch.testing.assert_close(torch.cat([model.encode(row[None])[0] for row in x]), whole)
    assert (whole > 0).sum() / len(x) == pytest.approx(3, rel=0.2)


def test_group_max_takes_the_largest_of_each_group() -> None:
    pre_act = torch.tensor([[1.0, 2.0, -1.0, -3.0, 0.5, 0.5]])
    assert GroupMax(3)(pre_act).tolist() == [[0.0, 2.0, 0.0, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize(("k", "n"), [(0, 8), (9, 8), (3, 8)])
def test_groups_that_cannot_be_are_refused(k: int, n: int) -> None:
    with pytest.raises(AutoencoderError, match=rf"k is {k}.*n_latents"):
        Autoencoder(n, 4, GroupMax(k))


def test_jump_relu_moves_its_threshold_by_what_lies_near_it() -> None:
    activation = JumpReLU(bandwidth=0.5, initial=1.0)
    own = activation.tensors(1)
    pre_act = torch.tensor([[0.5], [0.9], [1.2], [2.0]], requires_grad=True)
    latents = activation(pre_act, own)
    assert latents.flatten().tolist() == pytest.approx([0, 0, 1.2, 2.0])
    weights = torch.tensor([[5.0], [3.0], [2.0], [7.0]])
    (latents * weights).sum().backward()
    assert pre_act.grad is not None
    assert pre_act.grad.flatten().tolist() == [0, 0, 2.0, 7.0]
    # -threshold / bandwidth * the weights of 0.9 and 1.2, times threshold for the logarithm.
    assert gradient(own) == pytest.approx(-(1.0 / 0.5) * (3.0 + 2.0))
    penalty = activation.sparsity_loss(pre_act.detach(), latents, pre_act, own)
    assert penalty.item() == 2 / 4
    penalty.backward()
    assert gradient(own) == pytest.approx(-(1.0 / 0.5) * 2 / 4)


def gradient(own: Own) -> float:
    """Of the threshold's logarithm, which is cleared."""
    found = own["log_threshold"].grad
    assert found is not None
    own["log_threshold"].grad = None
    return float(found)


@pytest.mark.parametrize("activation", ALL)
def test_nonzeros_are_those_of_the_dense_latents(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Autoencoder(16, 6, activation, nested=Nested((4, 8)))
    monkeypatch.setattr(model_module, "_DENSE", 5 * 16)  # five rows at once
    x = torch.randn(12, 6)
    row, latent, value = model.nonzeros(x)
    found = torch.zeros(12, 16).index_put((row, latent), value)
    torch.testing.assert_close(found, model.encode(x)[0].relu())
    assert torch.equal(row * 16 + latent, (row * 16 + latent).sort()[0])


@pytest.mark.parametrize("activation", ALL)
def test_what_is_saved_encodes_the_same(activation: Activation) -> None:
    torch.manual_seed(0)
    model = Autoencoder(16, 6, activation, nested=Nested((4, 8)))
    for tensor in model.own.values():
        tensor.data += torch.rand_like(tensor)
    x = torch.randn(12, 6)
    expected = model.encode(x)[0]
    by_config = Autoencoder.from_config(model.config())
    by_config.load_state_dict(model.tensors())
    assert by_config.config() == model.config()
    assert torch.equal(by_config.encode(x)[0], expected)
    published = Autoencoder.from_state_dict(model.state_dict())
    assert published.activation == activation
    assert torch.equal(published.encode(x)[0], expected)


@pytest.mark.parametrize(
    ("name", "state", "error"),
    [
        ("BatchTopK", {}, "BatchTopK has k None"),
        ("JumpReLU", {"bandwidth": "wide", "initial": 1}, "JumpReLU has bandwidth 'wide'"),
        ("GroupMax", {"k": True}, "GroupMax has k True"),
        ("Swish", {}, "activation is 'Swish'.*BatchTopK"),
    ],
)
def test_what_is_no_activation_is_refused(name: str, state: dict[str, Any], error: str) -> None:
    with pytest.raises(AutoencoderError, match=error):
        made(name, state)


@pytest.mark.parametrize("sizes", [(0,), (4, 4), (8, 4), (16,), (2.5,)])
def test_prefixes_that_cannot_be_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(AutoencoderError, match=r"prefixes are .* ascending"):
        Autoencoder(16, 6, nested=Nested(sizes))


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3)])
def test_the_loss_of_prefixes_is_that_of_each_as_if_alone(activation: Activation) -> None:
    torch.manual_seed(0)
    model = Autoencoder(16, 6, activation, nested=Nested((4, 8))).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    with torch.no_grad():
        latents = model.activate_to_train(model.encode_pre_act(x), Mesh())
        alone = [latents[:, :m] @ model.decoder_rows[:m] + model.pre_bias for m in (4, 8, 16)]
    expected = sum(float((recons - x).square().mean()) for recons in alone)
    assert float(TrainStep(model, StepConfig()).step(x, 1e-3)["loss"]) == pytest.approx(expected)
