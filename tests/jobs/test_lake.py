"""The commit protocol: a commit is seen whole or not at all, whoever writes at the same time or dies while writing."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import storage, views
from sae.jobs.lake import Lake, connect, write_views
from sae.schemas.errors import ConflictError, LakeError, SaeError, StorageError
from sae.schemas.tables import SCHEMAS


def latents(*rows: tuple[int, int, int, float]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * 4
    schema = SCHEMAS["latents"]
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
    )


def add(lake: Lake, run: int, unit: str | None = None) -> None:
    """Commits one run that holds its own number as the only atom."""
    with lake.transaction("encode", unit) as transaction:
        transaction.write("latents", latents((run, run, 0, 1.0)), autoencoder="a", corpus="c", run=run, tokens=1)


def atoms(lake: Lake) -> list[int]:
    found = connect(lake.path).execute("select atom from latents order by atom").fetchall()
    return [atom for (atom,) in found]


def on_disk(lake: Lake) -> set[str]:
    """Every file of the lake's folder but its log and views."""
    root = Path(lake.path)
    paths = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {path for path in paths if path != "views.sql" and not path.endswith(".json")}


def log(lake: Lake) -> list[Path]:
    return sorted(Path(lake.path, "_log").glob("*.json"))


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake(str(tmp_path / "lake"), create=True)
    add(lake, 0, "encode/a/c/0")
    return lake


def run_python(script: str, lake: Lake) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own; `lake`, `add` and `latents` are there."""
    head = f"from tests.jobs.test_lake import add, latents; from sae.jobs.lake import Lake; lake = Lake({lake.path!r})"
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", f"{head}\n{script}"], cwd=root, capture_output=True, text=True)


# Commit


@pytest.mark.parametrize("earlier", [None, 100.0])
def test_an_entry_tells_from_when_to_when_the_work_took(lake: Lake, earlier: float | None) -> None:
    start = time.time()
    given = {} if earlier is None else {"began": start - earlier}
    with lake.transaction("encode", "encode/a/c/1", **given):
        pass
    entry = lake.log.entry(1)
    assert entry is not None
    began, ended = entry["span"]
    assert began == pytest.approx(start - (earlier or 0.0), abs=60)
    assert start - 0.001 <= ended <= time.time() + 0.001


def test_files_and_properties_are_seen_together_after_the_commit_only(lake: Lake) -> None:
    with lake.transaction("encode", "encode/a/c/1") as transaction:
        transaction.write("latents", latents((1, 1, 0, 1.0)), autoencoder="a", corpus="c", run=1)
        transaction.write("latents", latents((2, 1, 0, 1.0)), autoencoder="a", corpus="c", run=1)
        transaction.set("setting/a", {"seed": 1})
        assert atoms(lake) == [0]
        assert "setting/a" not in Lake(lake.path).snapshot().properties
    assert atoms(lake) == [0, 1, 2]
    assert Lake(lake.path).snapshot().properties["setting/a"] == {"seed": 1}
    assert "encode/a/c/1" in Lake(lake.path).snapshot().units


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt()])
def test_an_exception_leaves_the_lake_as_it_was(lake: Lake, error: BaseException) -> None:
    before, version = on_disk(lake), lake.snapshot().version
    with pytest.raises(type(error)), lake.transaction("encode") as transaction:  # noqa: PT012
        transaction.write("latents", latents((1, 1, 0, 1.0)))
        raise error
    assert on_disk(lake) == before
    assert lake.snapshot().version == version


def test_an_exception_while_a_file_is_written_leaves_no_part_of_it(lake: Lake) -> None:
    def broken(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise ValueError

    before = on_disk(lake)
    with pytest.raises(ValueError), lake.transaction("train") as transaction:  # noqa: PT011
        transaction.write_with("checkpoints", "safetensors", broken)
    assert on_disk(lake) == before


def test_an_interrupt_right_after_the_entry_is_linked_keeps_what_it_names(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C can come at any instruction: this one while the log's folder is brought to disk."""
    sync = storage._sync

    def interrupted(path: str) -> None:
        if path.endswith("_log"):
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(storage, "_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add(lake, 1)
    monkeypatch.undo()
    assert atoms(Lake(lake.path)) == [0, 1]


def test_an_interrupt_right_before_the_entry_is_linked_leaves_nothing(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = on_disk(lake)

    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add(lake, 1)
    monkeypatch.undo()
    assert on_disk(lake) == before
    assert atoms(Lake(lake.path)) == [0]


def test_a_file_tells_its_rows_ranges_and_size(lake: Lake) -> None:
    with lake.transaction("encode") as transaction:
        batches = [latents((3, 10, 0, 1.0), (3, 11, 2, 1.0)), latents((7, 9, 0, 1.0))]
        file = transaction.write("latents", batches, autoencoder="a", tokens=5)
    assert (file.rows, file.atoms, file.contexts, file.tokens) == (3, (3, 7), (9, 11), 5)
    assert Path(lake.absolute(file)).stat().st_size == file.bytes
    assert Lake(lake.path).snapshot().files[file.path] == file


def test_a_removed_file_stays_for_readers_of_older_versions(lake: Lake) -> None:
    version = lake.snapshot().version
    with lake.transaction("compact") as transaction:
        transaction.remove(lake.snapshot().select("latents"))
        transaction.write("latents", latents((5, 0, 0, 1.0)), autoencoder="a")
    assert atoms(lake) == [5]
    assert connect(lake.path, version).execute("select atom from latents").fetchall() == [(0,)]
    assert lake.snapshot(version).files.keys() != lake.snapshot().files.keys()


def test_properties_are_deleted_and_units_forgotten(lake: Lake) -> None:
    with lake.transaction("encode") as transaction:
        transaction.set("setting/a", 1)
    with lake.transaction("drop") as transaction:
        transaction.set("setting/a", None)
        transaction.forget(["encode/a/c/0"])
    assert "setting/a" not in lake.snapshot().properties
    assert lake.snapshot().units == frozenset()
    add(lake, 9, "encode/a/c/0")
    assert atoms(lake) == [0, 9]


# Writers at the same time


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=2, max_size=4))
def test_each_unit_lands_exactly_once_whoever_writes_it(
    tmp_path_factory: pytest.TempPathFactory, plans: list[list[int]]
) -> None:
    path = str(tmp_path_factory.mktemp("lake"))

    def work(plan: list[int]) -> int:
        lake, refused = Lake(path, create=True), 0
        for run in plan:
            try:
                add(lake, run, f"encode/a/c/{run}")
            except ConflictError:
                refused += 1
        return refused

    with ThreadPoolExecutor(len(plans)) as pool:
        refused = sum(pool.map(work, plans))
    wanted = {run for plan in plans for run in plan}
    lake = Lake(path, create=True)
    snapshot = lake.snapshot()
    assert snapshot.units == {f"encode/a/c/{run}" for run in wanted}
    assert refused == sum(map(len, plans)) - len(wanted)
    assert snapshot.version == len(wanted) - 1
    assert on_disk(lake) == set(snapshot.files)
    assert sorted(file.run for file in snapshot.files.values() if file.run is not None) == sorted(wanted)


def test_two_processes_commit_at_the_same_time_and_all_of_it_lands(lake: Lake) -> None:
    scripts = [f"for run in range({start}, {start + 12}): add(lake, run, f'encode/a/c/{{run}}')" for start in (1, 13)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda script: run_python(script, lake), scripts))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert atoms(lake) == list(range(25))
    assert [path.name for path in log(lake)] == [f"{version:020d}.json" for version in range(25)]


def test_threads_share_a_lake(lake: Lake) -> None:
    def commits(thread: int) -> None:
        for number in range(20):
            with lake.transaction("t", f"{thread}/{number}") as transaction:
                transaction.set(f"p{thread}", number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(commits, range(6)))
    seen = lake.snapshot()
    assert seen == Lake(lake.path).snapshot()
    assert seen.units >= {f"{thread}/{number}" for thread in range(6) for number in range(20)}
    assert {seen.properties[f"p{thread}"] for thread in range(6)} == {19}


def test_a_unit_is_committed_once_and_the_loser_leaves_no_file(lake: Lake) -> None:
    before, version = on_disk(lake), lake.snapshot().version
    with pytest.raises(ConflictError, match="encode/a/c/0: already committed by another writer"):
        add(lake, 1, "encode/a/c/0")
    assert on_disk(lake) == before
    assert lake.snapshot().version == version


def test_a_property_that_another_writer_changed_is_a_conflict(lake: Lake) -> None:
    def both() -> None:
        with lake.transaction("train") as mine:
            with Lake(lake.path).transaction("train") as theirs:
                theirs.set("setting/a", {"seed": 1})
            mine.set("setting/a", {"seed": 2})

    with pytest.raises(ConflictError, match="setting/a: changed by another writer"):
        both()
    assert lake.snapshot().properties["setting/a"] == {"seed": 1}


def test_two_writers_may_set_a_property_to_the_same_value(lake: Lake) -> None:
    with lake.transaction("encode") as mine:
        with Lake(lake.path).transaction("encode") as theirs:
            theirs.set("setting/a", {"seed": 1})
        mine.set("setting/a", {"seed": 1})
    assert lake.snapshot().properties["setting/a"] == {"seed": 1}


def test_a_file_that_two_writers_remove_is_a_conflict(lake: Lake) -> None:
    def both() -> None:
        files = lake.snapshot().select("latents")
        with lake.transaction("compact") as mine:
            with Lake(lake.path).transaction("compact") as theirs:
                theirs.remove(files)
                theirs.write("latents", latents((1, 0, 0, 1.0)), autoencoder="a")
            mine.remove(files)
            mine.write("latents", latents((2, 0, 0, 1.0)), autoencoder="a")

    with pytest.raises(ConflictError, match="removed by another writer"):
        both()
    assert atoms(lake) == [1]


def test_what_a_transaction_requires_is_asked_of_the_version_that_it_follows(lake: Lake) -> None:
    def while_another_adds() -> None:
        with lake.transaction("drop") as mine:
            known = set(mine.base.files)
            mine.require(lambda now: set(now.files) == known, "latents: added to")
            mine.write("latents", latents((1, 0, 0, 1.0)), autoencoder="a")
            add(Lake(lake.path), 7)

    with pytest.raises(ConflictError, match=r"^latents: added to by another writer meanwhile; run the step again$"):
        while_another_adds()
    assert on_disk(lake) == set(lake.snapshot().files)


def test_a_reader_of_what_was_the_newest_version_a_moment_ago_keeps_its_files(lake: Lake) -> None:
    reader = connect(lake.path)
    (old,) = lake.snapshot().select("latents")
    # Written long ago, replaced just now.
    os.utime(lake.absolute(old), (0, 0))
    with lake.transaction("compact") as transaction:
        transaction.remove([old])
    assert lake.collect_garbage(older_than_s=3600) == []
    assert reader.sql("select count(*) from latents").fetchall() == [(old.rows,)]
    assert lake.collect_garbage(older_than_s=0) == [old.path]


# Writers that die

KILL = "import os, signal; die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("script", "orphans"),
    [
        ("with lake.transaction('t') as t: t.write('latents', latents((1, 1, 0, 1.0))); die()", 1),
        (
            "with lake.transaction('t') as t: t.write_with('latents', 'x', lambda p: (open(p, 'w').close(), die()))",
            1,
        ),
        ("os.link = die; add(lake, 1)", 2),
    ],
    ids=["between file and log", "while a file is written", "while the log entry is written"],
)
def test_what_a_killed_writer_left_is_not_seen_and_is_collected(lake: Lake, script: str, orphans: int) -> None:
    before = on_disk(lake)
    assert run_python(f"{KILL}\n{script}", lake).returncode == -signal.SIGKILL
    assert atoms(lake) == [0]
    left = on_disk(lake) - before
    assert len(left) == orphans
    assert lake.collect_garbage(older_than_s=3600) == []
    assert set(lake.collect_garbage(older_than_s=0)) == left
    assert on_disk(lake) == before
    add(lake, 1, "encode/a/c/1")
    assert atoms(lake) == [0, 1]


def test_files_that_are_not_the_lakes_are_never_collected(lake: Lake) -> None:
    foreign = ["notes.txt", "texts/speech.txt", "viewer/atoms/0.json", "tensorboard/a/events.out", ".git/config"]
    for name in foreign:
        path = Path(lake.path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    write_views(lake)
    assert lake.collect_garbage(older_than_s=0) == []
    assert all(Path(lake.path, name).exists() for name in foreign)
    assert atoms(lake) == [0]


# Damaged and foreign lakes


def test_a_lake_of_a_newer_format_is_refused(lake: Lake) -> None:
    entry = json.loads(log(lake)[0].read_text())
    (Path(lake.path) / "_log" / f"{1:020d}.json").write_text(json.dumps({**entry, "version": 1, "format": 99}))
    with pytest.raises(LakeError, match=r"written by a newer sae .lake format 99, .* up to 1.; upgrade sae"):
        connect(lake.path)


@pytest.mark.parametrize("text", ["", '{"add": [', "[]", "null", "{}", '{"format": 1}', '{"format": "one"}'])
def test_a_damaged_log_entry_is_told_in_one_line(lake: Lake, text: str) -> None:
    log(lake)[0].write_text(text)
    with pytest.raises(SaeError, match=r"0\.json: not a log entry; restore the file from a copy") as caught:
        connect(lake.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", ["truncated", "missing"])
def test_a_damaged_data_file_is_told_in_one_line(lake: Lake, state: str) -> None:
    (file,) = lake.snapshot().select("latents")
    path = Path(lake.absolute(file))
    if state == "missing":
        path.unlink()
        found = "is missing"
    else:
        path.write_bytes(path.read_bytes()[:-10])
        found = f"has {file.bytes - 10} bytes"
    with pytest.raises(LakeError, match=f"{file.path}: {found}, the log says {file.bytes}; restore") as caught:
        connect(lake.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [-1, 1, 7])
def test_a_version_that_is_not_there_is_refused(lake: Lake, version: int) -> None:
    with pytest.raises(LakeError, match=f"no version {version}; versions go from 0 to 0"):
        connect(lake.path, version)


def test_a_folder_without_a_lake_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="no lake here"):
        Lake(str(tmp_path))


# Views


def test_a_bare_duckdb_sees_the_same_rows(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "it's a lake"), create=True)
    add(lake, 1)
    add(lake, 2)
    write_views(lake)
    bare = duckdb.connect()
    bare.execute(Path(lake.path, "views.sql").read_text(encoding="utf-8"))
    for table in sorted(views.TABLES):
        query = f"select * from {table} order by all"
        assert bare.execute(query).fetchall() == connect(lake.path).execute(query).fetchall()
    assert bare.execute("select autoencoder, atom from latents order by atom").fetchall() == [("a", 1), ("a", 2)]


def test_empty_tables_can_be_asked_and_have_their_columns(lake: Lake) -> None:
    connection = connect(lake.path)
    for table in sorted(views.TABLES - {"latents", "latents_by_token"}):
        answer: Any = connection.execute(f"select * from {table}")
        assert answer.fetchall() == []
        assert {field.name for field in SCHEMAS[table]} <= {column[0] for column in answer.description}
    for table in ("runs", "autoencoders", "corpora"):
        assert connection.execute(f"select count(*) from {table}").fetchall() == [(0,)]


def test_what_does_not_fit_onto_the_disk_is_told_beforehand(lake: Lake) -> None:
    lake.check_room(1)
    with pytest.raises(StorageError, match=r"No space left for 1,000,000,000,000\.0 MB, .* are free; free some space"):
        lake.check_room(10**18)
