import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sae.schemas.errors import SubjectError
from sae.subject import LOCATIONS, Subject, load_tokenizer, model_context_limit, resolve_hook, token_strings
from tests.models import tiny_gpt2, tiny_llama

MAKERS = {"gpt2": tiny_gpt2, "rotary": tiny_llama}
# Two float32 implementations of the same sums, a few blocks deep; measured 1e-6 at values of about 1.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param), n_layer=3)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"), n_layer=3)


@pytest.fixture(scope="module")
def subject(gpt2: Path) -> Subject:
    return Subject.load(str(gpt2), "blocks.1.hook_resid_post")


def some_ids(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 320, (batch, width), generator=torch.Generator().manual_seed(seed))


def hidden_states(folder: Path, ids: Tensor) -> tuple[Tensor, ...]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    return (*output.hidden_states, output.logits)


def test_activations_are_those_of_the_plain_model(folder: Path) -> None:
    ids = some_ids(3, 21)
    expected = hidden_states(folder, ids)
    for layer in range(3):
        subject = Subject.load(str(folder), f"blocks.{layer}.hook_resid_pre")
        assert_close(subject.activations(ids), expected[layer])
    assert subject.d_model == 32
    assert subject.bos_id == 0
    assert subject.vocab_size == 320


def test_residual_stream_locations_add_up(folder: Path) -> None:
    """What attention and MLP add to the residual stream is what lies between its three points."""
    ids = some_ids(2, 16)

    def acts(hook: str) -> Tensor:
        return Subject.load(str(folder), hook).activations(ids)

    before, after = acts("blocks.1.hook_resid_pre"), acts("resid_post_mlp.1")
    middle = acts("resid_post_attn.1")
    assert_close(middle, before + acts("resid_delta_attn.1"))
    assert_close(after, middle + acts("resid_delta_mlp.1"))
    assert acts("mlp_post_act.1").shape[-1] in (128, 64)  # GPT-2's four times the width, the other's two


def test_nothing_runs_after_the_hook(subject: Subject) -> None:
    later = subject.bridge.blocks[2].hook_in
    ran = []
    later.add_hook(lambda acts, hook: ran.append(acts.shape))
    try:
        subject.activations(some_ids(1, 4))
        assert ran == []
        subject.logits_loss(some_ids(1, 4), None, torch.tensor([4]))
        assert len(ran) == 1
    finally:
        later.remove_hooks("fwd")


def test_only_the_first_layers_are_loaded(folder: Path) -> None:
    whole = Subject.load(str(folder), "resid_post_mlp.0")
    first = Subject.load(str(folder), "resid_post_mlp.0", layers=1)
    ids = some_ids(2, 16)
    assert len(first.bridge.blocks) == 1
    assert torch.equal(first.activations(ids), whole.activations(ids))
    with pytest.raises(SubjectError, match=r"layers 0 to 2, of which subject\.layers loads 1"):
        Subject.load(str(folder), "resid_post_mlp.1", layers=1)
    with pytest.raises(SubjectError, match="only the first are loaded"):
        first.logits_loss(ids, None, torch.tensor([16, 16]))


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(1, 40), st.integers(0, 2**32))
def test_a_row_does_not_depend_on_its_batch_or_padding(
    subject: Subject, batch: int, padding: int, width: int, seed: int
) -> None:
    """Bitwise: tables must not change with the batch size."""
    ids = some_ids(batch, width, seed)
    together = subject.activations(F.pad(ids, (0, padding), value=7))[:, :width]
    alone = torch.cat([subject.activations(row[None]) for row in ids])
    assert torch.equal(together, alone)


def test_loss_is_the_cross_entropy_of_the_plain_model(folder: Path) -> None:
    ids, lengths = some_ids(2, 12), torch.tensor([12, 5])
    logits = hidden_states(folder, ids)[-1]
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected[1, 4:] = 0  # the fifth token of the short row is its last: it predicts padding
    subject = Subject.load(str(folder), "resid_post_mlp.1")
    assert_close(subject.logits_loss(ids, None, lengths), expected)


def test_replaced_activations_reach_the_loss(subject: Subject) -> None:
    ids, lengths = some_ids(2, 12), torch.tensor([12, 12])
    clean = subject.logits_loss(ids, None, lengths)
    assert torch.equal(subject.logits_loss(ids, lambda acts: acts, lengths), clean)
    assert not torch.allclose(subject.logits_loss(ids, torch.zeros_like, lengths), clean, atol=1e-3)

    def only_last(acts: Tensor) -> Tensor:
        assert acts.shape == (2, 12, 32)
        acts = acts.clone()
        acts[:, 8:] = 0
        return acts

    changed = subject.logits_loss(ids, only_last, lengths) != clean
    assert not changed[:, :8].any()
    assert changed[:, 8:].all()
    assert torch.equal(subject.logits_loss(ids, None, lengths), clean)


def test_keep_mask_leaves_out_padding_and_masked_positions(gpt2: Path) -> None:
    subject = Subject.load(str(gpt2), "resid_post_mlp.0", masked_positions=(0, 2))
    mask = subject.keep_mask(torch.tensor([4, 1, 3]), 5)
    assert mask.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_fingerprint_names_what_decides_the_activations(tmp_path: Path) -> None:
    def fingerprint(name: str = "a", seed: int = 0, hook: str = "resid_post_mlp.0", **options: object) -> str:
        folder = tiny_gpt2(tmp_path / name, seed=seed)
        return Subject.load(str(folder), hook, **options).fingerprint  # type: ignore[arg-type]

    same = [
        fingerprint(),
        fingerprint("moved"),
        fingerprint(hook="blocks.0.hook_resid_post"),
        fingerprint(layers=2),
    ]
    different = [
        fingerprint("b", seed=1),
        fingerprint(hook="resid_post_mlp.1"),
        fingerprint(dtype="bfloat16"),
        fingerprint(layers=1),
        fingerprint(masked_positions=(0,)),
    ]
    assert len(set(same)) == 1
    assert len({*same, *different}) == 1 + len(different)


@pytest.mark.parametrize("location", LOCATIONS)
def test_every_reference_location_resolves_to_a_hook(subject: Subject, location: str) -> None:
    assert resolve_hook(f"{location}.2") in subject.bridge.hook_dict


@pytest.mark.parametrize("hook", ["blocks.8.hook_resid_post", "hook_embed", "resid_post.8"])
def test_other_names_are_left_alone(hook: str) -> None:
    assert resolve_hook(hook) == hook


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.1.hook_resid_pots", r"did you mean blocks\.1\.hook_resid_post"),
        ("resid_post.1", r"did you mean resid_post_\w+\.1"),
        ("zzz", "one of mlp_post_act"),
        ("resid_post_mlp.3", "is in layer 3, .* has layers 0 to 2"),
        ("blocks.0.attn.hook_pattern", "not one vector a token"),
        ("blocks.0.attn.hook_result", "never fires"),
    ],
)
def test_a_hook_that_cannot_be_used_is_explained(gpt2: Path, hook: str, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        Subject.load(str(gpt2), hook)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp32"}, "'fp32' is not supported; choose one of float32"),
        ({"layers": 4}, "choose 1 to 3"),
        ({"layers": 0}, "choose 1 to 3"),
        ({"masked_positions": (-1,)}, "count from 0"),
        ({"device": "nowhere"}, "'nowhere' cannot be used here"),
    ],
)
def test_impossible_options_are_explained(gpt2: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        Subject.load(str(gpt2), "resid_post_mlp.0", **options)  # type: ignore[arg-type]


def test_a_model_that_is_not_there_is_explained(tmp_path: Path) -> None:
    for model in ("no-such-model", str(tmp_path / "absent"), str(tmp_path)):
        with pytest.raises(SubjectError, match="subject model") as caught:
            Subject.load(model, "resid_post_mlp.0")
        assert "\n" not in str(caught.value)
        with pytest.raises(SubjectError, match="subject model"):
            load_tokenizer(model)


def test_weights_that_are_cut_or_missing_are_refused(tmp_path: Path) -> None:
    """transformers fills a missing weight with random numbers and goes on."""
    lacking, cut = tiny_gpt2(tmp_path / "lacking"), tiny_gpt2(tmp_path / "cut")
    weights = load_file(lacking / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SubjectError, match=r"lack the weights .*c_fc\.weight"):
        Subject.load(str(lacking), "resid_post_mlp.0")

    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SubjectError, match="does not load"):
        Subject.load(str(cut), "resid_post_mlp.0")


def test_nan_is_refused_with_its_place(tmp_path: Path) -> None:
    folder = tiny_gpt2(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][9] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # One block further on, attention's 0 * NaN would have carried it to earlier positions of the row.
    subject = Subject.load(str(folder), "hook_embed")
    ids = some_ids(3, 8).clamp(min=10)
    assert subject.activations(ids).isfinite().all()
    ids[1, 5] = 9
    with pytest.raises(SubjectError, match="row 1 of the batch, position 5"):
        subject.activations(ids)


def test_without_a_gpu_a_launch_is_checked_at_once(subject: Subject) -> None:
    ids = some_ids(3, 21)
    acts, check = subject.launch(ids)
    check()
    assert torch.equal(acts, subject.activations(ids))
    broken = dataclasses.replace(subject, forward=lambda ids: subject.forward(ids) * torch.inf)
    with pytest.raises(SubjectError, match="NaN or infinite in row 0"):
        broken.launch(ids)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_launch_on_a_gpu_is_checked_later(gpt2: Path, bad: float) -> None:
    subject = Subject.load(str(gpt2), "resid_post_mlp.1", dtype="bfloat16", device="cuda")
    ids = some_ids(3, 21)
    acts, check = subject.launch(ids)
    check()
    assert torch.equal(acts, subject.activations(ids))

    def broken(ids: Tensor) -> Tensor:
        acts = subject.forward(ids).clone()
        acts[2, 5, 7] = bad
        return acts

    _, check = dataclasses.replace(subject, forward=broken).launch(ids)
    with pytest.raises(SubjectError, match="resid_post: an activation is NaN or infinite"):
        check()


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["rotary", pytest.param("gpt2", marks=pytest.mark.long)], indirect=True)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_subject_gives_the_same_activations(folder: Path) -> None:
    subject = Subject.load(str(folder), "resid_post_mlp.1")
    compiled = subject.compiled(4, 20)
    for n, width in [(4, 20), (1, 20), (4, 17), (5, 20), (2, 40)]:
        ids = some_ids(n, width, seed=width)
        assert_close(compiled.activations(ids), subject.activations(ids))
    # The hook lets go of a pass when it has its activations: nothing of that may be left behind.
    assert_close(
        compiled.logits_loss(ids, None, torch.tensor([40, 40])), subject.logits_loss(ids, None, torch.tensor([40, 40]))
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_forward_that_depends_on_what_it_reads_runs_uncompiled(subject: Subject) -> None:
    def fickle(ids: Tensor) -> Tensor:
        return ids[..., None].float() + int(ids.sum())

    changed = dataclasses.replace(subject, forward=fickle)
    with pytest.warns(UserWarning, match="runs uncompiled, and slower .it gives other activations"):
        assert changed.compiled(2, 16) is changed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_subject_compiled_for_a_gpu(folder: Path, dtype: str) -> None:
    subject = Subject.load(str(folder), "resid_post_mlp.1", dtype=dtype, device="cuda")
    compiled = subject.compiled(64, 64)
    assert compiled is not subject
    ids = some_ids(64, 64)
    found, expected = compiled.activations(ids), subject.activations(ids)
    # Rounding alone: bfloat16 has 8 bits, and two blocks add up a few roundings.
    error = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.max() < (0.03 if dtype == "bfloat16" else 1e-4)
    assert torch.equal(compiled.activations(ids), found)
    assert torch.equal(compiled.activations(ids[:7]), found[:7])


def test_contexts_that_do_not_fit_the_model_are_refused(gpt2: Path, subject: Subject) -> None:
    assert model_context_limit(str(gpt2)) == subject.context_limit == 64
    assert subject.activations(some_ids(1, 64)).shape == (1, 64, 32)
    with pytest.raises(SubjectError, match="65 tokens is longer than the model's limit of 64"):
        subject.activations(some_ids(1, 65))
    with pytest.raises(SubjectError, match="320 given, the vocabulary is 0 to 319"):
        subject.activations(torch.tensor([[1, 320]]))


def test_a_config_without_a_context_limit_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SubjectError, match="names no context limit"):
        model_context_limit(str(tmp_path))


def test_token_strings_are_the_pieces_of_a_text(gpt2: Path) -> None:
    tokenizer = load_tokenizer(str(gpt2))
    strings = token_strings(tokenizer)
    text = "The quick brown fox said that all are created equal"
    assert len(strings) == len(tokenizer)
    assert "".join(strings[i] for i in tokenizer(text)["input_ids"]) == text
    assert any(string.startswith(" ") for string in strings)
    assert [strings[i] for i in tokenizer("日")["input_ids"]] == ["\ufffd"] * 3
    assert strings[0] == "<|endoftext|>"
