"""Parts of a lake that are dropped: gone from every table, not missing then, and back only where that is meant."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.jobs import aggregate, compact, contexts, drop, encode, formats
from sae.jobs.harvest import Harvester
from sae.jobs.lake import Lake, connect
from sae.jobs.runs import outstanding
from sae.schemas.errors import ConflictError, IncompleteError, LakeError
from sae.statistics import SortedRun
from tests import lakes, tiny_run
from tests.in_process import harvest_all, run_of
from tests.lakes import CONTEXTS_PER_RUN, CORPUS, NAME, Small, small_config, small_lake, train
from tests.object_stores import serve
from tests.tiny_run import Lab, rows, sae

STATISTICS = {
    "moments": "run, atom, n_active, sum_act, sum_act2, sum_act3, sum_act4, max_act",
    "histograms": "run, atom, bin, n",
    "top": "run, atom, context_id, pos, act",
    "samples": "run, atom, context_id, pos, act",
    "atoms": "*",
    "examples": "*",
    "latents": "atom, context_id, pos, act",
    "runs": "run, n_tokens",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("pristine") / "lake")


@pytest.fixture
def small(pristine: Small, tmp_path: Path) -> Small:
    return pristine.copy(tmp_path / "lake")


def dropped(small: Small, *what: object) -> str:
    """What `sae drop` says."""
    result = sae("drop", small.config.lake, *map(str, what))
    assert result.code == 0, result.stderr
    return result.stderr


def refused(small: Small, *what: object) -> str:
    """The one line of a `sae drop` that does nothing."""
    before = small.lake.snapshot().version
    result = sae("drop", small.config.lake, *map(str, what))
    assert (result.code, len(result.lines), small.lake.snapshot().version) == (1, 1, before), result.stderr
    return result.lines[0].removeprefix("error: ")


def tables(small: Small, version: int | None = None) -> dict[str, Any]:
    connection = connect(small.config.lake, version)
    return {
        table: connection.sql(f"select {columns} from {table} order by all").fetchall()
        for table, columns in STATISTICS.items()
    }


def status(small: Small) -> list[str]:
    return sae("status", small.config.lake).stdout.splitlines()


def merge_runs(small: Small) -> None:
    files = small.lake.snapshot().select("latents")
    compact.merge_sets(small.lake, NAME, compact.sorted_sets(files), 40)
    assert all(file.run is None for file in small.lake.snapshot().select("latents"))


def encode_again(small: Small) -> list[int]:
    """Encodes what is missing, as the step does it; returns the runs."""
    snapshot = small.lake.snapshot()
    encoding = snapshot.properties[f"encode/{NAME}"]
    plan, missing = outstanding(snapshot, "encode", NAME, CORPUS, encoding["run_tokens"])
    for run in missing:
        held = contexts.load(small.lake, CORPUS, plan.bounds(run))
        at, pos, atom = np.nonzero(small.acts[held.context_id])
        context = held.context_id[at]
        latents = SortedRun.from_rows(
            atom.astype(np.int32), context, pos.astype(np.uint16), small.acts[context, pos, atom]
        )
        tokens = int(held.kept_tokens((0,)).sum())
        encode.commit_run(small.lake, NAME, CORPUS, encoding, plan, run, latents, tokens)
    return missing


def without(folder: Path, small: Small, gone: list[int]) -> Small:
    """The lake that never held some contexts: the same but for their activations, tokens and rows."""
    other = small.copy(folder)
    with other.lake.transaction("test") as transaction:
        snapshot = transaction.base
        transaction.remove(file for file in snapshot.files.values() if file.autoencoder and file.run is not None)
        transaction.forget(unit for unit in snapshot.units if unit.startswith("encode/"))
        for file in snapshot.select("contexts"):
            rows = other.lake.read([file])
            transaction.remove([file])
            left = rows.filter(~np.isin(rows["context_id"], gone))
            transaction.write("contexts", left, corpus=CORPUS)
            n_contexts = int(left["context_id"].to_numpy().max()) + 1
            transaction.set(f"corpus/{CORPUS}", {**snapshot.properties[f"corpus/{CORPUS}"], "n_contexts": n_contexts})
    encode_again(other)
    return other


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("gone", [range(3, 5), range(6, 18), range(8, 16), range(14, 20), range(1)])
def test_statistics_without_contexts_are_those_of_a_lake_that_never_held_them(
    small: Small, tmp_path: Path, merged: bool, gone: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats._ROW_GROUP, "latents", 8)
    other = without(tmp_path / "other", small, list(gone))
    if merged:
        merge_runs(small)
    before, version = tables(small), small.lake.snapshot().version
    n_rows = len(before["latents"]) - len(tables(other)["latents"])
    said = dropped(small, "--contexts", f"{gone[0]}:{gone[-1]}")
    assert said.startswith(f"drop: {len(gone)} contexts ({n_rows} rows of latents), for good; sae aggregate makes ")
    aggregate.run(small.config)
    aggregate.run(other.config)
    expected = tables(other)
    # Runs of which nothing is left are no runs.
    ends = {
        run for run in range(3) if {*range(run * CONTEXTS_PER_RUN, min(20, (run + 1) * CONTEXTS_PER_RUN))} <= {*gone}
    }
    expected["runs"] = [row for row in expected["runs"] if row[0] not in ends]
    assert tables(small) == expected
    left = [len(tokens) for context, tokens in enumerate(small.contexts) if context not in gone]
    corpora = connect(small.config.lake).sql("select n_documents, n_contexts, n_tokens from corpora").fetchall()
    assert corpora == [(len(left), len(left), sum(left))]
    shown = connect(small.config.lake).sql("select (select count(*) from contexts), (select count(*) from documents)")
    assert shown.fetchall() == [(len(left), len(left))]
    assert tables(small, version) == before
    # They don't come back, and nothing is missing.
    assert encode_again(small) == []
    assert status(small)[-1] == "unfinished: nothing"
    assert f"dropped: {len(gone)} contexts of {CORPUS}" in status(small)


@pytest.mark.parametrize("merged", [False, True])
def test_a_dropped_run_is_not_missing_and_can_be_encoded_again(small: Small, merged: bool) -> None:
    if merged:
        merge_runs(small)
    before, version = tables(small), small.lake.snapshot().version
    said = dropped(small, "--latents", NAME, "--run", f"{CORPUS}/1")
    n_rows = int((small.acts[8:16] > 0).sum())
    assert said == (
        f"drop: run {CORPUS}/1 of {NAME} ({n_rows} rows); sae encode makes it again; sae aggregate makes the atoms of "
        f"{NAME} anew, sae gc {small.config.lake} frees the space\n"
    )
    assert status(small)[-1] == f"unfinished: aggregate of {NAME}"
    assert f"dropped: runs 1 of {CORPUS} by {NAME}" in status(small)
    aggregate.run(small.config)
    assert status(small)[-1] == "unfinished: nothing"
    shown = tables(small)
    for table in ("moments", "histograms", "top", "samples", "runs"):
        assert shown[table] == [row for row in before[table] if row[0] != 1]
    assert shown["latents"] == [row for row in before["latents"] if not 8 <= row[1] < 16]
    assert {row[3] for row in shown["atoms"]} == {
        sum(len(small.contexts[at]) - 1 for at in range(20) if not 8 <= at < 16)
    }
    assert tables(small, version) == before
    assert encode_again(small) == [1]
    aggregate.run(small.config)
    assert tables(small) == before
    assert not any(line.startswith("dropped") for line in status(small))
    assert sae("verify", small.config.lake).code == 0


def test_what_was_dropped_is_freed(small: Small) -> None:
    merge_runs(small)
    dropped(small, "--contexts", "3:4")
    aggregate.run(small.config)
    sae("gc", small.config.lake, "--older-than", "0")
    files = {str(path.relative_to(small.config.lake)) for path in Path(small.config.lake).rglob("*.parquet")}
    assert files == {path for path in small.lake.snapshot().files if path.endswith(".parquet")}
    # Not a row of theirs is in any file.
    for file in small.lake.snapshot().files.values():
        if file.table in ("contexts", "latents", "top", "samples", "examples"):
            assert not np.isin(small.lake.read([file])["context_id"], [3, 4]).any()


def test_a_run_of_another_autoencoder_stays(small: Small) -> None:
    other = Small(small_config(Path(small.config.lake), "other"), small.contexts, small.acts)
    train(small.lake, other.config)
    lakes.encode(other, 1)
    before = small.lake.snapshot().select("latents", autoencoder="other")
    dropped(small, "--latents", NAME, "--corpus", CORPUS)
    assert f"dropped: runs 0-2 of {CORPUS} by {NAME}" in status(small)
    assert small.lake.snapshot().select("latents", autoencoder="other") == before
    assert small.lake.snapshot().select("latents", autoencoder=NAME) == []
    assert (
        status(small)[-1] == f"unfinished: encode of {CORPUS} with other (2 of 3 runs are missing); aggregate of other"
    )
    with pytest.raises(IncompleteError, match="run sae encode first"):
        aggregate.run(small.config)
    dropped(small, "--corpus", CORPUS)
    assert small.lake.snapshot().select("latents") == []


def test_a_corpus_with_its_text_leaves_the_autoencoder(small: Small) -> None:
    assert "(" in dropped(small, "--corpus", CORPUS, "--with-text")
    snapshot = small.lake.snapshot()
    assert {file.table for file in snapshot.files.values()} <= {"checkpoints", "training_states", "decoders"}
    assert not any(CORPUS in unit.split("/") for unit in snapshot.units)
    assert set(snapshot.properties) == {f"autoencoder/{NAME}", f"encode/{NAME}", f"decoders/{NAME}"}
    assert status(small)[-1] == "unfinished: nothing"


def test_a_document_goes_with_its_contexts(small: Small) -> None:
    dropped(small, "--doc", 7)
    connection = connect(small.config.lake)
    for table, key in (
        ("documents", "doc_id"),
        ("contexts", "doc_id"),
        ("latents", "context_id"),
        ("top", "context_id"),
    ):
        assert connection.sql(f"select count(*) from {table} where {key} = 7").fetchall() == [(0,)]
    assert connection.sql("select count(*) from documents").fetchall() == [(19,)]


def test_a_document_stays_while_a_context_of_it_does(small: Small) -> None:
    lake = small.lake
    (file,) = lake.snapshot().select("contexts")
    rows = lake.read([file])
    with lake.transaction("test") as transaction:
        transaction.remove([file])
        halves = rows.set_column(1, rows.schema.field("doc_id"), [rows["context_id"].to_numpy() // 2])
        transaction.write("contexts", halves, corpus=CORPUS)
    dropped(small, "--contexts", "3:6")
    gone = connect(small.config.lake).sql("select doc_id from range(20) t(doc_id) anti join documents using (doc_id)")
    assert gone.order("doc_id").fetchall() == [(2,)]


def test_cached_activations_go_too(small: Small) -> None:
    lake = small.lake
    ids, pos = np.repeat(np.arange(8), 2), np.tile(np.arange(2, dtype=np.uint16), 8)
    vectors = np.arange(32, dtype=np.float16).reshape(16, 2)
    named = {"corpus": CORPUS, "subject": "subject", "run": 0, "rows": 16, "tokens": 16, "contexts": (0, 7)}
    with lake.transaction("harvest", f"harvest/subject/{CORPUS}/0") as transaction:
        transaction.write_with(
            "activations", "arrow", lambda path: formats.write_vectors(ids, pos, vectors, path), **named
        )
    dropped(small, "--contexts", "2:3")
    (file,) = lake.snapshot().select("activations")
    assert (file.rows, file.tokens, file.contexts, file.run) == (12, 12, (0, 7), 0)
    kept = (ids < 2) | (ids > 3)
    with lake.local(file) as path:
        found = formats.map_vectors(path)
        assert formats.map_positions(path).tolist() == pos[kept].tolist()
    assert found[0].tolist() == ids[kept].tolist()
    np.testing.assert_array_equal(found[1], vectors[kept])
    dropped(small, "--contexts", "0:7")
    assert lake.snapshot().select("activations") == []


def test_a_run_that_was_read_before_its_contexts_were_dropped_is_refused(small: Small) -> None:
    dropped(small, "--latents", NAME, "--run", f"{CORPUS}/0")
    snapshot = small.lake.snapshot()
    encoding = snapshot.properties[f"encode/{NAME}"]
    plan, _ = outstanding(snapshot, "encode", NAME, CORPUS, encoding["run_tokens"])
    dropped(small, "--contexts", "3:4")
    nothing = SortedRun.from_rows(*(np.empty(0, kind) for kind in (np.int32, np.int64, np.uint16, np.float32)))
    with pytest.raises(LakeError, match=f"contexts of {CORPUS} were dropped meanwhile; run sae encode again"):
        encode.commit_run(small.lake, NAME, CORPUS, encoding, plan, 0, nothing, 1)
    assert encode_again(small) == [0]


def test_contexts_that_go_while_their_run_is_written_stay_away(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped(small, "--latents", NAME, "--run", f"{CORPUS}/0")
    write = encode.write_tables

    def meanwhile(*given: Any) -> None:
        monkeypatch.undo()
        dropped(small, "--contexts", "3:4")
        write(*given)

    monkeypatch.setattr(encode, "write_tables", meanwhile)
    with pytest.raises(ConflictError, match=f"corpus/{CORPUS}: changed by another writer meanwhile"):
        encode_again(small)
    assert encode_again(small) == [0]
    assert not {3, 4} & {row[1] for row in tables(small)["latents"]}


def test_a_run_that_comes_while_its_contexts_go_is_a_conflict(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped(small, "--latents", NAME, "--run", f"{CORPUS}/0")
    taken = drop._take_text

    def meanwhile(*given: Any) -> Any:
        assert encode_again(small) == [0]
        return taken(*given)

    monkeypatch.setattr(drop, "_take_text", meanwhile)
    before = {path: path.stat().st_mtime for path in Path(small.config.lake).rglob("*.parquet")}
    with pytest.raises(
        ConflictError, match=f"corpus {CORPUS}: added to by another writer meanwhile; run the step again"
    ):
        drop.text(Lake(small.config.lake), CORPUS, (3, 4))
    assert set(before) < set(Path(small.config.lake).rglob("*.parquet"))
    monkeypatch.undo()
    drop.text(small.lake, CORPUS, (3, 4))
    assert not {3, 4} & {row[1] for row in tables(small)["latents"]}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ((), "drop: got nothing; give one of: --latents AUTOENCODER; --latents AUTOENCODER --run CORPUS/NUMBER; "),
        (("--run", "texts/1"), "drop: got --run; give one of: "),
        (("--latents", NAME, "--with-text"), "drop: got --latents --with-text; give one of: "),
        (("--contexts", "0:1", "--corpus", CORPUS), "drop: got --corpus --contexts; give one of: "),
        (("--latents", "x", "--run", "texts/1"), f"--latents: no latents of x in this lake; it has: {NAME}"),
        (("--latents", NAME, "--run", "1"), "--run: got 1; expected CORPUS/NUMBER"),
        (("--latents", NAME, "--run", "x/1"), f"--run: no corpus x in this lake; it has: {CORPUS}"),
        (("--latents", NAME, "--run", "texts/9"), f"run texts/9: no latents of it by {NAME} in this lake"),
        (("--corpus", "x"), f"--corpus: no corpus x in this lake; it has: {CORPUS}"),
        (("--contexts", "5"), "--contexts: got 5; expected FIRST:LAST"),
        (("--contexts", "5:3"), "--contexts: got 5:3; expected FIRST:LAST"),
        (("--contexts", "5:99"), f"--contexts: got 5:99; corpus {CORPUS} has the contexts 0:19"),
        (("--contexts", f"{1 << 40}:{1 << 40}"), f"--contexts: no corpus has context {1 << 40}; "),
        (("--contexts", "0:19"), f"drop: that is all of corpus {CORPUS}; give --corpus {CORPUS} --with-text"),
        (("--doc", "20"), "--doc: no contexts of a document 20; "),
        (("--doc", f"{1 << 40}"), f"--doc: no contexts of a document {1 << 40}; "),
    ],
)
def test_what_cannot_be_dropped_is_told_in_one_line(small: Small, what: tuple[str, ...], said: str) -> None:
    assert refused(small, *what).startswith(said)


def test_the_steps_go_on_with_what_is_left(finished: Lab, no_ray: None, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    assert sae("drop", lab.lake, "--latents", tiny_run.NAME, "--run", f"{tiny_run.CORPUS}/1").code == 0
    assert sae("drop", lab.lake, "--doc", "2").code == 0
    ((first, last),) = (
        connect(str(finished.lake))
        .sql("select min(context_id), max(context_id) from contexts where doc_id = 2")
        .fetchall()
    )
    lab.done("tokenize")
    lab.done("encode")
    lab.done("aggregate")
    before = rows(finished.lake, "latents")
    assert rows(lab.lake, "latents") == [row for row in before if not first <= row[2] <= last]
    assert sae("status", lab.lake).stdout.splitlines()[-1] == "unfinished: nothing"


def test_activations_that_were_read_before_their_contexts_were_dropped_are_refused(
    tokenized: Lab, tmp_path: Path
) -> None:
    lab = tokenized.copy(tmp_path)
    config, lake = run_of(lab), Lake(str(lab.lake))
    plan, _ = outstanding(lake.snapshot(), "harvest", "x", tiny_run.CORPUS, config.encode.run_tokens)
    harvester = Harvester(config, config.encode.run_tokens, plan, 1)
    drop.text(lake, tiny_run.CORPUS, (3, 4))
    with pytest.raises(LakeError, match="were dropped meanwhile; run sae harvest again"):
        harvester({"run": [0]})
    harvest_all(lab)
    (file, *_) = lake.snapshot().select("activations")
    with lake.local(file) as path:
        assert not np.isin(formats.map_vectors(path)[0], [3, 4]).any()


def test_a_lake_in_an_object_store_drops_the_same(small: Small) -> None:
    with serve("s3") as put:
        for path in Path(small.config.lake).rglob("*"):
            if path.is_file():
                url = put(f"lake/{path.relative_to(small.config.lake)}", path.read_bytes())
        remote = Lake(url.partition("/lake/")[0] + "/lake")
        found = []
        for lake in (remote, small.lake):
            files = compact.sorted_sets(lake.snapshot().select("latents"))
            compact.merge_sets(lake, NAME, files, 10**6)
            drop.text(lake, CORPUS, (6, 17))
            aggregate.merge(lake, NAME)
            connection = connect(lake.path)
            found.append([connection.sql(f"from {table} order by all").fetchall() for table in STATISTICS])
    assert found[0] == found[1]
