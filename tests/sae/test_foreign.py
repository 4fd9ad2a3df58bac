"""Other formats: there and back, encodings and reconstructions are the same; what can't be said is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.activations import BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from sae.foreign import FORMATS, About
from sae.model import Autoencoder
from sae.schemas.errors import AutoencoderError
from tests.foreign_models import EXPRESSED, KINDS, D, K, N, drawn, inputs, sparse, transcoder

# float32 sums of a few dozen products, in another order.
TOLERANCE = 1e-5
ABOUT = About("gpt2", "blocks.8.hook_resid_pre", "blocks.8.hook_mlp_out")


def there_and_back(format_: str, model: Autoencoder) -> Autoencoder:
    config, tensors = FORMATS[format_].write(model, ABOUT)
    before = copy.deepcopy(config), {name: copy.deepcopy(tensor) for name, tensor in tensors.items()}
    back = FORMATS[format_].read(config, tensors).autoencoder
    assert before[0] == config
    for name, tensor in before[1].items():
        assert torch.equal(tensor, tensors[name]) if isinstance(tensor, Tensor) else tensor == tensors[name]
    return back


def assert_same(one: Autoencoder, other: Autoencoder, x: Tensor) -> None:
    found, expected = other.encode(x), one.encode(x)
    torch.testing.assert_close(found[0], expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    recons = other.decode(*found), one.decode(*expected)
    torch.testing.assert_close(*recons, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("format_", "kind"), [(format_, kind) for format_ in FORMATS for kind in KINDS])
def test_encodings_are_the_same_there_and_back_or_it_is_refused(format_: str, kind: str) -> None:
    model = KINDS[kind]()
    if kind in EXPRESSED[format_]:
        back = there_and_back(format_, model)
        assert_same(model, back, inputs())
        assert (back.n_latents, back.d_model, back.d_out) == (model.n_latents, model.d_model, model.d_out)
        assert not any(parameter.is_meta for parameter in back.parameters())
        assert not any(buffer.is_meta for buffer in back.buffers())
        return
    with pytest.raises(AutoencoderError, match=rf"^format {format_} has no place for .+; .+$") as caught:
        FORMATS[format_].write(model, ABOUT)
    assert "\n" not in str(caught.value)


@given(n=st.integers(1, 40), d=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
def test_of_any_shape(n: int, d: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    normalize = data.draw(st.booleans())
    activations = {
        "saelens": [ReLU(), TopK(k), JumpReLU(), BatchTopK(k)],
        "sparsify": [TopK(k), *([GroupMax(k)] if n % k == 0 else [])],
        "openai-weights": [TopK(k)] if normalize else [ReLU()],
    }
    format_ = data.draw(st.sampled_from(sorted(FORMATS)))
    normalize = normalize and format_ != "sparsify"
    model = sparse(data.draw(st.sampled_from(activations[format_])), d=d, n=n, seed=seed, normalize=normalize)
    assert_same(model, there_and_back(format_, model), inputs(d, seed, rows=5))


def by_hand(tensors: dict[str, Any], x: Tensor) -> Tensor:
    """Latents as the reference computes them from its state dict."""
    if tensors.get("activation") == "TopK":  # which is how it knows that inputs are normalised
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.std(dim=-1, keepdim=True) + 1e-5)
    pre_act: Tensor = (x - tensors["pre_bias"]) @ tensors["encoder.weight"].T + tensors["latent_bias"]
    if tensors.get("activation") != "TopK":
        return pre_act.relu()
    top = pre_act.topk(tensors["activation_state_dict"]["k"])
    return torch.zeros_like(pre_act).scatter(-1, top.indices, top.values.relu())


@pytest.mark.parametrize("kind", EXPRESSED["openai-weights"])
def test_published_weights_mean_the_same_to_the_reference(kind: str) -> None:
    model = KINDS[kind]()
    _, tensors = FORMATS["openai-weights"].write(model, ABOUT)
    names = {"pre_bias", "encoder.weight", "latent_bias", "decoder.weight", "activation", "activation_state_dict"}
    assert names < tensors.keys()
    assert all(name.startswith(("stats_", "latents_")) for name in tensors.keys() - names)
    assert tensors["decoder.weight"].shape == (D, N)
    torch.testing.assert_close(by_hand(tensors, inputs()), model.encode(inputs())[0], rtol=1e-5, atol=1e-5)


def test_a_state_dict_from_before_activations_had_names_is_relu() -> None:
    model = KINDS["relu"]()
    _, state = FORMATS["openai-weights"].write(model, ABOUT)
    old = {key: value for key, value in state.items() if not key.startswith(("activation", "latents_"))}
    assert_same(model, FORMATS["openai-weights"].read({}, old).autoencoder, inputs())


def test_half_precision_is_read_as_float32() -> None:
    config, tensors = FORMATS["saelens"].write(KINDS["topk"](), ABOUT)
    back = FORMATS["saelens"].read(config, {name: tensor.bfloat16() for name, tensor in tensors.items()}).autoencoder
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}


def saelens(architecture: str, **config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of random weights, whose decoder rows are not of unit norm."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"W_enc": draw(D, N), "W_dec": draw(N, D), "b_enc": draw(N), "b_dec": draw(D)}
    return {"architecture": architecture, "d_in": D, "d_sae": N, **config}, tensors


def test_a_bias_that_is_not_taken_from_the_input_is_not() -> None:
    config, tensors = saelens("standard", apply_b_dec_to_input=False)
    x = inputs()
    expected = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    found = FORMATS["saelens"].read(config, tensors).autoencoder
    # b_dec is added to the latent bias and taken off again: both are of the order of 10.
    torch.testing.assert_close(found.encode(x)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.decode(expected), expected @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-5, atol=1e-5
    )


def test_decoder_norms_scale_what_is_selected_where_it_was_trained_so() -> None:
    config, tensors = saelens("topk", k=K, rescale_acts_by_decoder_norm=True)
    x, norms = inputs(), tensors["W_dec"].norm(dim=-1)
    pre_act = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    top = pre_act.topk(K)
    latents = torch.zeros_like(pre_act).scatter(-1, top.indices, top.values.relu())
    found = FORMATS["saelens"].read(config, tensors).autoencoder
    # Values are of the order of 100.
    torch.testing.assert_close(found.encode(x)[0], latents, rtol=1e-5, atol=1e-4)
    expected = (latents / norms) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(found.decode(latents), expected, rtol=1e-5, atol=1e-4)


def test_a_threshold_at_or_below_zero_is_none() -> None:
    config, tensors = saelens("jumprelu")
    x = inputs()
    pre_act = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    threshold = torch.linspace(-2, 4, N)
    expected = pre_act.relu() * (pre_act > threshold)
    found = FORMATS["saelens"].read(config, {**tensors, "threshold": threshold}).autoencoder
    torch.testing.assert_close(found.encode(x)[0], expected, rtol=1e-5, atol=1e-5)
    logarithms = {**tensors, "log_threshold": threshold.clamp(min=1e-3).log()}
    FORMATS["saelens"].read(config, logarithms)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_what_is_trained_over_batches_has_its_threshold(architecture: str) -> None:
    widths = {"matryoshka_widths": [8, 20, N]} if architecture.startswith("m") else {}
    config, tensors = saelens(architecture, k=6.4, **widths)
    tensors["topk_threshold"] = torch.tensor(3.5, dtype=torch.float64)
    found = FORMATS["saelens"].read(config, tensors).autoencoder
    assert found.activation == BatchTopK(6)
    assert found.nested.sizes == ((8, 20) if widths else ())
    latents = found.encode(inputs())[0]
    assert latents[latents > 0].min() > 3.5


def test_a_latent_at_the_threshold_of_a_batch_is_active_on_both_sides() -> None:
    model = drawn(Autoencoder(3, 2, BatchTopK(1)))
    with torch.no_grad():
        model.encoder.weight.zero_()
        model.pre_bias.zero_()
        model.latent_bias.copy_(torch.tensor([1.25, 1.2499999, 2.0]))
    x = torch.ones(1, 2)
    assert model.encode(x)[0].count_nonzero() == 2
    assert torch.equal(there_and_back("saelens", model).encode(x)[0], model.encode(x)[0])


def test_an_untrained_threshold_of_a_batch_lets_all_positive_latents_pass() -> None:
    model = KINDS["batchtopk"]()
    model.own["threshold"].fill_(-1.0)
    assert_same(model, there_and_back("saelens", model), inputs())


def test_old_files_of_saelens_name_their_activation() -> None:
    config, tensors = saelens("standard", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, hook_name="a.b")
    found = FORMATS["saelens"].read(config, tensors)
    assert found.autoencoder.activation == TopK(3)
    assert found.about.hook == "a.b"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "gated"}, "its architecture is 'gated', which no autoencoder of ours is; these can be imported"),
    ({"architecture": ["topk"]}, r"its architecture is \['topk'\]"),
    ({"activation_fn_str": "tanh-relu"}, "its architecture is 'topk with tanh-relu'"),
    ({"normalize_activations": "constant_norm_rescale"}, "its normalize_activations is 'constant_norm_rescale'"),
    ({"reshape_activations": "hook_z"}, "its reshape_activations is 'hook_z': no autoencoder of ours does that"),
    ({"metadata": {"hook_head_index": 3}}, "its hook_head_index is 3: no autoencoder of ours does that"),
    ({"k": 0}, "k is 0: expected a whole number of at least 1"),
    ({"k": N + 1}, f"k is {N + 1} and n_latents is {N}"),
    ({"k": "6"}, "k is '6': expected a whole number"),
    ({"k": True}, "k is True: expected a whole number"),
    ({"d_sae": 1 << 70}, "d_sae is 1180591620717411303424: expected a whole number"),
    ({"d_sae": 1 << 39}, "state dict has W_enc of shape"),
    ({"d_in": None}, "d_in is None: expected a whole number"),
    ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes': expected true or false"),
    ({"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm is 1: expected true or false"),
    ({"matryoshka_widths": [40, 20]}, "prefixes are"),
    ({"matryoshka_widths": 4}, "matryoshka_widths is 4: expected whole numbers"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_what_saelens_does_beyond_ours_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    config, tensors = saelens("topk", k=K)
    with pytest.raises(AutoencoderError, match=expected) as caught:
        FORMATS["saelens"].read({**config, **changes}, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"activation": "signed"}, "its activation is 'signed': expected topk or groupmax"),
        ({"signed": True}, "it is signed"),
        ({"skip_connection": True}, "it has a skip_connection but is no transcoder"),
        ({"transcode": "no"}, "transcode is 'no': expected true or false"),
        ({"num_latents": 0, "expansion_factor": 1 << 39}, "num_latents is"),
        ({"num_latents": 0, "expansion_factor": 0}, "expansion_factor is 0"),
        ({"k": -1}, "k is -1"),
        ({"activation": "groupmax", "k": 5}, "GroupMax needs groups of one size"),
    ],
)
def test_what_sparsify_does_beyond_ours_is_refused_in_one_line(changes: dict[str, Any], expected: str) -> None:
    config, tensors = FORMATS["sparsify"].write(KINDS["topk"](), ABOUT)
    with pytest.raises(AutoencoderError, match=expected) as caught:
        FORMATS["sparsify"].read({**config, **changes}, tensors)
    assert "\n" not in str(caught.value)


def renamed(tensors: dict[str, Any]) -> None:
    tensors["W"] = tensors.pop(next(name for name in tensors if isinstance(tensors[name], Tensor)))


def integers(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if isinstance(tensors[name], Tensor) and tensors[name].is_floating_point())
    tensors[name] = tensors[name].long()


def complex_(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if isinstance(tensors[name], Tensor) and tensors[name].is_floating_point())
    tensors[name] = tensors[name].to(torch.complex64)


def not_finite(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if isinstance(tensors[name], Tensor) and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = torch.nan


def cut(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if isinstance(tensors[name], Tensor) and tensors[name].ndim == 1)
    tensors[name] = tensors[name][:-1]


def one_more(tensors: dict[str, Any]) -> None:
    tensors["scaling_factor"] = torch.ones(N)


@pytest.mark.parametrize("damage", [renamed, integers, complex_, not_finite, cut, one_more])
@pytest.mark.parametrize("format_", FORMATS)
def test_damaged_tensors_are_told_in_one_line(format_: str, damage: Callable[[dict[str, Any]], None]) -> None:
    config, tensors = FORMATS[format_].write(KINDS["relu" if format_ == "saelens" else EXPRESSED[format_][0]](), ABOUT)
    damage(tensors)
    with pytest.raises(AutoencoderError) as caught:
        FORMATS[format_].read(config, tensors)
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_selects_nothing_is_refused() -> None:
    _, state = FORMATS["openai-weights"].write(KINDS["relu"](), ABOUT)
    with pytest.raises(AutoencoderError, match="its activation is Identity: latents that are never zero"):
        FORMATS["openai-weights"].read({}, {**state, "activation": "Identity"})


def test_transcoders_of_saelens_take_no_bias_off() -> None:
    config, tensors = FORMATS["saelens"].write(transcoder(ReLU()), ABOUT)
    assert config["metadata"]["hook_name_out"] == ABOUT.output_hook
    with pytest.raises(AutoencoderError, match="apply_b_dec_to_input is true: a transcoder's b_dec is of what comes"):
        FORMATS["saelens"].read({**config, "apply_b_dec_to_input": True}, tensors)
