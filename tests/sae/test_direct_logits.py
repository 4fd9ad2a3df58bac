"""Direct logits against the norm's weight and the unembedding as they are written down."""

import copy

import pytest
import torch
from torch import Tensor

from sae.direct_logits import direct_logits
from sae.subject import Subject
from tests.models import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"gpt2": tiny_gpt2, "rotary": tiny_llama}
    return {name: str(make(tmp_path_factory.mktemp("models") / name)) for name, make in made.items()}


def drawn(model: str, folders: dict[str, str], hook: str) -> Subject:
    """A subject whose final norm has a weight, and a bias where it takes one."""
    subject = Subject.load(folders[model], hook)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in subject.bridge.ln_final.original_component.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return subject


@pytest.mark.parametrize("model", ["gpt2", "rotary"])
@pytest.mark.parametrize("length", [1e-3, 1.0, 50.0])
def test_a_direction_goes_through_weight_and_unembedding(folders: dict[str, str], model: str, length: float) -> None:
    subject = drawn(model, folders, "blocks.1.hook_resid_pre")
    x = length * torch.randn(9, subject.d_model)
    centred = x - x.mean(dim=1, keepdim=True) if model == "gpt2" else x
    logits = direct_logits(subject)
    assert logits is not None
    expected = centred * subject.bridge.ln_final.weight @ subject.bridge.W_U
    torch.testing.assert_close(logits(x), expected, atol=1e-5 * length, rtol=1e-4)


@pytest.mark.parametrize("model", ["gpt2", "rotary"])
def test_what_the_last_stream_gains_is_what_the_logits_gain_in_proportion(folders: dict[str, str], model: str) -> None:
    subject = drawn(model, folders, "resid_post_mlp.1")
    stream, direction = torch.randn(2, 1, subject.d_model)
    norm, unembed = (part.original_component for part in (subject.bridge.ln_final, subject.bridge.unembed))

    def gain(direction: Tensor) -> Tensor:
        """Of the logits, for a small step in a direction."""
        step = 1e-2  # norms compute in float32 whatever they are given
        ahead, behind = (unembed(norm((stream + sign * step * direction).double())) for sign in (1, -1))
        change: Tensor = (ahead - behind) / (2 * step)
        return change.float()

    norm, unembed = copy.deepcopy(norm).double(), copy.deepcopy(unembed).double()
    with torch.no_grad():
        gained = gain(direction)
        spread = stream - stream.mean() if model == "gpt2" else stream
        scale = spread.square().mean().sqrt()
        # The scale's own change takes from the stream's direction only.
        taken = gain(spread)
        along = (spread * direction).sum() / spread.square().sum()
        logits = direct_logits(subject)
        assert logits is not None
        torch.testing.assert_close(
            logits(direction - along * spread) / scale, gained - along * taken, atol=1e-3, rtol=1e-3
        )


def test_a_wider_hook_goes_through_the_map_that_writes_it_to_the_stream(folders: dict[str, str]) -> None:
    wide, narrow = (drawn("gpt2", folders, hook) for hook in ("mlp_post_act.0", "resid_post_mlp.0"))
    x = torch.randn(3, wide.d_model)
    through, direct = direct_logits(wide), direct_logits(narrow)
    assert through is not None
    assert direct is not None
    written = x @ wide.bridge.blocks[0].mlp.out.original_component.weight
    torch.testing.assert_close(through(x), direct(written), atol=1e-5, rtol=1e-4)


def test_where_no_direct_path_leads_to_the_logits_there_are_none(folders: dict[str, str]) -> None:
    assert direct_logits(Subject.load(folders["rotary"], "blocks.0.mlp.hook_pre")) is None
