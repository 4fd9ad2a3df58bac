"""A site's files hold what the tables say, in the columns and row groups of the contract."""

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import export, site
from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports import folder, static_site
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from sae.schemas.site import ATOMS_PER_BLOCK, FILES, Dictionary, Site
from sae.schemas.tables import SCHEMAS as TABLES
from tests.lakes import BIN_WIDTH, CORPUS, DEAD, N_LATENTS, NAME, TOKENS, Small, small_lake

EVERY = (0, N_LATENTS - 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("site") / "lake")


def tables(small: Small) -> site.SiteTables:
    return site.SiteTables(AtomTables(small.lake, small.lake.snapshot(), NAME))


def exported(small: Small, target: Path, **keys: Any) -> Path:
    """The folder of the autoencoder in a site that is made there."""
    export.run(configured(small, target, **keys))
    return target / NAME


def configured(small: Small, target: Path, **keys: Any) -> Run:
    update = {"format": "site", "folder": str(target), "path": "{autoencoder}", **keys}
    return small.config.model_copy(update={"export": small.config.export.model_copy(update=update)})


def contents(folder_: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder_)): path.read_bytes() for path in folder_.rglob("*.parquet")}


def test_pages_hold_the_statistics_of_all_tokens(small: Small) -> None:
    for row in tables(small).pages(EVERY).to_pylist():
        acts = small.acts[:, :, row["atom"]].astype(np.float64)
        positive = acts[acts > 0]
        assert row["n_active"] == len(positive)
        assert row["density"] == pytest.approx(len(positive) / small.n_tokens)
        assert row["mean_act"] == pytest.approx(positive.sum() / small.n_tokens)
        assert dict(zip(row["hist_bin"], row["hist_n"], strict=True)) == Counter(np.ceil(positive / BIN_WIDTH))
        assert row["hist_bin"] == sorted(row["hist_bin"])
        assert (row["source"], row["source_share"]) == (([], []) if row["atom"] == DEAD else (["texts"], [1.0]))


def test_sequences_are_the_examples_with_all_activations_of_their_contexts(small: Small) -> None:
    rows = tables(small).sequences(EVERY).to_pylist()
    assert {row["atom"] for row in rows} == set(range(N_LATENTS)) - {DEAD}
    for row in rows:
        context = int(row["context_id"])
        acts = small.acts[context, :, row["atom"]]
        assert row["tokens"] == [TOKENS[token] for token in small.contexts[context]]
        assert row["pos"] == np.flatnonzero(acts).tolist()
        assert row["acts"] == acts[acts > 0].tolist()
        assert row["act"] == acts[row["idx"]]
        assert (row["doc_id"], row["corpus"], row["source"]) == (context, CORPUS, "texts")
        assert row["external_id"] == f"{context}.txt"
    places = [(row["atom"], row["kind"], row["rank"]) for row in rows]
    assert places == sorted(set(places))


def test_peak_tokens_are_those_on_which_top_examples_peak(small: Small) -> None:
    made = tables(small)
    top = [row for row in made.sequences(EVERY).to_pylist() if row["kind"] == "top"]
    for row in made.atoms(EVERY).to_pylist():
        peaks = Counter(one["tokens"][one["idx"]] for one in top if one["atom"] == row["atom"])
        assert len(row["peak_tokens"]) == len(set(row["peak_tokens"])) == min(5, len(peaks))
        assert [peaks[token] for token in row["peak_tokens"]] == [n for _, n in peaks.most_common(5)]


def test_sources_are_shares_of_an_atoms_activations(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake", seed=3)
    lake = small.lake
    documents = lake.read(lake.snapshot().select("documents"))
    source = pa.array([f"source {number % 3}" for number in range(len(documents))])
    with lake.transaction("tokenize") as transaction:
        transaction.remove(transaction.base.select("documents"))
        at = documents.schema.get_field_index("source")
        transaction.write(
            "documents", documents.set_column(at, documents.schema.field("source"), source), corpus=CORPUS
        )
    for row in tables(small).pages(EVERY).to_pylist():
        n = Counter(f"source {context % 3}" for context in np.nonzero(small.acts[:, :, row["atom"]])[0])
        shares = dict(zip(row["source"], row["source_share"], strict=True))
        assert shares == pytest.approx({name: count / n.total() for name, count in n.items()})
        assert row["source_share"] == sorted(row["source_share"], reverse=True)


VOTES = 2


def with_effects(small: Small, seed: int = 0) -> pa.Table:
    """Commits effects of half the examples, logits and neighbours, all drawn; returns the effects."""
    draw = np.random.default_rng(seed)
    examples = small.lake.read(small.lake.snapshot().select("examples")).select(["atom", "context_id", "pos", "act"])
    rows = (
        examples.group_by(["atom", "context_id", "pos"])
        .aggregate([("act", "min")])
        .rename_columns(examples.column_names)
    )
    rows = rows.filter(pa.array(draw.random(len(rows)) < 0.5))
    rows = rows.sort_by([(name, "ascending") for name in ("atom", "context_id", "pos")])
    columns = {name: rows[name] for name in rows.column_names}
    n_later = [
        len(small.contexts[context]) - 1 - pos
        for context, pos in zip(rows["context_id"].to_pylist(), rows["pos"].to_pylist(), strict=True)
    ]
    for name in TABLES["effects"].names[4:]:
        width = 1 if name in ("loss_diff", "kl") else VOTES
        if "tokens" in name:
            columns[name] = [draw.integers(0, len(TOKENS) + 2, width * n).tolist() for n in n_later]
        else:
            columns[name] = [draw.normal(size=width * n).tolist() for n in n_later]
    effects = pa.table(columns, schema=TABLES["effects"])
    ranked = [(atom, kind, rank) for atom in range(N_LATENTS) for kind in (0, 1) for rank in range(6)]
    atom, kind, rank = map(np.array, zip(*ranked, strict=True))
    shared = {"atom": atom, "rank": rank, "value": draw.normal(size=len(ranked))}
    with small.lake.transaction("effects") as transaction:
        logits = {"kind": np.array(["down", "up"])[kind], "token_id": rank + atom, **shared}
        neighbours = {"kind": np.array(["coactive", "near"])[kind], "neighbour": (atom + rank + 1) % 8, **shared}
        for table, values in (("logits", logits), ("neighbours", neighbours)):
            schema = TABLES[table]
            data = pa.table(
                [pa.array(values[name]).cast(schema.field(name).type) for name in schema.names], schema=schema
            )
            transaction.write(table, data, autoencoder=NAME)
        transaction.write("effects", effects, autoencoder=NAME)
        transaction.set(f"effects/{NAME}", {"votes": VOTES})
    return effects


def strings(token_ids: list[int]) -> list[str]:
    return [TOKENS[number] if number < len(TOKENS) else f"[token {number}]" for number in token_ids]


def test_effects_are_those_of_the_examples_that_have_some(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    known = {(row["atom"], row["context_id"], row["pos"]): row for row in with_effects(small).to_pylist()}
    made = tables(small)
    examples = {(row["atom"], row["kind"], row["rank"]): row for row in made.sequences(EVERY).to_pylist()}
    found = {(row["atom"], row["kind"], row["rank"]): row for row in made.effects(EVERY).to_pylist()}
    places = {key: (row["atom"], int(row["context_id"]), row["idx"]) for key, row in examples.items()}
    assert found.keys() == {key for key, place in places.items() if place in known}
    for key, row in found.items():
        effect = known[places[key]]
        for name in FILES["effects"].names[3:]:
            assert row[name] == (strings(effect[name]) if "tokens" in name else effect[name])
    for row in made.atoms(EVERY).to_pylist():
        values = [value for effect in known.values() if effect["atom"] == row["atom"] for value in effect["kl"]]
        assert row["effect_kl"] == (pytest.approx(np.mean(values), rel=1e-4, abs=1e-6) if values else None)


def test_pages_hold_logits_and_neighbours_in_order(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    with_effects(small)
    for row in tables(small).pages(EVERY).to_pylist():
        tokens = strings([row["atom"] + rank for rank in range(6)])
        assert (row["up_tokens"], row["down_tokens"]) == (tokens, tokens)
        assert row["near"] == row["coactive"] == [(row["atom"] + rank + 1) % 8 for rank in range(6)]
        assert len(row["up_logits"]) == len(row["near_cosine"]) == 6
    assert tables(small).atoms((3, 3))["logit_tokens"].to_pylist() == [TOKENS[3:8]]


def test_explanations_are_a_line_with_its_score_and_all_patterns(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    path = exported(small, tmp_path / "site")
    patterns = {1: [" a", "b[*]c", "[^]d", "last"], 2: [], 5: ["one"]}
    columns: dict[str, list[Any]] = {
        "atom": [*patterns],
        "patterns": [*patterns.values()],
        "acts": [[1.0] * len(each) for each in patterns.values()],
        "n_patterns": [*map(len, patterns.values())],
        "trie": ["{}"] * 3,
        "correlation": [0.25, None, None],
    }
    schema = TABLES["explanations"]
    with small.lake.transaction("explain") as transaction:
        full = {field.name: columns.get(field.name, [None if field.nullable else 0] * 3) for field in schema}
        transaction.write("explanations", pa.table(full, schema=schema), autoencoder=NAME)
    pages = {row["atom"]: row for row in tables(small).pages(EVERY).to_pylist()}
    assert {atom: row["patterns"] for atom, row in pages.items() if row["patterns"]} == {1: patterns[1], 5: ["one"]}
    assert (pages[1]["explanation"], pages[1]["explanation_score"]) == (" a | b[*]c | [^]d", 0.25)
    assert (pages[5]["explanation"], pages[5]["explanation_score"]) == ("one", None)
    assert pages[2]["explanation"] is pages[0]["explanation"] is None
    exported(small, tmp_path / "site")
    assert pq.read_table(path / "atoms.parquet")["explanation"].to_pylist()[5] == "one"


def test_new_effects_are_exported_by_a_second_command(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    path = exported(small, tmp_path / "site")
    assert Dictionary.model_validate_json((path / "manifest.json").read_bytes()).votes == 0
    with_effects(small)
    exported(small, tmp_path / "site")
    assert Dictionary.model_validate_json((path / "manifest.json").read_bytes()).votes == VOTES
    assert pq.read_table(path / "effects/0.parquet").num_rows > 0


def test_what_was_evaluated_since_is_exported_by_a_second_command(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    path = exported(small, tmp_path / "site")
    row = {"phase": ["evaluate"], "step": [1], "tokens": [5], "metric": ["fvu"], "value": [0.25]}
    with small.lake.transaction("evaluate") as transaction:
        transaction.write("metrics", pa.table(row, schema=TABLES["metrics"]), autoencoder=NAME)
    exported(small, tmp_path / "site")
    assert ("fvu", 0.25) in [
        (row["metric"], row["value"]) for row in pq.read_table(path / "metrics.parquet").to_pylist()
    ]


def test_each_atom_of_a_block_has_its_row_group(small: Small) -> None:
    data = site.parquet_of_atoms(tables(small).sequences(EVERY), 0)
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.num_row_groups == ATOMS_PER_BLOCK
    for atom in range(ATOMS_PER_BLOCK):
        found = set(file.read_row_group(atom)["atom"].to_pylist())
        assert found == ({atom} if atom < N_LATENTS and atom != DEAD else set())


def test_an_export_has_the_files_of_the_contract(small: Small, tmp_path: Path) -> None:
    path = exported(small, tmp_path)
    manifest = Dictionary.model_validate_json((path / "manifest.json").read_bytes())
    assert manifest.complete
    assert (manifest.autoencoder, manifest.atoms, manifest.votes) == (NAME, EVERY, 0)
    names = {"atoms.parquet", "metrics.parquet", "pages/0.parquet", "sequences/0.parquet", "effects/0.parquet"}
    assert contents(path).keys() == names
    for name, data in contents(path).items():
        schema = FILES[name.split("/")[0].removesuffix(".parquet")]
        assert pq.read_schema(io.BytesIO(data)).names == schema.names
    listed = Site.model_validate_json((tmp_path / "site.json").read_bytes())
    assert [(entry.name, entry.path) for entry in listed.autoencoders] == [(NAME, NAME)]
    assert (tmp_path / "index.html").exists(), "a host of files needs nothing else"


def test_a_range_that_cuts_blocks_gives_rows_of_its_atoms_only(small: Small, tmp_path: Path) -> None:
    whole, part = exported(small, tmp_path / "whole"), exported(small, tmp_path / "part", atoms=(2, 3))
    assert pq.read_table(part / "atoms.parquet")["atom"].to_pylist() == [2, 3]
    for atom in range(ATOMS_PER_BLOCK):
        of_part, of_whole = (
            pq.ParquetFile(path / "sequences/0.parquet").read_row_group(atom) for path in (part, whole)
        )
        assert of_part == (of_whole if atom in (2, 3) else of_whole.slice(0, 0))


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_no_block_is_cut_by_what_is_made_at_once(first: int, n_more: int) -> None:
    atoms = first, first + n_more
    parts = [
        part
        for task in folder.cut(atoms, folder.ATOMS_PER_TASK)
        for part in folder.cut(task, static_site.FORMAT.at_once)
    ]
    blocks = [number for part in parts for number in site.blocks(part)]
    assert blocks == list(site.blocks(atoms))
    assert [part[0] for part in parts[1:]] == [part[1] + 1 for part in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == atoms


def test_a_second_export_writes_nothing_and_another_autoencoder_joins(small: Small, tmp_path: Path) -> None:
    path = exported(small, tmp_path / "site")
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    exported(small, tmp_path / "site")
    assert times == {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    other = small_lake(tmp_path / "lake", seed=1, name="another")
    export.run(configured(other, tmp_path / "site"))
    listed = json.loads((tmp_path / "site/site.json").read_text())["autoencoders"]
    assert [entry["name"] for entry in listed] == ["another", NAME]


def test_a_warning_stays_until_another_one_is_given(small: Small, tmp_path: Path) -> None:
    def told() -> str | None:
        return Site.model_validate_json((tmp_path / "site.json").read_bytes()).warning

    exported(small, tmp_path)
    assert told() is None
    exported(small, tmp_path, warning="as people wrote it")
    exported(small, tmp_path)
    assert told() == "as people wrote it"
    exported(small, tmp_path, warning="")
    assert told() is None


def test_a_folder_of_another_format_is_refused(small: Small, tmp_path: Path) -> None:
    export.run(configured(small, tmp_path, format="openai"))
    with pytest.raises(ConfigError, match=r"not a manifest of this version and of format site; give another folder"):
        exported(small, tmp_path)


def test_rare_values_are_finite_in_javascript(small: Small) -> None:
    for row in tables(small).atoms(EVERY).to_pylist():
        assert all(value is None or math.isfinite(value) for value in row.values() if isinstance(value, float | None))
