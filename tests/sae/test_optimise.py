import pytest
import torch

from sae.model import Autoencoder, TopK
from sae.optimise import EMA, DeadLatents, Optimiser, normalise_rows_
from sae.schemas.errors import AutoencoderError


def unit_autoencoder(tied: bool = False) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(10, 4, TopK(3), tied=tied)
    normalise_rows_(model.decoder_rows)
    return model


def backward(model: Autoencoder, seed: int = 0) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    (model(x)[2] - x).square().sum().backward()


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_rows_are_unit_vectors_after_every_step(tied: bool) -> None:
    model = unit_autoencoder(tied)
    optimiser = Optimiser(model)
    for seed in range(3):
        before = model.decoder_rows.detach().clone()
        backward(model, seed)
        optimiser.step(0.1)
        # float32 norms of four numbers.
        torch.testing.assert_close(model.decoder_rows.norm(dim=1), torch.ones(10), rtol=1e-6, atol=1e-6)
        assert not torch.equal(model.decoder_rows, before)


def test_a_zero_row_stays_zero_instead_of_becoming_nan() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    normalise_rows_(rows)
    assert rows[0].tolist() == [0, 0]
    torch.testing.assert_close(rows[1], torch.tensor([0.6, 0.8]))


def test_the_norm_is_the_global_one_after_projection_and_before_clipping() -> None:
    model = unit_autoencoder()
    backward(model)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 4
    rows, gradient = model.decoder_rows.detach(), model.decoder_rows_grad
    assert gradient is not None
    radial = (rows * gradient).sum(dim=1)
    expected = (sum(g.square().sum() for g in gradients) - radial.square().sum()) ** 0.5
    norm = Optimiser(model, clip=1e-3).step(0.0)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)


def test_clipping_bounds_the_gradient_that_adam_sees() -> None:
    model = unit_autoencoder()
    optimiser = Optimiser(model, clip=0.5)
    backward(model)
    assert optimiser.step(0.1) > 0.5
    moments = [t for name, t in optimiser.state_dict().items() if name.startswith("exp_avg.")]
    # After one step the first moment is 0.1 of the clipped gradient.
    seen = torch.stack([t.norm() for t in moments]).norm().item() / 0.1
    assert seen == pytest.approx(0.5, rel=1e-5)


def test_a_state_of_another_autoencoder_is_refused() -> None:
    state = Optimiser(Autoencoder(11, 4)).state_dict()
    with pytest.raises(AutoencoderError, match="shape"):
        Optimiser(unit_autoencoder()).load_state_dict(state)


def test_the_average_is_the_bias_corrected_one_with_unit_decoder_rows() -> None:
    model = unit_autoencoder()
    ema = EMA(model, decay=0.9)
    biases = []
    for seed in range(4):
        with torch.no_grad():
            model.pre_bias.normal_(generator=torch.Generator().manual_seed(seed))
        biases.append(model.pre_bias.detach().clone())
        ema.update(model)
    weights = torch.tensor([0.9 ** (3 - i) for i in range(4)])
    expected = (weights[:, None] * torch.stack(biases)).sum(dim=0) / weights.sum()
    with ema.swap(model):
        torch.testing.assert_close(model.pre_bias.data, expected)
        torch.testing.assert_close(model.decoder_rows.norm(dim=1), torch.ones(10))
        assert model.decoder_rows.is_contiguous()
    assert torch.equal(model.pre_bias, biases[-1])


def test_the_average_keeps_no_graph() -> None:
    model = unit_autoencoder()
    ema = EMA(model, decay=0.9)
    ema.update(model)
    assert not any(tensor.requires_grad for tensor in ema.state_dict().values())


def test_trained_weights_come_back_after_an_error_and_before_any_update_nothing_is_swapped() -> None:
    model = unit_autoencoder()
    ema = EMA(model, decay=0.5)
    before = {name: t.clone() for name, t in model.tensors().items()}
    with ema.swap(model):
        assert torch.equal(model.pre_bias, before["pre_bias"])
        assert torch.equal(model.encoder.weight, before["encoder.weight"])
    ema.update(model)
    with torch.no_grad():
        model.encoder.weight.add_(1)
    trained = model.encoder.weight.detach().clone()

    def fail() -> None:
        with ema.swap(model):
            assert not torch.equal(model.encoder.weight, trained)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(model.encoder.weight, trained)


def test_dead_latents_count_tokens_since_a_positive_value() -> None:
    dead = DeadLatents(torch.zeros(4, dtype=torch.int64))
    indices = torch.tensor([[0, 1], [0, 2]])
    dead.update(indices, torch.tensor([[1.0, 0.0], [2.0, -1.0]]), n_rows=2)
    assert dead.tokens_since.tolist() == [0, 2, 2, 2]
    dead.update(indices, torch.tensor([[0.0, 1e-9], [0.0, 0.0]]), n_rows=2)
    assert dead.tokens_since.tolist() == [2, 0, 4, 4]
    assert dead.mask(2).tolist() == [False, False, True, True]
