"""`sae import`: what others trained becomes a complete autoencoder of the lake, and weights go out as they came in."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from sae import published
from sae.activations import BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from sae.foreign import FORMATS, About
from sae.jobs import checkpoints, importing
from sae.jobs.lake import Lake, connect
from sae.jobs.measure import measure
from sae.matryoshka import Nested
from sae.model import Autoencoder
from sae.schemas.errors import ConfigError, SaeError
from sae.transcoder import Transcoder
from tests.foreign_models import drawn
from tests.in_process import effects_all, encode_all, run_of, train
from tests.object_stores import Put, serve
from tests.tiny_run import CORPUS, NAME, Lab, Result, sae

D, N, K = 32, 48, 4
HOOK = "blocks.1.hook_resid_pre"
ABOUT = About("gpt2", HOOK)


def tiny(activation: Any = None, **options: Any) -> Autoencoder:
    """One that fits the tiny run's subject."""
    return drawn(Autoencoder(N, D, activation or TopK(K), **{"normalize": True, **options}))


def keys(model: Autoencoder, name: str = "theirs", **more: Any) -> dict[str, Any]:
    """What a config says of it."""
    described = {f"autoencoder__{key}": value for key, value in importing._described(model).items()}
    return {"autoencoder__name": name, **described, **more}


def stored(folder: Path, model: Autoencoder, format_: str, about: About = ABOUT) -> Path:
    """Its files: a folder, or a .pt."""
    one = FORMATS[format_]
    config, tensors = one.write(model, about)
    folder.mkdir(parents=True, exist_ok=True)
    if not one.has_config:
        torch.save(tensors, folder / one.weights)
        return folder / one.weights
    save_file(tensors, folder / one.weights)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def import_(lab: Lab, source: object, *flags: str, **given: Any) -> Result:
    values = {"lake": str(lab.lake), **given}
    overrides = [f"--{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
    return sae("import", lab.config, str(source), *flags, *overrides)


def done(result: Result) -> Result:
    assert result.code == 0, result.stderr
    return result


def refused(result: Result) -> str:
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    return result.stderr


def assert_same(one: Autoencoder, other: Autoencoder) -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(5)) * 2
    found, expected = other.encode(x), one.encode(x)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.decode(*found), one.decode(*expected), rtol=1e-5, atol=1e-5)


def transcoder(skip: bool = False) -> Autoencoder:
    return drawn(Transcoder(N, D, D, ReLU(), skip))


OUTPUT = {"subject__hook": "blocks.1.hook_resid_mid", "subject__output_hook": "blocks.1.hook_mlp_out"}
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "published": ("openai-weights", tiny, {}),
    "published-relu": ("openai-weights", lambda: tiny(ReLU(), normalize=False), {}),
    "saelens-topk": ("saelens", tiny, {}),
    "saelens-jumprelu": ("saelens", lambda: tiny(JumpReLU(initial=0.5), normalize=False), {}),
    "saelens-transcoder": ("saelens", lambda: transcoder(), OUTPUT),
    "saelens-skip-transcoder": ("saelens", lambda: transcoder(skip=True), OUTPUT),
    "sparsify-topk": ("sparsify", lambda: tiny(normalize=False), {}),
    "sparsify-groupmax": ("sparsify", lambda: tiny(GroupMax(K), normalize=False), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_imported_goes_through_every_step(case: str, tokenized: Lab, tmp_path: Path) -> None:
    format_, make, more = CASES[case]
    model, lab = make(), tokenized.copy(tmp_path)
    given = keys(model, **more)
    done(import_(lab, stored(tmp_path / "files", model, format_), **given))
    assert_same(model, checkpoints.load(Lake(str(lab.lake)), "theirs"))
    done(lab.sae("train", **given))
    encode_all(lab, **given)
    assert lab.done("encode", **given).stderr.startswith("encode: all ")
    lab.done("aggregate", **given)
    if not more:  # effects are of what is found at the hook itself
        effects_all(lab, **given)
    lab.done("export", **given)
    connection = connect(str(lab.lake))
    ((density,),) = connection.sql("select sum(density) from atoms where autoencoder = 'theirs'").fetchall()
    assert density > 0
    ((n_rows,),) = connection.sql("select count(*) from decoders where autoencoder = 'theirs'").fetchall()
    assert n_rows == N
    assert "theirs" in lab.query("select autoencoder, tokens, complete from autoencoders").stdout
    assert done(sae("verify", lab.lake)).code == 0
    # Out again, as it came.
    lab.done("export", **given, export__format=format_)
    folder = tmp_path / "viewer" / "model" / "theirs"
    again = "again-" + case
    source = folder / FORMATS[format_].weights if format_ == "openai-weights" else folder
    done(import_(lab, source, **{**given, "autoencoder__name": again}))
    assert_same(model, checkpoints.load(Lake(str(lab.lake)), again))


def test_encoded_rows_are_the_latents_of_its_own_program(tokenized: Lab, tmp_path: Path) -> None:
    """Against SAELens' formula on the subject's activations."""
    model, lab = tiny(JumpReLU(initial=0.5), normalize=False), tokenized.copy(tmp_path)
    given = keys(model)
    config, tensors = FORMATS["saelens"].write(model, ABOUT)
    assert config["apply_b_dec_to_input"]
    done(import_(lab, stored(tmp_path / "files", model, "saelens"), **given))
    encode_all(lab, **given)
    encoder = importing_inputs(lab, given)
    pre_act = (encoder - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    latents = pre_act.relu() * (pre_act > tensors["threshold"])
    rows = connect(str(lab.lake)).sql("select count(*), sum(act) from latents where autoencoder = 'theirs'").fetchall()
    assert rows[0][0] == pytest.approx(int(latents.count_nonzero()), abs=2)
    assert rows[0][1] == pytest.approx(float(latents.double().sum()), rel=1e-3)  # stored with 10 bits


def importing_inputs(lab: Lab, given: dict[str, Any]) -> Tensor:
    """All activations [m, d] that are encoded, read one by one."""
    import numpy as np

    from sae.jobs.contexts import load
    from sae.subject import Subject

    subject = Subject.load(**run_of(lab, **given).subject.model_dump())
    corpus, parts = load(Lake(str(lab.lake)), CORPUS), []
    for row in range(len(corpus)):
        token_ids, lengths = corpus.padded(np.array([row]))
        x = subject.activations(token_ids)
        parts.append(x[subject.keep_mask(lengths, x.shape[1])])
    return torch.cat(parts)


def test_what_was_trained_goes_out_and_comes_in_again(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    train(lab, training__tokens=640)
    ours = checkpoints.load(Lake(str(lab.lake)), NAME)
    for format_ in ("saelens", "openai-weights"):
        lab.done("export", export__format=format_)
        folder = tmp_path / "viewer" / "model" / NAME
        source = folder / FORMATS[format_].weights if format_ == "openai-weights" else folder
        name = f"from-{format_}"
        done(import_(lab, source, autoencoder__name=name))
        assert_same(ours, checkpoints.load(Lake(str(lab.lake)), name))
    assert "normalised inputs" in refused(lab.sae("export", export__format="sparsify"))


def test_what_was_imported_is_evaluated(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    done(import_(lab, stored(tmp_path / "files", model, "saelens"), **keys(model)))
    figures = measure(run_of(lab, **keys(model)), {}).metrics
    assert figures["l0"] == pytest.approx(K, abs=1)
    assert all(math.isfinite(value) for value in figures.values())


# The property


def test_the_property_says_what_is_known(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "openai-weights")
    result = done(import_(lab, source, **keys(model, subject__hook="resid_post_mlp.0")))
    assert result.lines == [f"import: theirs, 48 latents of 32 features, TopK, from {source}; next: sae encode"]
    state = Lake(str(lab.lake)).snapshot().properties["autoencoder/theirs"]
    assert state["config"] == model.config()
    assert (state["hook"], state["d_model"], state["corpus"]) == ("blocks.0.hook_resid_post", D, CORPUS)
    assert (state["n_latents"], state["k"], state["tokens"], state["complete"]) == (N, K, 0, True)
    assert state["imported"]["source"] == str(source)
    assert state["imported"]["format"] == "openai-weights"
    assert set(state["imported"]["sha256"]) == {"autoencoder.pt"}
    assert {key.split(".")[0] for key in state["made_with"]} == {"subject"}
    assert state["checkpoints"][0]["state"] == []


def test_a_second_import_does_nothing(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens")
    done(import_(lab, source, **keys(model)))
    before = lab.bytes()
    assert done(import_(lab, source, **keys(model))).lines == [f"import: theirs is in {lab.lake}"]
    assert lab.bytes() == before
    message = refused(import_(lab, source, **keys(model, subject__hook="blocks.0.hook_resid_pre")))
    assert f"subject.hook: autoencoder theirs of {lab.lake} is trained with {HOOK}" in message


def test_another_under_the_same_name_is_refused(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    done(import_(lab, stored(tmp_path / "one", model, "saelens"), **keys(model)))
    other = stored(tmp_path / "other", drawn(model, seed=9), "saelens")
    message = refused(import_(lab, other, **keys(model)))
    assert message.endswith(f"or delete it first with: sae drop {lab.lake} --autoencoder theirs\n")
    done(sae("drop", lab.lake, "--autoencoder", "theirs"))
    done(import_(lab, other, **keys(model)))


def test_it_is_imported_before_there_is_a_lake(lab: Lab, tmp_path: Path) -> None:
    fresh, model = lab.without_lake(tmp_path), tiny()
    done(import_(fresh, stored(tmp_path / "files", model, "saelens"), **keys(model)))
    assert_same(model, checkpoints.load(Lake(str(fresh.lake)), "theirs"))


def test_it_has_one_set_of_weights(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    done(import_(lab, stored(tmp_path / "files", model, "saelens"), **keys(model)))
    message = refused(lab.sae("encode", **keys(model, encode__weights="plain")))
    assert "encode.weights: got plain, but autoencoder theirs was imported, with one set of weights" in message
    message = refused(lab.sae("encode", **keys(model, encode__checkpoint="best")))
    assert "encode.checkpoint: got best" in message


def test_training_leaves_it_alone(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens")
    done(import_(lab, source, **keys(model)))
    assert lab.done("train", **keys(model)).lines == [f"train: theirs was imported from {source}, nothing is trained"]
    config = yaml.safe_load(lab.config.read_text())
    several = [{"name": "theirs", "n_latents": N}, {"name": "new", "n_latents": 8, "k": 2}]
    config |= {"lake": str(lab.lake), "autoencoders": several}
    del config["autoencoder"]
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(config))
    assert "theirs of" in refused(sae("train", tmp_path / "several.yaml"))
    message = refused(sae("import", tmp_path / "several.yaml", str(source)))
    assert "autoencoders: several are given; import one" in message


def test_nested_prefixes_of_what_is_imported_are_kept(tokenized: Lab, tmp_path: Path) -> None:
    """As SAELens saves them while it trains."""
    model, lab = drawn(Autoencoder(N, D, BatchTopK(K), nested=Nested((8, 20)))), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens")
    config = json.loads((source / "cfg.json").read_text())
    config |= {"architecture": "matryoshka_batchtopk", "k": float(K), "matryoshka_widths": [8, 20, N]}
    (source / "cfg.json").write_text(json.dumps(config))
    tensors = FORMATS["saelens"].write(model, ABOUT)[1]
    tensors["topk_threshold"] = tensors.pop("threshold")[0].double()
    save_file(tensors, source / "sae_weights.safetensors")
    done(import_(lab, source, **keys(model)))
    found = checkpoints.load(Lake(str(lab.lake)), "theirs")
    assert_same(model, found)
    assert found.nested.sizes == (8, 20)


# What is refused, in one line, with the lake as it was

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "latents": (
        {"autoencoder__n_latents": 64},
        "is not of n_latents 64; give --autoencoder.n_latents 48, here and for later steps",
    ),
    "several": (
        {"autoencoder__k": 5, "autoencoder__normalize": False},
        "is not of k 5, normalize False; give --autoencoder.k 4 --autoencoder.normalize true, here",
    ),
    "activation": ({"autoencoder__activation": "jumprelu"}, "give --autoencoder.activation topk, here"),
    "prefixes": ({"autoencoder__prefixes": [8]}, "give --autoencoder.prefixes '[]', here"),
    "transcoder": (OUTPUT, "subject.output_hook: got blocks.1.hook_mlp_out, but "),
    "width": ({"subject__hook": "blocks.1.mlp.hook_post"}, "made for activations of width 32, but blocks.1.mlp.hook_p"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_says_otherwise_is_refused(case: str, tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source, before = stored(tmp_path / "files", model, "saelens"), lab.bytes()
    assert WRONG[case][1] in refused(import_(lab, source, **{**keys(model), **WRONG[case][0]}))
    assert lab.bytes() == before


def test_what_is_told_to_give_is_what_imports_it(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(JumpReLU(), normalize=False), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens")
    message = refused(import_(lab, source, autoencoder__name="theirs"))
    flags = message.partition("; give ")[2].partition(", here")[0].split()
    done(sae("import", lab.config, source, "--lake", lab.lake, "--autoencoder.name", "theirs", *flags))


def test_another_hook_than_the_file_names_is_told(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens", About("gpt2-small", "blocks.8.hook_resid_pre"))
    lines = done(import_(lab, source, **keys(model))).lines
    assert f"import: {source} was trained on blocks.8.hook_resid_pre, subject.hook is {HOOK}" in lines[1]
    assert f"import: {source} was trained on gpt2-small, subject.model is " in lines[0]
    assert len(lines) == 3


def test_sources_that_are_none_are_refused(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    before = lab.bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cfg.json").write_text('{"hidden_size": 768}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "cfg.json").write_text(json.dumps(FORMATS["saelens"].write(tiny(), ABOUT)[0]))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for source, expected in (
        ("nowhere", "nowhere: is not there; expected a .pt file, a folder of SAELens or sparsify"),
        ("nowhere.pt", "nowhere.pt: no such file"),
        (tmp_path / "empty", "is no folder with cfg.json; expected"),
        (tmp_path / "other", "its cfg.json is neither SAELens' (with d_in and d_sae) nor sparsify's"),
        (tmp_path / "half", "sae_weights.safetensors: no such file"),
        (tmp_path / "text.pt", "is no file of torch.save since version 1.6, or was cut off"),
        ("v5_32k/layer_12/resid_post_mlp", "v5_32k was not published for layer 12"),
        ("v5_32k/layer_8", "v5_32k/layer_8: names no published autoencoder"),
        ("hf://a/b", "unknown scheme hf://"),
    ):
        assert expected in refused(import_(lab, source, autoencoder__name="theirs"))
    assert lab.bytes() == before


def test_a_damaged_source_leaves_the_lake_as_it_was(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source, before = stored(tmp_path / "files", model, "saelens"), lab.bytes()
    weights = source / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(import_(lab, source, **keys(model)))
    assert str(weights) in message or str(source) in message
    assert "damaged, or of another kind" in message
    assert lab.bytes() == before


# Published ones, from an emulator of Azure's store


@pytest.fixture(scope="module")
def put() -> Iterator[Put]:
    with serve("az") as put:
        yield put


@pytest.fixture
def openaipublic(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Autoencoder:
    """A tiny autoencoder in the place of v5_32k/layer_8/resid_post_mlp, in the emulator's account and container."""
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAE_OFFLINE", raising=False)
    model = tiny()
    data = stored(tmp_path / "published", model, "openai-weights").read_bytes()
    name = "sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    root = put(name, data).removesuffix(name)
    assert published.v5_32k("resid_post_mlp", 8) == f"az://openaipublic/{name}"
    monkeypatch.setattr(published, "_ROOT", f"{root}sparse-autoencoder/gpt2-small")
    return model


NAMED = "v5_32k/layer_8/resid_post_mlp"


def test_a_published_one_is_imported_by_its_name(
    openaipublic: Autoencoder, tokenized: Lab, tmp_path: Path, put: Put
) -> None:
    lab = tokenized.copy(tmp_path)
    given = keys(openaipublic, subject__hook="resid_post_mlp.1")
    lines = done(import_(lab, NAMED, **given)).lines
    where = lab.folder / "model"
    assert lines[0] == (
        f"import: {NAMED} was trained on gpt2, subject.model is {where}; make sure that they are the same"
    )
    assert "subject.hook is" in lines[1]
    assert_same(openaipublic, checkpoints.load(Lake(str(lab.lake)), "theirs"))
    encode_all(lab, **given)
    # Once more without any store: the copy is whole.
    again = {**given, "autoencoder__name": "again"}
    done(import_(lab, NAMED, "--offline", **again))
    state = Lake(str(lab.lake)).snapshot().properties["autoencoder/again"]
    assert state["imported"]["source"] == NAMED


def test_offline_one_that_was_never_fetched_is_refused(
    openaipublic: Autoencoder, tokenized: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = tokenized.copy(tmp_path)
    expected = "not in the cache"
    assert expected in refused(import_(lab, NAMED, "--offline", **keys(openaipublic)))
    monkeypatch.setenv("SAE_OFFLINE", "1")
    assert expected in refused(import_(lab, NAMED, **keys(openaipublic)))


def test_a_damaged_copy_is_fetched_anew(openaipublic: Autoencoder, tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    done(import_(lab, NAMED, **keys(openaipublic)))
    (copy,) = (tmp_path / "cache").rglob("8.pt")
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    again = {**keys(openaipublic), "autoencoder__name": "again"}
    assert "its copy in the cache is damaged" in refused(import_(lab, NAMED, "--offline", **again))
    assert "fetching it anew" in done(import_(lab, NAMED, **again)).stderr
    assert_same(openaipublic, checkpoints.load(Lake(str(lab.lake)), "again"))


def test_a_folder_in_a_store_is_imported(openaipublic: Autoencoder, tokenized: Lab, tmp_path: Path, put: Put) -> None:
    model, lab = tiny(normalize=False), tokenized.copy(tmp_path)
    folder = stored(tmp_path / "files", model, "sparsify")
    paths = [put(f"coder/{file.name}", file.read_bytes()) for file in folder.iterdir()]
    done(import_(lab, paths[0].rpartition("/")[0], **keys(model)))
    assert_same(model, checkpoints.load(Lake(str(lab.lake)), "theirs"))


# What can't be exported


@pytest.mark.parametrize(
    ("format_", "make", "expected"),
    [
        ("saelens", lambda: tiny(GroupMax(K), normalize=False), "format saelens has no place for activation GroupMax"),
        ("sparsify", tiny, "format sparsify has no place for normalised inputs; use saelens, or train with"),
        ("openai-weights", lambda: tiny(normalize=False), "has no place for one with TopK that does not normalise its"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(
    format_: str, make: Any, expected: str, tokenized: Lab, tmp_path: Path
) -> None:
    model, lab = make(), tokenized.copy(tmp_path)
    source = "sparsify" if not model.normalize else "saelens"
    done(import_(lab, stored(tmp_path / "files", model, source), **keys(model)))
    message = refused(lab.sae("export", **keys(model, export__format=format_)))
    assert message.startswith("error: autoencoder theirs: format ")
    assert expected in message
    assert not (tmp_path / "viewer").exists()


def test_an_export_replaces_what_was_there(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    other = drawn(tiny(), seed=8)
    done(import_(lab, stored(tmp_path / "one", model, "saelens"), **keys(model)))
    done(import_(lab, stored(tmp_path / "other", other, "saelens"), **keys(other, name="other")))
    for name, expected in (("theirs", model), ("other", other)):
        lab.done("export", **keys(model, name=name), export__format="saelens", export__path="same")
        read = importing.read(
            FORMATS["saelens"],
            {file: str(tmp_path / "viewer" / "same" / file) for file in ("cfg.json", "sae_weights.safetensors")},
        )
        assert_same(expected, read.autoencoder)
        assert read.about.hook == HOOK
    assert sorted(file.name for file in (tmp_path / "viewer" / "same").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_the_config_says_what_it_is_or_import_fails_in_code_too(tokenized: Lab, tmp_path: Path) -> None:
    model, lab = tiny(), tokenized.copy(tmp_path)
    source = stored(tmp_path / "files", model, "saelens")
    with pytest.raises(ConfigError):
        importing.run(run_of(lab, autoencoder__name="theirs"), str(source))
    with pytest.raises(SaeError):
        importing.run(run_of(lab, autoencoder__name="theirs"), str(tmp_path / "nothing.pt"))
