import numpy as np
import pytest
import torch

from sae.losses import autoencoder_loss, auxk_loss, fvu, mse_scale, normalized_l1, normalized_mse


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    recons, x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return recons, x


def test_losses_equal_their_definitions_in_numpy(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    recons, x = (tensor.numpy() for tensor in batch)
    mse = np.mean([np.mean((r - a) ** 2) / np.mean(a**2) for r, a in zip(recons, x, strict=True)])
    l1 = np.mean([np.sum(np.abs(r)) / np.sqrt(np.sum(a**2)) for r, a in zip(recons, x, strict=True)])
    variance = np.mean((x - x.mean(axis=0)) ** 2)
    # float64 arithmetic on 15 numbers.
    assert normalized_mse(*batch).item() == pytest.approx(mse, rel=1e-12)
    assert normalized_l1(*batch).item() == pytest.approx(l1, rel=1e-12)
    assert autoencoder_loss(*batch, batch[0], 0.5).item() == pytest.approx(mse + 0.5 * l1, rel=1e-12)
    assert fvu(*batch).item() == pytest.approx(np.mean((recons - x) ** 2) / variance, rel=1e-12)
    assert mse_scale(batch[1]).item() == pytest.approx(1 / variance, rel=1e-12)


def test_fvu_is_zero_when_perfect_and_one_for_the_mean(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = batch[1]
    assert fvu(x, x).item() == 0
    assert fvu(x.mean(dim=0).expand_as(x), x).item() == pytest.approx(1, rel=1e-12)


def test_a_row_with_no_residual_adds_nothing_to_the_auxk_loss_or_its_gradient() -> None:
    residual = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    recons = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    loss = auxk_loss(recons, torch.zeros(2, 2), residual, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert recons.grad is not None
    assert recons.grad[0].tolist() == [0, 0]
    assert recons.grad[1].isfinite().all()


def test_a_row_of_zeros_adds_nothing_to_the_losses_of_a_batch_or_their_gradient() -> None:
    """Subjects give such rows: tokens that have no embedding, at positions that see nothing else."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    recons = torch.tensor([[1.0, 1.0], [3.0, 0.0]], requires_grad=True)
    latents = torch.tensor([[2.0], [5.0]], requires_grad=True)
    loss = autoencoder_loss(recons, x, latents, 0.5)
    assert loss.item() == pytest.approx((16 / 25 + 0.5 * 1) / 2)
    loss.backward()
    assert recons.grad is not None
    assert latents.grad is not None
    assert recons.grad[0].tolist() == [0, 0]
    assert latents.grad[0].tolist() == [0]
    assert recons.grad[1].isfinite().all()


def test_what_is_not_a_number_stays_so_in_the_losses() -> None:
    x = torch.tensor([[float("nan"), 0.0], [3.0, 4.0]])
    assert normalized_mse(torch.zeros(2, 2), x).isnan()
    assert normalized_l1(torch.zeros(2, 1), x).isnan()


def test_auxk_trains_neither_the_main_reconstruction_nor_the_target() -> None:
    x = torch.tensor([[1.0, 2.0]])
    recons = torch.tensor([[0.5, 1.0]], requires_grad=True)
    pre_bias = torch.tensor([0.1, 0.2], requires_grad=True)
    aux = torch.tensor([[0.3, 0.2]], requires_grad=True)
    loss = auxk_loss(aux, recons, x, pre_bias)
    residual = np.array([0.6, 1.2])  # x - recons + pre_bias
    expected = np.mean((np.array([0.3, 0.2]) - residual) ** 2) / np.mean(residual**2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for target in (recons, pre_bias):
        (gradient,) = torch.autograd.grad(loss, target, allow_unused=True, retain_graph=True)
        assert gradient is None
