"""The published autoencoders' paths and names, as the reference has them."""

import pytest

from sae import published
from sae.schemas.errors import AutoencoderError
from sae.subject import LOCATIONS, resolve_hook

ROOT = "az://openaipublic/sparse-autoencoder/gpt2-small"


def test_paths_are_those_that_were_published() -> None:
    assert published.v1("mlp_post_act", 0) == f"{ROOT}/mlp_post_act/autoencoders/0.pt"
    assert published.v4("resid_delta_mlp", 11) == f"{ROOT}/resid_delta_mlp_v4/autoencoders/11.pt"
    assert published.v5_32k("resid_post_attn", 6) == f"{ROOT}/resid_post_attn_v5_32k/autoencoders/6.pt"
    assert published.v5_128k("resid_delta_attn", 3) == f"{ROOT}/resid_delta_attn_v5_128k/autoencoders/3.pt"


@pytest.mark.parametrize(
    ("release", "location", "layer", "expected"),
    [
        ("v1", "resid_post_mlp", 0, "v1 was not published for 'resid_post_mlp'; choose one of mlp_post_act, resid_d"),
        ("v5_32k", "mlp_post_act", 0, "choose one of resid_delta_attn, resid_delta_mlp, resid_post_attn, resid_post_m"),
        ("v5_32k", "resid_post_mlp", 12, "v5_32k was not published for layer 12; choose 0 to 11"),
        ("v4", "mlp_post_act", -1, "v4 was not published for layer -1; choose 0 to 11"),
        ("v4", "mlp_post_act", True, "v4 was not published for layer True; choose 0 to 11"),
        ("v6", "mlp_post_act", 0, "release 'v6' was not published; choose one of v1, v4, v5_32k, v5_128k"),
    ],
)
def test_others_are_refused(release: str, location: str, layer: int, expected: str) -> None:
    with pytest.raises(AutoencoderError) as caught:
        published.published(release, location, layer)
    assert expected in str(caught.value)


def test_names_are_those_of_the_viewer() -> None:
    assert published.named("v5_32k/layer_8/resid_post_mlp") == published.published("v5_32k", "resid_post_mlp", 8)
    assert published.named("v1/layer_11/mlp_post_act") == published.published("v1", "mlp_post_act", 11)
    assert published.named("some/folder") is None
    assert published.named("./v1/layer_8") is None
    assert published.named("v50/layer_8") is None


@pytest.mark.parametrize("name", ["v1", "v5_32k/", "v5_32k/layer_8", "v5_32k/8/resid_post_mlp", "v1/layer_1/a/b"])
def test_half_a_name_says_how_a_whole_one_looks(name: str) -> None:
    with pytest.raises(AutoencoderError, match=r"names no published autoencoder; write v.+/layer_8/resid_.+ for one"):
        published.named(name)


@pytest.mark.parametrize("location", LOCATIONS)
def test_hooks_are_those_of_the_locations(location: str) -> None:
    release = "v1" if location == "mlp_post_act" else "v5_128k"
    assert resolve_hook(published.published(release, location, 8).hook) == f"blocks.8.{LOCATIONS[location]}"
