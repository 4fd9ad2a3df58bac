"""The autoencoders of GPT-2 small that Gao et al. 2024 published, and where each lies.

`v5_32k/layer_8/resid_post_mlp` names one: its release, the block of the subject, and the place in that block.
"""

import re
from dataclasses import dataclass
from typing import Final

from sae.schemas.errors import AutoencoderError

SUBJECT: Final = "gpt2"
LAYERS: Final = 12
_ROOT: Final = "az://openaipublic/sparse-autoencoder/gpt2-small"
_RELU: Final = ("mlp_post_act", "resid_delta_mlp")
_TOPK: Final = ("resid_delta_attn", "resid_delta_mlp", "resid_post_attn", "resid_post_mlp")
# Of each release the places that it covers, and what the folder of a place ends with.
_RELEASES: Final = {
    "v1": (_RELU, ""),
    "v4": (_RELU, "_v4"),
    "v5_32k": (_TOPK, "_v5_32k"),
    "v5_128k": (_TOPK, "_v5_128k"),
}
_NAME: Final = re.compile(rf"({'|'.join(_RELEASES)})(/.*)?")
_PLACE: Final = re.compile(r"/layer_(\d{1,9})/([a-z_]+)")


@dataclass(frozen=True)
class Published:
    """One of them.

    path: of its file, in the published format
    hook: where its activations are, as `Subject.load` takes it
    """

    path: str
    hook: str


def v1(location: str, layer: int) -> str:
    """Path of 32,768 latents with ReLU and an L1 penalty, of inputs that are not normalised."""
    return published("v1", location, layer).path


def v4(location: str, layer: int) -> str:
    """Path of the same, trained again."""
    return published("v4", location, layer).path


def v5_32k(location: str, layer: int) -> str:
    """Path of 2^15 latents with TopK, k = 32, of normalised inputs."""
    return published("v5_32k", location, layer).path


def v5_128k(location: str, layer: int) -> str:
    """Path of 2^17 latents with TopK, k = 32, of normalised inputs."""
    return published("v5_128k", location, layer).path


def published(release: str, location: str, layer: int) -> Published:
    """The autoencoder of a release at a location of a block.

    Raises AutoencoderError where there is none.
    """
    if release not in _RELEASES:
        raise AutoencoderError(f"release {release!r} was not published; choose one of {', '.join(_RELEASES)}")
    locations, ending = _RELEASES[release]
    if location not in locations:
        raise AutoencoderError(f"{release} was not published for {location!r}; choose one of {', '.join(locations)}")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < LAYERS:
        raise AutoencoderError(f"{release} was not published for layer {layer!r}; choose 0 to {LAYERS - 1}")
    return Published(f"{_ROOT}/{location}{ending}/autoencoders/{layer}.pt", f"{location}.{layer}")


def named(name: str) -> Published | None:
    """The autoencoder of a name such as v5_32k/layer_8/resid_post_mlp; None where it begins with no release.

    Raises AutoencoderError where the rest names none.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    place = _PLACE.fullmatch(found[2] or "")
    if place is None:
        raise AutoencoderError(
            f"{name}: names no published autoencoder; write {found[1]}/layer_8/{_RELEASES[found[1]][0][-1]} for one, "
            f"or ./{name} for a file or folder of yours"
        )
    return published(found[1], place[2], int(place[1]))
