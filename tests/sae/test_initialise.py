import pytest
import torch

from sae.initialise import geometric_median, initialise
from sae.losses import mse_scale
from sae.model import Autoencoder, ReLU, TopK
from sae.schemas.errors import AutoencoderError

D = 16


def skewed_sample(m: int = 400) -> torch.Tensor:
    sample = torch.randn(m, D, generator=torch.Generator().manual_seed(0)) + 3
    sample[: m // 10] += 200
    return sample


def test_the_median_is_where_the_unit_vectors_to_all_points_cancel() -> None:
    points = skewed_sample()
    toward = torch.nn.functional.normalize(points - geometric_median(points), dim=1)
    # Its gradient: zero at the median, about 0.1 at the mean of this sample (one point in ten lies far off).
    assert toward.mean(dim=0).norm() < 2e-3
    from_mean = torch.nn.functional.normalize(points - points.mean(dim=0), dim=1)
    assert from_mean.mean(dim=0).norm() > 0.05


def test_the_median_of_the_same_points_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, for each of many autoencoders that start from one sample."""
    points = skewed_sample()
    first = geometric_median(points)
    expected = first.clone()
    with monkeypatch.context() as patch:
        patch.setattr("sae.initialise.compute_geometric_median", None)
        first.zero_()  # as the bias is, which moves
        assert torch.equal(geometric_median(points.clone()), expected)
    points += 1  # where they were
    assert not torch.equal(geometric_median(points), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("activation", [ReLU(), TopK(4)])
def test_the_start_is_tied_unit_norm_and_reconstructs_unit_inputs_with_unit_norm(
    activation: ReLU | TopK, normalize: bool
) -> None:
    model = Autoencoder(64, D, activation, normalize=normalize)
    sample = skewed_sample()
    scale = initialise(model, sample, torch.Generator().manual_seed(1))
    x, _ = model.preprocess(sample)
    rows = model.decoder_rows
    # float32 norms of 16 numbers.
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(64), rtol=1e-5, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(rows, model.encoder.weight).min() > 1 - 1e-5
    assert rows.is_contiguous()
    torch.testing.assert_close(model.pre_bias.data, geometric_median(x))
    assert scale == pytest.approx(mse_scale(x).item())
    unit = torch.nn.functional.normalize(torch.randn(4000, D), dim=1)
    latents = model.activation(model.encode_pre_act(unit + model.pre_bias))
    # Two samples of directions, 256 and 4000, of norms that vary by some ten percent.
    assert (latents @ rows).norm(dim=1).mean().item() == pytest.approx(1, abs=0.03)


def test_the_generator_decides_everything() -> None:
    models = [Autoencoder(32, D, TopK(4)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, skewed_sample(), torch.Generator().manual_seed(seed))
    a, b, c = (model.tensors() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.weight"], c["encoder.weight"])


def test_a_tied_autoencoder_keeps_unit_rows() -> None:
    model = Autoencoder(32, D, ReLU(), tied=True)
    initialise(model, skewed_sample())
    torch.testing.assert_close(model.encoder.weight.norm(dim=1), torch.ones(32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.zeros(0, D), torch.ones(5, D), torch.full((5, D), float("nan"))])
def test_a_sample_that_says_nothing_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(AutoencoderError, match="NaN or infinity, or all its rows are equal"):
        initialise(Autoencoder(32, D), bad)
