"""docs/pretrained.md: its commands are run in order, its Python here or in tests/readers, its tables are of today."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sae import published
from sae.activations import JumpReLU, TopK
from sae.foreign import FORMATS, About, saelens
from sae.jobs.lake import Lake
from sae.model import Autoencoder
from sae.schemas.config import Export
from tests.foreign_models import drawn
from tests.models import tiny_gpt2
from tests.no_ray import without_ray
from tests.object_stores import Put, serve
from tests.pages import Page
from tests.tiny_run import sae, write_texts

PAGE = Page(Path(__file__).resolve().parent.parent.parent / "docs" / "pretrained.md")
D, N, K = 32, 48, 4


@pytest.fixture
def put() -> Iterator[Put]:
    with serve("az") as put:
        yield put


def written(folder: Path, format_: str, model: Autoencoder) -> None:
    config, tensors = FORMATS[format_].write(model, About())
    folder.mkdir(parents=True, exist_ok=True)
    if not FORMATS[format_].has_config:
        torch.save(tensors, folder / FORMATS[format_].weights)
        return
    save_file(tensors, folder / FORMATS[format_].weights)
    (folder / "cfg.json").write_text(json.dumps(config))


def test_commands_run_in_order(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny subject, tiny autoencoders, and the published one in an emulator of Azure's store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAE_OFFLINE", raising=False)
    tiny_gpt2(tmp_path / "gpt2", n_layer=9, d=D, n_ctx=64)
    write_texts(tmp_path / "texts", 6)
    (text,) = PAGE.of("yaml")
    run = yaml.safe_load(text)
    assert (run["autoencoder"]["n_latents"], run["autoencoder"]["k"]) == (32768, 32)
    run["autoencoder"] |= {"n_latents": N, "k": K}
    run["corpus"]["context_length"] = 32
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    topk = drawn(Autoencoder(N, D, TopK(K), normalize=True))
    written(tmp_path / "downloads", "openai-weights", topk)
    written(tmp_path / "downloads" / "saelens", "saelens", drawn(Autoencoder(N, D, JumpReLU(), normalize=True)))
    written(tmp_path / "downloads" / "sparsify", "sparsify", drawn(Autoencoder(N, D, TopK(K))))
    path = published.v5_32k("resid_post_mlp", 8).removeprefix("az://openaipublic/")
    root = put(path, (tmp_path / "downloads" / "autoencoder.pt").read_bytes()).removesuffix(path)
    monkeypatch.setattr(published, "_ROOT", f"{root}sparse-autoencoder/gpt2-small")
    commands = PAGE.words("sae")
    assert len(commands) == sum(len(text.splitlines()) for text in PAGE.of("bash")) >= 10
    with without_ray():
        for command in commands:
            result = sae(*command)
            assert result.code == 0, (command, result.stderr)
    names = {key for key in Lake("lake").snapshot().properties if key.startswith("autoencoder/")}
    assert names == {f"autoencoder/{name}" for name in ("v5", "again", "file", "lens", "coder")}
    for file in ("weights/gpt2/v5/cfg.json", "published/gpt2/v5/autoencoder.pt", "coders/gpt2/coder/sae.safetensors"):
        assert Path(file).exists()


def test_python_of_ours_runs(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [block for block in PAGE.of("python") if not block.startswith("# with ")]
    assert ours
    for block in ours:
        exec(compile(block, str(PAGE.path), "exec"), {})
    assert capsys.readouterr().out.strip() == published.v5_32k("resid_post_mlp", 8)


def rows(first: str) -> list[list[str]]:
    """The table whose head begins with a word, without the head."""
    found = list(PAGE.rows())
    start = next(at for at, cells in enumerate(found) if cells[0] == first) + 1
    heads = {"name", "source", "format"}
    return list(itertools.takewhile(lambda cells: cells[0] not in heads, found[start:]))


def test_the_table_of_published_ones_is_that_of_the_paths() -> None:
    named = {row[0]: row for row in rows("name")}
    for release in published._RELEASES:
        (row,) = (row for name, row in named.items() if f"`{release}/layer_L/PLACE`" in name)
        places = named["`v5_32k/layer_L/PLACE`"][4] if row[4].startswith("the same") else row[4]
        for place in published._RELEASES[release][0]:
            assert f"`{place}`" in places
            published.named(f"{release}/layer_{published.LAYERS - 1}/{place}")


def test_architectures_and_formats_are_all_named() -> None:
    (imported,) = (row for row in rows("source") if row[0].startswith("SAELens"))
    assert set(saelens._KNOWN) <= set(re.findall(r"`(\w+)`", imported[1]))
    assert [row[0].strip("`") for row in rows("format")] == list(FORMATS)
    described = Export.model_fields["format"].description or ""
    assert all(name in described for name in FORMATS)
