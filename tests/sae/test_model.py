import copy
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.kernels.dispatch import interpreter
from sae.model import Autoencoder, Identity, ReLU, TopK
from sae.schemas.errors import AutoencoderError

N, D, K = 40, 12, 5


def random_autoencoder(activation: Any = None, **options: Any) -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(N, D, activation, **options)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.normal_()
    return autoencoder


CASES: dict[str, Callable[[], Autoencoder]] = {
    "relu": lambda: random_autoencoder(ReLU()),
    "identity": lambda: random_autoencoder(Identity()),
    "topk": lambda: random_autoencoder(TopK(K)),
    "topk-identity": lambda: random_autoencoder(TopK(K, Identity())),
    "topk-normalized": lambda: random_autoencoder(TopK(K), normalize=True),
    "relu-normalized": lambda: random_autoencoder(ReLU(), normalize=True),
    "tied": lambda: random_autoencoder(ReLU(), tied=True),
    "tied-topk-normalized": lambda: random_autoencoder(TopK(K), tied=True, normalize=True),
}
every_case = pytest.mark.parametrize("case", CASES)


def by_hand(model: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of rows x, straight from the published state dict."""
    state = model.state_dict()
    decoder = state["encoder.weight"].T if model.tied else state["decoder.weight"]
    mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    z = (x - mean) / (std + 1e-5) if model.normalize else x
    latents = (z - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    if isinstance(model.activation, TopK):
        latents = latents * (latents >= latents.sort(dim=1, descending=True).values[:, K - 1 : K])
    if model.activation != Identity() and model.activation != TopK(K, Identity()):
        latents = latents.clamp(min=0)
    recons = latents @ decoder.T + state["pre_bias"]
    return latents, recons * std + mean if model.normalize else recons


@every_case
@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 3, D)])
def test_forward_follows_the_definition_on_any_leading_shape(case: str, shape: tuple[int, ...]) -> None:
    model, x = CASES[case](), torch.randn(*shape)
    pre_act, latents, recons = model(x)
    assert pre_act.shape == latents.shape == (*shape[:-1], N)
    expected_latents, expected_recons = by_hand(model, x.reshape(-1, D))
    # float32 sums of 12 to 40 products.
    torch.testing.assert_close(latents.reshape(-1, N), expected_latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recons.reshape(-1, D), expected_recons, rtol=1e-4, atol=1e-4)


@every_case
def test_encode_then_decode_is_forward_and_statistics_never_change(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    before = copy.deepcopy(dict(model.named_buffers()))
    latents, info = model.encode(x)
    assert torch.equal(model.decode(latents, info), model(x)[2])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@every_case
def test_latent_slice_gives_those_columns(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    part = model.encode_pre_act(x, latent_slice=slice(3, 11))
    # Another GEMM shape may add in another order.
    torch.testing.assert_close(part, model.encode_pre_act(x)[:, 3:11], rtol=1e-5, atol=1e-5)


@every_case
def test_nonzeros_are_the_positive_latents_in_row_major_order(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    latents, _ = model.encode(x)
    row, latent, value = model.nonzeros(x)
    expected_row, expected_latent = (latents > 0).nonzero(as_tuple=True)
    assert torch.equal(row, expected_row)
    assert torch.equal(latent, expected_latent)
    assert torch.equal(value, latents[row, latent])
    assert not value.requires_grad


@pytest.mark.parametrize("case", ["topk", "topk-identity", "topk-normalized", "tied-topk-normalized"])
def test_sparse_encoding_and_decoding_equal_dense(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    values, indices, info = model.encode_topk(x)
    latents, _ = model.encode(x)
    assert torch.equal(torch.zeros(7, N).scatter(1, indices, values), latents)
    # float32 sums of k terms against n terms.
    torch.testing.assert_close(
        model.decode_sparse(values, indices, info), model.decode(latents, info), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["topk", "topk-identity", "topk-normalized", "tied-topk-normalized"])
def test_the_kernels_find_the_latents_of_the_plain_product(case: str, device: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    expected, (values, indices, _) = model.nonzeros(x), model.encode_topk(x)
    model, x = model.to(device), x.to(device)
    with interpreter() if device == "cpu" else nullcontext():
        rounded = model.rounded_encoder()
        assert rounded is not None
        found = [model.nonzeros(x), model.nonzeros(x, rounded)]
        fused_values, fused_indices, _ = model.encode_topk(x)
    for nonzeros in found:
        assert torch.equal(nonzeros.row.cpu(), expected.row)
        assert torch.equal(nonzeros.latent.cpu(), expected.latent)
        # Sums of 12 products of order one in float32.
        torch.testing.assert_close(nonzeros.value.cpu(), expected.value, rtol=1e-6, atol=5e-6)
    assert torch.equal(fused_indices.cpu(), indices)
    torch.testing.assert_close(fused_values.cpu(), values, rtol=1e-6, atol=5e-6)


def test_the_kernels_have_the_gradients_of_the_plain_product() -> None:
    model, x = CASES["topk-normalized"](), torch.randn(7, D)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.encode_topk(x)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with interpreter():
        found = gradients()
    assert found.keys() == expected.keys() >= {"pre_bias", "encoder.weight", "latent_bias"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-4)


@every_case
def test_a_rounded_encoder_is_made_only_where_it_is_of_use(case: str) -> None:
    model = CASES[case]()
    assert model.rounded_encoder() is None
    with interpreter():
        assert (model.rounded_encoder() is not None) == isinstance(model.activation, TopK)
        assert model.double().rounded_encoder() is None


def test_the_sparse_path_has_the_gradients_of_the_dense_one() -> None:
    model, x = CASES["topk"]().double(), torch.randn(7, D, dtype=torch.float64)
    target = torch.randn(7, D, dtype=torch.float64)
    (model(x)[2] - target).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    values, indices, info = model.encode_topk(x)
    (model.decode_sparse(values, indices, info) - target).square().sum().backward()
    for name, parameter in model.named_parameters():
        # float64, sums of some hundred terms of order ten.
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, N))
def test_ties_never_activate_more_than_k_latents(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 3, (4, N), generator=generator).float()
    active = TopK(k)(x) != 0
    assert (active.sum(dim=1) == k).all()


def test_normalization_makes_the_latents_blind_to_scale_and_offset() -> None:
    model, x = CASES["topk-normalized"](), torch.randn(7, D)
    latents, _ = model.encode(x)
    moved, info = model.encode(3 * x + 5)
    # eps in the std shifts by 1e-5 relative.
    torch.testing.assert_close(moved, latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.decode(moved, info), 3 * model(x)[2] + 5, rtol=1e-3, atol=1e-3)


@every_case
def test_saved_and_loaded_it_is_the_same_function(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    model.stats_last_nonzero += 7
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = Autoencoder.from_state_dict(torch.load(file, weights_only=True))
    assert loaded.config() == model.config()
    assert torch.equal(loaded.stats_last_nonzero, model.stats_last_nonzero)
    for mine, theirs in zip(loaded(x), model(x), strict=True):
        assert torch.equal(mine, theirs)


@every_case
def test_config_and_tensors_suffice_too(case: str) -> None:
    model, x = CASES[case](), torch.randn(7, D)
    loaded = Autoencoder.from_config(json.loads(json.dumps(model.config())))
    tensors = model.tensors()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    loaded.load_state_dict(tensors)
    assert torch.equal(loaded(x)[2], model(x)[2])


PUBLISHED_KEYS = [
    "pre_bias",
    "encoder.weight",
    "latent_bias",
    "decoder.weight",
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation",
    "activation_state_dict",
]


@pytest.mark.parametrize("case", ["relu", "topk-normalized"])
def test_the_state_dict_has_exactly_the_published_keys(case: str) -> None:
    state = CASES[case]().state_dict()
    assert sorted(state) == sorted(PUBLISHED_KEYS)
    assert state["decoder.weight"].shape == (D, N)


def published(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pre_bias": torch.randn(D, generator=generator),
        "encoder.weight": torch.randn(N, D, generator=generator),
        "latent_bias": torch.randn(N, generator=generator),
        "decoder.weight": torch.randn(D, N, generator=generator),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.zeros(N),
    } | changes


def test_a_published_topk_checkpoint_normalizes_and_the_caller_keeps_its_dict() -> None:
    state = published(activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"})
    del state["latents_mean_square"]  # older checkpoints lack some statistics
    before = dict(state)
    model = Autoencoder.from_state_dict(state)
    assert state == before
    assert model.config() == {
        "n_latents": N,
        "d_model": D,
        "activation": "TopK",
        "k": K,
        "postact": "ReLU",
        "normalize": True,
        "tied": False,
    }
    x = torch.randn(3, D)
    torch.testing.assert_close(model(x)[2], by_hand(model, x)[1], rtol=1e-4, atol=1e-4)


def test_a_tied_checkpoint_of_the_reference_loads() -> None:
    state = drop("decoder.weight") | {"decoder.linear.weight": published()["encoder.weight"]}
    model = Autoencoder.from_state_dict(state)
    assert model.tied
    assert "decoder.linear.weight" in state
    assert torch.equal(model.decoder_rows, state["encoder.weight"])


def test_a_published_checkpoint_without_activation_is_relu_and_raw() -> None:
    config = Autoencoder.from_state_dict(published()).config()
    assert (config["activation"], config["normalize"]) == ("ReLU", False)


def test_the_decoder_lies_latent_by_latent_in_memory_also_after_moves_and_loads() -> None:
    model = Autoencoder.from_state_dict(published())
    for one in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        assert one.decoder_rows.is_contiguous()
        assert one.decoder_rows.shape == (N, D)


def drop(name: str) -> dict[str, Any]:
    return {key: value for key, value in published().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no encoder.weight"),
        (drop("pre_bias"), "lacks pre_bias"),
        (drop("decoder.weight"), "lacks decoder.weight"),
        (published(extra=torch.zeros(1)), "unknown keys extra"),
        (published(latent_bias=torch.zeros(N - 1)), rf"latent_bias of shape \[{N - 1}\], expected \[{N}\]"),
        (published(pre_bias="x"), "pre_bias of shape str"),
        (published(activation="Gelu"), "activation is 'Gelu'"),
        (published(activation="TopK"), "k None"),
        (
            published(activation="TopK", activation_state_dict={"k": N + 1}),
            f"k is {N + 1} and n_latents is {N}",
        ),
    ],
)
def test_a_bad_state_dict_is_refused_in_one_line(state: dict[str, Any], message: str) -> None:
    with pytest.raises(AutoencoderError, match=message) as caught:
        Autoencoder.from_state_dict(state)
    assert "\n" not in str(caught.value)


def test_an_input_of_another_width_is_refused_with_both_widths() -> None:
    with pytest.raises(AutoencoderError, match="input has width 9, the autoencoder has d_model 12"):
        CASES["topk"]().nonzeros(torch.zeros(2, 9))


def test_more_winners_than_latents_are_refused() -> None:
    with pytest.raises(AutoencoderError, match="k is 9 and n_latents is 8"):
        Autoencoder(8, 4, TopK(9))


def test_misuse_is_named() -> None:
    with pytest.raises(AutoencoderError, match="needs TopK"):
        CASES["relu"]().encode_topk(torch.zeros(2, D))
    with pytest.raises(AutoencoderError, match="without info"):
        CASES["topk-normalized"]().decode(torch.zeros(2, N))
    with pytest.raises(AutoencoderError, match="lacks activation, tied"):
        Autoencoder.from_config({"n_latents": 2, "d_model": 2, "normalize": False})
