"""Effects of ablation against a slow, independent computation: a full forward with a hook that zeroes the latent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.activations import TopK
from sae.effects import Ablation, Effects, Examples
from sae.kernels.changes import Changes
from sae.model import Autoencoder
from sae.onward import Onward
from sae.schemas.errors import SubjectError
from sae.subject import Subject
from sae.transcoder import Transcoder
from tests.models import tiny_gpt2, tiny_llama

WIDTH, VOTES = 20, 5
HOOKS = {
    "the stream before a block": "blocks.1.hook_resid_pre",
    "the stream behind the last block": "resid_post_mlp.1",
    "inside a block": "resid_delta_attn.0",
    "a wider one": "mlp_post_act.0",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {"gpt2": tiny_gpt2, "rotary": tiny_llama}
    return {name: str(make(tmp_path_factory.mktemp("models") / name)) for name, make in made.items()}


def random_autoencoder(d_model: int, normalize: bool) -> Autoencoder:
    torch.manual_seed(1)
    autoencoder = Autoencoder(48, d_model, TopK(6), normalize=normalize)
    with torch.no_grad():
        autoencoder.latent_bias.uniform_(0, 0.1)
        rows = torch.nn.functional.normalize(torch.randn(48, d_model), dim=1)
        autoencoder.encoder.weight.copy_(rows)
        assert autoencoder.decoder is not None
        # Larger than unit norm, so that taking an atom out is felt in such a small model.
        autoencoder.decoder.weight.copy_(rows.T * 2)
    return autoencoder.requires_grad_(False)


def random_transcoder(d_model: int, d_out: int, normalize: bool) -> Transcoder:
    torch.manual_seed(1)
    transcoder = Transcoder(48, d_model, d_out, TopK(6), skip=True, normalize=normalize)
    with torch.no_grad():
        transcoder.latent_bias.uniform_(0, 0.1)
        transcoder.encoder.weight.copy_(torch.nn.functional.normalize(torch.randn(48, d_model), dim=1))
        assert transcoder.decoder is not None
        assert transcoder.skip is not None
        transcoder.decoder.weight.copy_(torch.randn(d_out, 48))
        transcoder.skip.weight.normal_()
    return transcoder.requires_grad_(False)


class Case:
    """Contexts of some lengths with examples at active latents, and one of an atom that is not active there."""

    def __init__(self, subject: Subject, normalize: bool = True) -> None:
        self.subject = subject
        self.autoencoder = (
            random_autoencoder(subject.d_model, normalize)
            if subject.output_hook is None
            else random_transcoder(subject.d_model, subject.width - subject.d_model, normalize)
        )
        generator = torch.Generator().manual_seed(2)
        self.token_ids = torch.randint(subject.vocab_size, (5, WIDTH), generator=generator)
        self.lengths = torch.tensor([WIDTH, 2, 11, WIDTH, 7])
        acts = subject.activations(self.token_ids)
        latents = self.autoencoder.encode(acts)[0]
        drawn = torch.rand(latents.shape, generator=generator) < 0.02
        drawn[torch.arange(5), 0, latents[:, 0].argmax(dim=1)] = True
        inside = torch.arange(WIDTH) < self.lengths[:, None]
        context, pos, atom = ((latents > 0) & drawn & inside[..., None]).nonzero(as_tuple=True)
        idle = int((latents[3, 4] == 0).nonzero()[0])
        found = zip((context, pos, atom), (3, 4, idle), strict=True)
        columns = [torch.cat([column, torch.tensor([one])]) for column, one in found]
        order = columns[0].argsort(stable=True)
        self.examples = Examples(*(column[order] for column in columns))
        assert set(self.examples.context.tolist()) == set(range(5))

    def effects(self, batch: int = 4) -> list[Effects]:
        ablation = Ablation(Onward(self.subject), self.autoencoder, VOTES, batch)
        return list(ablation.effects(self.token_ids, self.lengths, self.examples))

    def slow(self, number: int) -> dict[str, Tensor]:
        """Of one example, by two whole forwards of the bridge, with a hook of its own."""
        context, pos, atom = (int(column[number]) for column in self.examples)
        ids = self.token_ids[context, : self.lengths[context]][None]

        seen: list[Tensor] = []

        def see(acts: Tensor, hook: Any) -> None:
            seen.append(acts[0, pos].flatten())

        def zero_latent(acts: Tensor, hook: Any) -> Tensor:
            latents, info = self.autoencoder.encode(seen[-1])
            error = acts[0, pos].flatten() - self.autoencoder.decode(latents, info)
            without = latents.clone()
            without[atom] = 0
            changed = acts.clone()
            changed[0, pos] = (self.autoencoder.decode(without, info) + error).view_as(acts[0, pos])
            return changed

        hooks = [(self.subject.hook, see), (self.subject.output_hook or self.subject.hook, zero_latent)]
        with torch.no_grad():
            clean = self.subject.bridge(ids)[0]
            ablated = self.subject.bridge.run_with_hooks(ids, fwd_hooks=hooks)[0]
        p, q = clean.log_softmax(-1), ablated.log_softmax(-1)
        following = ids[0, 1:]
        at = torch.arange(len(following))
        kl = (p.exp() * (p - q)).sum(-1)
        return {
            "loss_diff": (q - p)[at, following],
            "kl": kl[:-1],
            "logits": (clean - ablated)[:-1],
            "probs": (p.exp() - q.exp())[:-1],
        }


@pytest.fixture(scope="module")
def case(folders: dict[str, str]) -> Case:
    return Case(Subject.load(folders["gpt2"], "blocks.1.hook_resid_pre"))


def each_example(batches: list[Effects]) -> list[Changes]:
    return [
        Changes(*columns)
        for batch in batches
        for columns in zip(*(column.split(batch.n_later.tolist()) for column in batch.changes), strict=True)
    ]


def assert_votes(tokens: Tensor, values: Tensor, scores: Tensor, largest: bool) -> None:
    """The values are those of the tokens, and the most extreme ones: in which order equal ones come is open."""
    # Sums of the two computations are taken in other orders.
    assert torch.allclose(values, scores.gather(1, tokens), atol=1e-4)
    assert torch.allclose(values, scores.topk(VOTES, largest=largest).values, atol=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("model", ["gpt2", "rotary"])
def test_effects_equal_a_whole_forward_that_zeroes_the_latent(
    folders: dict[str, str], model: str, hook: str, normalize: bool
) -> None:
    assert_as_slow(Case(Subject.load(folders[model], hook), normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("hook", "output_hook"),
    [
        ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"),
        ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"),
    ],
)
def test_effects_of_a_transcoder_are_those_of_what_it_writes(
    folders: dict[str, str], hook: str, output_hook: str, normalize: bool
) -> None:
    assert_as_slow(Case(Subject.load(folders["gpt2"], hook, output_hook=output_hook), normalize))


@pytest.mark.long
@pytest.mark.parametrize("normalize", [True, False])
def test_effects_of_a_real_model_do_too(normalize: bool) -> None:
    assert_as_slow(Case(Subject.load("smollm2", "blocks.4.hook_resid_pre"), normalize))


def assert_as_slow(case: Case) -> None:
    found = each_example(case.effects())
    assert len(found) == len(case.examples.pos) > 6
    largest = 0.0
    for number, of_one in enumerate(found):
        slow, pos = case.slow(number), int(case.examples.pos[number])
        assert torch.allclose(of_one.loss_diff, slow["loss_diff"][pos:], atol=1e-4)
        assert torch.allclose(of_one.kl, slow["kl"][pos:], atol=1e-4)
        assert slow["loss_diff"][:pos].count_nonzero() == 0, "attention is causal"
        for by, up, up_by, down, down_by in (("logits", *of_one[2:6]), ("probs", *of_one[6:])):
            assert_votes(up, up_by, slow[by][pos:], largest=True)
            assert_votes(down, down_by, slow[by][pos:], largest=False)
        largest = max(largest, float(slow["loss_diff"].abs().max()))
    assert largest > 0.01, "there is an effect to be found"


def test_what_comes_before_the_position_is_the_same_in_every_bit(folders: dict[str, str]) -> None:
    case = Case(Subject.load(folders["rotary"], "blocks.1.hook_resid_pre"))
    onward = Onward(case.subject)
    clean = onward.clean(case.token_ids)
    changed = clean.acts.clone()
    changed[:, 9] += 1
    final = onward.run(changed, clean.entering)
    assert torch.equal(final[:, :9], clean.final[:, :9])
    assert not torch.equal(final[:, 9:], clean.final[:, 9:])


def test_an_atom_that_is_not_active_has_exactly_no_effect(case: Case) -> None:
    act = torch.cat([batch.act for batch in case.effects()])
    assert (act == 0).sum() == 1
    idle = each_example(case.effects())[int((act == 0).nonzero())]
    assert len(idle.loss_diff) == WIDTH - 5
    for name, column in zip(Changes._fields, idle, strict=True):
        assert "tokens" in name or column.count_nonzero() == 0


def test_a_last_token_has_no_later_ones(case: Case) -> None:
    last = Examples(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 3]))
    ablation = Ablation(Onward(case.subject), case.autoencoder, VOTES, 4)
    (found,) = ablation.effects(case.token_ids, case.lengths, last)
    assert found.n_later.tolist() == [0, 0]
    assert [tuple(column.shape) for column in found.changes] == [(0,), (0,), *[(0, VOTES)] * 8]


def test_a_context_runs_once_without_a_change_however_many_examples_it_has(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original: Callable[..., Any] = Onward.clean
    ablation = Ablation(Onward(case.subject), case.autoencoder, VOTES, 2)

    def noted(self: Onward, token_ids: Tensor) -> Any:
        seen.append(token_ids)
        return original(self, token_ids)

    monkeypatch.setattr(Onward, "clean", noted)
    list(ablation.effects(case.token_ids, case.lengths, case.examples))
    assert torch.equal(torch.cat(seen), case.token_ids)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_effects_do_not_depend_on_the_batch(case: Case, batch: int, seed: int) -> None:
    order = torch.randperm(len(case.examples.pos), generator=torch.Generator().manual_seed(seed))[:7]
    context, at = case.examples.context[order].unique(return_inverse=True)
    chosen = Examples(at, case.examples.pos[order], case.examples.atom[order])
    rank = chosen.context.argsort(stable=True)
    chosen, order = Examples(*(column[rank] for column in chosen)), order[rank]
    ablation = Ablation(Onward(case.subject), case.autoencoder, VOTES, batch)
    found = each_example(list(ablation.effects(case.token_ids[context], case.lengths[context], chosen)))
    whole = each_example(case.effects(64))
    for one, number in zip(found, order.tolist(), strict=True):
        # The products of other batches sum in another order.
        assert torch.allclose(one.loss_diff, whole[number].loss_diff, atol=1e-5)
        assert torch.allclose(one.up_by_logits, whole[number].up_by_logits, atol=1e-5)


def test_a_subject_of_which_only_layers_are_loaded_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(SubjectError, match=r"effects need all layers.*leave out subject\.layers"):
        Onward(Subject.load(folders["gpt2"], "blocks.0.hook_resid_pre", layers=1))


def test_a_hook_outside_of_the_blocks_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(SubjectError, match="hook_embed is in no block"):
        Onward(Subject.load(folders["gpt2"], "hook_embed"))
