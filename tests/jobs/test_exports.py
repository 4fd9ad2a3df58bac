"""Exports for other programs hold what the tables say, and a damaged one is told by file and field."""

import gzip
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import export
from sae.jobs.exports import html_page, neuronpedia
from sae.jobs.exports.dashboards import identifier, layer
from sae.schemas import neuronpedia as rows
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from sae.schemas.saedashboard import Batch, Feature
from sae.schemas.site import Dictionary, Site
from sae.schemas.tables import SCHEMAS
from tests.lakes import BIN_WIDTH, CORPUS, DEAD, EXAMPLES, N_LATENTS, NAME, TOKENS, Small, small_lake
from tests.tiny_run import sae

FORMATS = ("openai", "site", "html", "saedashboard", "neuronpedia")
NASTY = [
    "<script>alert(1)</script>",
    "</script><!--",
    "\0",
    "\\u0000",
    "\u202e\u2066",
    "👩‍👩‍👧‍👦",
    "x" * 10_000,
    "'\";--",
    "\ufffd",
    "\u2028",
    "\r\n",
    "\\",
    "&lt;",
    "${a}",
    "\x7f\x1b",
    " ",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return nasty(small_lake(tmp_path_factory.mktemp("exports") / "lake"))


def nasty(small: Small) -> Small:
    """The lake with tokens that break naive HTML, JSON and databases."""
    assert len(NASTY) == len(TOKENS)
    words = pa.table({"token_id": range(len(NASTY)), "token": NASTY}, schema=SCHEMAS["vocabulary"])
    with small.lake.transaction("tokenize") as transaction:
        transaction.remove(transaction.base.select("vocabulary"))
        transaction.write("vocabulary", words, corpus=CORPUS)
    return small


def exported(small: Small, folder: Path, format_: str, **keys: Any) -> Path:
    """What `sae export` leaves: a folder, or an HTML file."""
    export.run(configured(small, folder, format_, **keys))
    return folder / f"{NAME}.html" if format_ == "html" else folder


def configured(small: Small, folder: Path, format_: str, **keys: Any) -> Run:
    update = {"format": format_, "folder": str(folder), **keys}
    return small.config.model_copy(update={"export": small.config.export.model_copy(update=update)})


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, exported(small, tmp_path_factory.mktemp(request.param), request.param)


def test_what_is_exported_is_valid(whole: tuple[str, Path]) -> None:
    result = sae("validate", whole[1])
    assert (result.code, result.stdout) == (0, f"{whole[1]} is as format {whole[0]} wants it\n")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def test_batches_hold_the_activations_of_the_tables(small: Small, tmp_path: Path) -> None:
    folder = exported(small, tmp_path, "saedashboard")
    batch = Batch.model_validate_json(only(folder, "batch-0.json").read_bytes())
    assert (batch.model_id, batch.layer, batch.sae_set) == ("tiny", 1, NAME)
    assert [feature.feature_index for feature in batch.features] == list(range(N_LATENTS))
    for feature in batch.features:
        acts = small.acts[:, :, feature.feature_index]
        check_feature(small, feature, acts[acts > 0], int((acts > 0).any(axis=1).sum()))
        for activation in feature.activations:
            (context,) = (
                context
                for context, tokens in enumerate(small.contexts)
                if [NASTY[token] for token in tokens] == activation.tokens
                and np.array_equal(acts[context, : len(tokens)], np.array(activation.values, np.float32))
            )
            assert activation.values[activation.qualifying_token_index] > 0
            if activation.bin_min == -1:
                assert max(activation.values) == acts[context].max()


def check_feature(small: Small, feature: Feature, positive: Any, n_contexts: int) -> None:
    assert feature.frac_nonzero == pytest.approx(len(positive) / small.n_tokens)
    assert sum(feature.freq_hist_data_bar_heights) == len(positive)
    top = [one for one in feature.activations if one.bin_min == -1]
    assert len(top) == min(n_contexts, EXAMPLES)
    assert {one.bin_max for one in top} <= {float(np.max(positive, initial=0))}
    for one in feature.activations[len(top) :]:
        act = one.values[one.qualifying_token_index]
        assert one.bin_min < act <= one.bin_max + 1e-6
        inside = (np.ceil(positive / BIN_WIDTH) > round(one.bin_min / BIN_WIDTH)) & (
            np.ceil(positive / BIN_WIDTH) <= round(one.bin_max / BIN_WIDTH)
        )
        assert one.bin_contains == pytest.approx(inside.mean())


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # As the importer reads them.
    blanked = text.decode().replace("\\u0000", " ").strip().split("\n")
    return [json.loads(line) for line in blanked]


def test_an_importer_that_blanks_nul_gets_every_token(small: Small, tmp_path: Path) -> None:
    folder = exported(small, tmp_path, "neuronpedia") / "tiny" / f"1-{NAME}"
    features = lines(folder / "features/batch-0.jsonl.gz")
    activations = lines(folder / "activations/batch-0.jsonl.gz")
    (source,), (set_,) = lines(folder / "source.jsonl"), lines(folder / "sourceset.jsonl")
    (model,), (release,) = lines(folder / "model.jsonl"), lines(folder / "release.jsonl")
    assert {row["layer"] for row in features + activations} == {source["id"]}
    assert {row["modelId"] for row in features + activations} == {model["id"]}
    assert (source["setName"], set_["releaseName"]) == (set_["name"], release["name"])
    assert [row["index"] for row in features] == [str(atom) for atom in range(N_LATENTS)]
    assert all(row.keys() == features[0].keys() for row in features), "columns are those of the first line"
    shown = {"␀" if token == "\0" else token for token in NASTY}
    assert {token for row in activations for token in row["tokens"]} == shown
    assert len({row["id"] for row in activations}) == len(activations)
    for row in activations:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])


@given(st.lists(st.text(st.sampled_from('\0\\u0 a\n"')), min_size=1))
def test_any_token_survives_the_importer(tokens: list[str]) -> None:
    texts = {"id": "c", "modelId": "m", "layer": "1-a", "index": "0", "creatorId": "c"}
    numbers = dict.fromkeys(("maxValue", "minValue", "binMin", "binMax", "binContains"), 0.0)
    places = {"maxValueTokenIndex": 0, "qualifyingTokenIndex": 0}
    row = rows.Activation.model_validate({"tokens": tokens, "values": [0.0], **texts, **numbers, **places})
    blanked = neuronpedia._lines([row]).decode().replace("\\u0000", " ")
    assert json.loads(blanked)["tokens"] == [token.replace("\0", "␀") for token in tokens]


def test_a_batch_of_atoms_that_never_fire_has_no_file_of_activations(small: Small, tmp_path: Path) -> None:
    folder = exported(small, tmp_path, "neuronpedia", atoms=(DEAD, DEAD))
    assert not list(folder.rglob("activations"))
    assert sae("validate", folder).code == 0
    exported(small, tmp_path, "neuronpedia")
    assert only(folder, "activations/*.gz").exists()
    exported(small, tmp_path, "neuronpedia", atoms=(DEAD, DEAD))
    assert not list(folder.rglob("activations/*.gz"))


def test_formats_do_not_mix_in_a_folder(small: Small, tmp_path: Path) -> None:
    exported(small, tmp_path, "openai", path="here")
    for format_ in ("site", "saedashboard"):
        with pytest.raises(ConfigError, match=rf"not a manifest of this version and of format {format_}"):
            exported(small, tmp_path, format_, path="here")


@pytest.mark.parametrize("format_", ["saedashboard", "neuronpedia"])
def test_a_second_export_writes_nothing(small: Small, tmp_path: Path, format_: str) -> None:
    folder = exported(small, tmp_path, format_)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    exported(small, tmp_path, format_)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


def test_a_page_holds_the_picked_atoms_and_nothing_from_elsewhere(small: Small, tmp_path: Path) -> None:
    page = exported(small, tmp_path, "html", pick=(6, 3)).read_bytes()
    files = html_page.embedded(page)
    atoms = pq.read_table(pa.BufferReader(files[f"{NAME}/atoms.parquet"]))["atom"].to_pylist()
    assert atoms == [3, 6]
    sequences = pq.ParquetFile(pa.BufferReader(files[f"{NAME}/sequences/0.parquet"]))
    assert [bool(sequences.read_row_group(atom).num_rows) for atom in range(N_LATENTS)] == [
        atom in (3, 6) for atom in range(N_LATENTS)
    ]
    manifest = Dictionary.model_validate_json(files[f"{NAME}/manifest.json"])
    assert (manifest.atoms, manifest.picked) == ((3, 6), [3, 6])
    text = page.decode()
    assert not re.search(r"<(script|link|img)[^>]*\s(src|href)=", text)
    assert text.count("<script") == text.count("</script>") == 2
    assert sae("validate", tmp_path / f"{NAME}.html").code == 0


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"pick": (N_LATENTS,)}, rf"export\.pick: got {N_LATENTS}; autoencoder {NAME} has atoms 0 to {N_LATENTS - 1}"),
        ({"atoms": (0, N_LATENTS)}, rf"export\.atoms: got 0 to {N_LATENTS}"),
    ],
)
def test_atoms_that_are_not_there_are_refused(small: Small, tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        exported(small, tmp_path, "html", **keys)
    assert not list(tmp_path.iterdir())


def test_atoms_of_a_range_are_not_picked(small: Small, tmp_path: Path) -> None:
    for keys in ({"atoms": (2, 4)}, {"pick": (4, 3, 2)}):
        files = html_page.embedded(exported(small, tmp_path, "html", **keys).read_bytes())
        manifest = Dictionary.model_validate_json(files[f"{NAME}/manifest.json"])
        assert (manifest.atoms, manifest.picked) == ((2, 4), [])


@pytest.mark.parametrize("format_", ["openai", "site", "saelens"])
def test_atoms_are_picked_for_one_page_only(small: Small, tmp_path: Path, format_: str) -> None:
    with pytest.raises(ConfigError, match=rf"^export\.pick: is for export\.format html; for {format_} give"):
        exported(small, tmp_path, format_, pick=(3,))
    assert not list(tmp_path.iterdir())


def test_a_page_may_begin_with_a_warning(small: Small, tmp_path: Path) -> None:
    files = html_page.embedded(exported(small, tmp_path, "html", warning="as people wrote it").read_bytes())
    assert Site.model_validate_json(files["site.json"]).warning == "as people wrote it"


def test_too_many_atoms_for_a_page_are_refused(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_page, "MOST_ATOMS", 5)
    with pytest.raises(ConfigError, match=r"html holds at most 5 atoms, 8 are asked for; give --export\.pick"):
        exported(small, tmp_path, "html")


def test_a_page_that_is_no_export_is_left_alone(small: Small, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"small\.html is there and no export"):
        exported(small, tmp_path, "html")
    assert (tmp_path / f"{NAME}.html").read_text() == "mine"


def test_an_unknown_format_is_told_in_one_line(small: Small, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(small.config.model_dump(mode="json", exclude={"autoencoders"})))
    result = sae("export", config, "--export.format", "csv")
    assert (result.code, len(result.lines)) == (1, 1)
    assert "export.format: got 'csv'; expected 'openai', 'site', 'html', 'saedashboard'" in result.stderr


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without(field: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        value = json.loads(path.read_text())
        del value[field]
        path.write_text(json.dumps(value))

    return damage


def with_nan(path: Path) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index("mean_act")
    pq.write_table(table.set_column(at, "mean_act", pa.array([math.nan] * len(table), pa.float32())), path)


def renamed(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["x" if name == "peak_tokens" else name for name in table.column_names]), path)


def one_group(path: Path) -> None:
    pq.write_table(pq.read_table(path), path)


def unzipped(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def interrupted(path: Path) -> None:
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))


def a_list(path: Path) -> None:
    path.write_text("[1]")


@pytest.mark.parametrize(
    ("format_", "file", "damage", "line"),
    [
        ("openai", "manifest.json", cut, r"manifest\.json: Invalid JSON"),
        ("saedashboard", "manifest.json", a_list, r"manifest\.json: Input should be an object"),
        ("openai", "*/3.json", cut, r"atoms/3\.json: Invalid JSON"),
        ("openai", "*/3.json", without("hist"), r"atoms/3\.json: hist: Field required"),
        ("openai", "*/3.json", Path.unlink, r"atoms/3\.json: is missing"),
        ("openai", "manifest.json", interrupted, r"manifest\.json: complete: is false; the export was interrupted"),
        ("openai", "manifest.json", without("hook"), r"manifest\.json: hook: Field required"),
        ("site", "atoms.parquet", cut, r"atoms\.parquet: damaged"),
        ("site", "atoms.parquet", renamed, r"atoms\.parquet: peak_tokens: missing, or not of the type"),
        ("site", "pages/0.parquet", with_nan, r"pages/0\.parquet: mean_act: is not finite"),
        ("site", "pages/0.parquet", Path.unlink, r"pages/0\.parquet: is missing"),
        ("site", "sequences/0.parquet", one_group, r"sequences/0\.parquet: has 1 row groups, expected 16"),
        ("site", "site.json", without("autoencoders"), r"site\.json: autoencoders: Field required"),
        ("saedashboard", "batch-0.json", without("layer"), r"batch-0\.json: layer: Field required"),
        ("saedashboard", "batch-0.json", Path.unlink, r"batch-0\.json: is missing"),
        ("neuronpedia", "features/batch-0.jsonl.gz", unzipped, r"features/batch-0\.jsonl\.gz: not gzip"),
        ("neuronpedia", "activations/batch-0.jsonl.gz", cut, r"activations/batch-0\.jsonl\.gz: not gzip"),
        ("neuronpedia", "source.jsonl", without("setName"), r"source\.jsonl: line 1: setName: Field required"),
    ],
)
def test_a_fault_is_told_by_file_and_field(
    small: Small, tmp_path: Path, format_: str, file: str, damage: Callable[[Path], None], line: str
) -> None:
    folder = exported(small, tmp_path / "out", format_)
    damage(only(folder, file))
    result = sae("validate", folder)
    assert (result.code, len(result.lines)) == (1, 1)
    assert re.search(line, result.stdout.splitlines()[0])


def test_a_damaged_page_is_told(small: Small, tmp_path: Path) -> None:
    page = exported(small, tmp_path, "html")
    page.write_text(page.read_text().replace("site-data", "other"))
    assert "not a page that sae export wrote" in sae("validate", page).stderr


def test_a_folder_without_an_export_is_told(tmp_path: Path) -> None:
    result = sae("validate", tmp_path)
    assert (result.code, len(result.lines)) == (1, 1)
    assert "holds nothing that sae export wrote" in result.stderr


@pytest.mark.parametrize(
    ("hook", "number"),
    [("blocks.8.hook_resid_post", 8), ("resid_post_mlp.12", 12), ("blocks.4.hook_resid_pre", 4), ("embed", 0)],
)
def test_the_layer_is_that_of_the_hook(hook: str, number: int) -> None:
    assert layer(hook) == number


@pytest.mark.parametrize(("name", "id_"), [("SmolLM2-135M", "SmolLM2-135M"), ("a b/ü.x", "a-b-x"), ("..", "x")])
def test_identifiers_are_letters_digits_and_dashes(name: str, id_: str) -> None:
    assert identifier(name) == id_


@pytest.mark.readers
@pytest.mark.skipif(importlib.util.find_spec("sae_dashboard") is None, reason="made by make test-readers")
def test_saedashboards_own_reader_takes_a_batch(small: Small, tmp_path: Path) -> None:
    reader = importlib.import_module("sae_dashboard.neuronpedia.neuronpedia_dashboard").NeuronpediaDashboardBatch
    value = json.loads(only(exported(small, tmp_path, "saedashboard"), "batch-0.json").read_bytes())
    assert reader(**value).to_dict() == value


def test_rows_have_the_columns_of_the_database() -> None:
    # Of the models of apps/webapp/prisma/schema.prisma that have no default.
    assert {"modelId", "layer", "index"} <= rows.Feature.model_fields.keys()
    needed = {
        "tokens",
        "index",
        "layer",
        "modelId",
        "maxValue",
        "maxValueTokenIndex",
        "minValue",
        "values",
        "creatorId",
    }
    assert needed <= rows.Activation.model_fields.keys()
    assert {"id", "creatorId", "layers", "neuronsPerLayer", "owner"} <= rows.Model.model_fields.keys()
    assert {"modelId", "name", "description", "creatorName", "creatorId"} <= rows.SourceSet.model_fields.keys()
    assert {"id", "modelId", "setName", "creatorId"} <= rows.Source.model_fields.keys()
    assert {"name", "description", "creatorName", "creatorId"} <= rows.Release.model_fields.keys()
