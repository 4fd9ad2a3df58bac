"""A lake in an object store is what it is in a folder, whoever else writes and whatever the network does."""

import itertools
import json
import math
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sae.jobs import formats, storage, stores
from sae.jobs.lake import Lake, connect, write_views
from sae.jobs.log import DamagedError
from sae.jobs.verify import damages
from sae.schemas.errors import ConflictError, LakeError, StorageError
from tests.jobs.test_lake import add, atoms, latents
from tests.jobs.test_log import write_log
from tests.object_stores import STORES, serve_through_proxy
from tests.proxies import SLOW_S, Fault, Proxy, Request
from tests.tiny_run import ORDER, Lab, sae

Served = tuple[str, Proxy]
FAULTS: tuple[Fault, ...] = ("500", "500 although done", "lost request", "lost answer", "cut", "slow")


@pytest.fixture(scope="module", params=STORES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve_through_proxy(request.param) as bucket_and_proxy:
        yield bucket_and_proxy


@pytest.fixture
def lake(served: Served) -> Lake:
    lake = Lake(f"{served[0]}/{uuid.uuid4().hex}/it's a lake", create=True)
    add(lake, 0, "encode/a/c/0")
    served[1].requests.clear()
    return lake


@pytest.fixture
def proxy(served: Served) -> Iterator[Proxy]:
    """The way to the store; all faults that a test asks for must have happened at its end."""
    yield served[1]
    left = not served[1].all_happened
    served[1].forget_faults()
    assert not left


@pytest.fixture
def waits(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts as small as can be, and a time-out that a slow answer exceeds."""
    monkeypatch.setattr(stores, "_PART", 5 << 20)
    if fault == "slow":
        monkeypatch.setattr(stores, "_TIMEOUT", timedelta(seconds=SLOW_S / 2))
    stores._opened.cache_clear()
    yield
    stores._opened.cache_clear()


def objects(lake: Lake) -> set[str]:
    """Every object below the lake but its log and views."""
    return {name for name in storage.list_files(lake.path) if not name.startswith(("_log/", "views.sql"))}


def asks_for(word: str, *methods: str) -> "When":
    return When(word, methods)


class When:
    """Picks requests by a word in their path and their method."""

    def __init__(self, word: str, methods: tuple[str, ...]) -> None:
        self.word, self.methods = word, methods

    def __call__(self, request: Request) -> bool:
        return request.method in self.methods and self.word in urllib.parse.unquote(request.path)


# As in a folder


def test_what_is_committed_is_read_at_every_version(lake: Lake) -> None:
    add(lake, 1, "encode/a/c/1")
    with lake.transaction("compact") as transaction:
        transaction.remove(lake.snapshot().select("latents"))
        transaction.write("latents", latents((5, 0, 0, 1.0), (7, 1, 2, 0.5)), autoencoder="a")
        transaction.set("setting/a", {"seed": 1})
    assert atoms(lake) == [5, 7]
    for version, then in enumerate(([0], [0, 1], [5, 7])):
        found = connect(lake.path, version).execute("select atom from latents order by atom").fetchall()
        assert [atom for (atom,) in found] == then
    assert lake.snapshot().properties == {"setting/a": {"seed": 1}}
    assert Lake(lake.path).snapshot() == lake.snapshot()
    assert lake.read(lake.snapshot().select("latents"), ["atom"])["atom"].to_pylist() == [5, 7]
    assert list(damages(lake)) == []


def test_a_query_reads_the_parts_that_it_needs(lake: Lake, proxy: Proxy) -> None:
    n = 1_000_000  # several row groups, which threads read through one handle
    contexts = np.random.default_rng(0).permutation(n)
    columns = (np.arange(n), contexts, np.zeros(n), np.ones(n))
    schema = latents().schema
    table = pa.table([pa.array(column).cast(field.type) for column, field in zip(columns, schema, strict=True)], schema)
    with lake.transaction("encode") as transaction:
        file = transaction.write("latents", table, autoencoder="a")
    connection = connect(lake.path, atoms=(1, n))
    connection.execute("set threads = 8")
    proxy.requests.clear()
    few = "select count(*), sum(context_id) from latents where atom between 10 and 12"
    assert connection.execute(few).fetchall() == [(3, contexts[10:13].sum())]
    assert sum(map(asked_bytes, proxy.requests)) < file.bytes / 2
    assert connection.execute("select sum(atom), sum(context_id) from latents").fetchall() == [
        (n * (n - 1) // 2, n * (n - 1) // 2 - contexts[0])
    ]
    assert len(proxy.requests) < 30


def asked_bytes(request: Request) -> int:
    """Of a request for a range."""
    (asked,) = (value for key, value in request.headers.items() if key.lower() in ("range", "x-ms-range"))
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    return last + 1 - first


def test_a_large_file_arrives_in_parts_and_whole(lake: Lake) -> None:
    data = bytes(range(256)) * (72 << 10)  # 18 MiB, three parts
    with lake.transaction("train") as transaction:
        file = transaction.write_with("checkpoints", "safetensors", lambda path: put(path, data))
    assert file.bytes == len(data)
    with lake.local(file) as local:
        assert Path(local).read_bytes() == data
    assert not Path(local).exists()
    assert list(damages(lake)) == []


def test_vectors_stay_mapped_when_the_copy_they_were_read_from_is_gone(lake: Lake) -> None:
    ids, pos, vectors = np.arange(5), np.zeros(5, np.uint16), np.arange(20, dtype=np.float16).reshape(5, 4)
    with lake.transaction("harvest") as transaction:
        file = transaction.write_with(
            "activations", "arrow", lambda path: formats.write_vectors(ids, pos, vectors, path)
        )
    with lake.local(file) as local:
        found_ids, found = formats.map_vectors(local)
    assert not Path(local).exists()
    assert (found_ids == ids).all()
    assert (found == vectors).all()


def put(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt()])
def test_an_exception_leaves_the_lake_as_it_was(lake: Lake, error: BaseException) -> None:
    before = objects(lake)
    with pytest.raises(type(error)), lake.transaction("encode") as transaction:  # noqa: PT012
        transaction.write("latents", latents((1, 1, 0, 1.0)))
        raise error
    assert objects(lake) == before
    assert Lake(lake.path).snapshot().version == 0


def test_garbage_is_collected_and_nothing_else(lake: Lake) -> None:
    first = objects(lake)
    storage.write_atomic(
        storage.join(lake.path, "latents/a/c/0123456789abcdef.parquet"), b"of a writer that was killed"
    )
    storage.write_atomic(storage.join(lake.path, "notes.txt"), b"mine")
    with lake.transaction("drop") as transaction:
        transaction.remove(lake.snapshot().select("latents"))
    assert lake.collect_garbage(older_than_s=3600) == []
    assert set(lake.collect_garbage(older_than_s=-2)) == {*first, "latents/a/c/0123456789abcdef.parquet"}
    assert objects(lake) == {"notes.txt"}
    assert lake.snapshot().version == 1


def test_garbage_far_away_is_deleted_several_files_at_a_time(lake: Lake, proxy: Proxy) -> None:
    n, delay_s = 40, 0.1
    names = [f"latents/a/c/{number:016x}.parquet" for number in range(n)]
    storage.write_together(lake.path, [(name, b"of a writer that was killed") for name in names])
    proxy.delay_s = delay_s
    began = time.monotonic()
    try:
        assert lake.collect_garbage(older_than_s=-2) == names
    finally:
        proxy.delay_s = 0.0
    assert time.monotonic() - began < 0.6 * 2 * n * delay_s  # each is looked at and deleted
    assert objects(lake) == set(lake.snapshot().files)


def test_many_files_are_checked_by_listing_them(lake: Lake, proxy: Proxy) -> None:
    with lake.transaction("encode") as transaction:
        for run in range(1, 40):
            transaction.write("latents", latents((run, run, 0, 1.0)), autoencoder="a", run=run)
    lost = lake.snapshot().select("latents")[7]
    proxy.requests.clear()
    lake.verified(lake.snapshot().select("latents"))
    assert len(proxy.requests) < 5
    storage.remove(lake.absolute(lost))
    with pytest.raises(LakeError, match=f"{lost.path}: is missing"):
        connect(lake.path)


def test_the_views_name_urls(lake: Lake) -> None:
    write_views(lake)
    text = storage.read_bytes(storage.join(lake.path, "views.sql")).decode()
    (file,) = lake.snapshot().select("latents")
    url = lake.absolute(file).replace("az://devstoreaccount1/", "az://devstoreaccount1.blob.core.windows.net/")
    assert url.replace("'", "''") in text


def test_verify_finds_flipped_bytes(lake: Lake) -> None:
    (file,) = lake.snapshot().select("latents")
    for path in (lake.absolute(file), lake.log.path(0)):
        data = bytearray(storage.read_bytes(path))
        data[len(data) // 2] ^= 1
        storage.write_atomic(path, bytes(data))
    assert [line.split(": ")[0] for line in damages(Lake(lake.path))] == [lake.log.path(0)]


# The log


def test_the_entries_of_a_distant_log_are_asked_for_together(served: Served) -> None:
    url, proxy = served
    n, delay_s = 60, 0.1
    log = write_log(f"{url}/{uuid.uuid4().hex}", n, checkpoints=False).log
    proxy.requests.clear()
    proxy.delay_s = delay_s
    began = time.monotonic()
    try:
        assert versions(log.entries(0)) == list(range(n))
    finally:
        proxy.delay_s = 0.0
    assert time.monotonic() - began < 0.6 * n * delay_s
    assert len(proxy.requests) < 2 * n
    proxy.requests.clear()
    assert versions(log.entries(n)) == []
    assert len(proxy.requests) == 1


def versions(entries: Iterator[dict[str, Any]]) -> list[int]:
    return [entry["version"] for entry in entries]


@pytest.mark.parametrize("missing", [1, 2, 6, 7, 19])
def test_no_entry_counts_behind_one_that_is_missing(served: Served, missing: int) -> None:
    log = write_log(f"{served[0]}/{uuid.uuid4().hex}", 20, checkpoints=False).log
    storage.remove(log.path(missing))
    storage.write_atomic(log.path(20), b"not an entry")
    assert versions(log.entries(0)) == list(range(missing))


def test_a_damaged_entry_is_told_when_those_before_it_are_read(served: Served) -> None:
    log = write_log(f"{served[0]}/{uuid.uuid4().hex}", 20, checkpoints=False).log
    storage.write_atomic(log.path(5), b"not an entry")
    entries = log.entries(0)
    assert versions(itertools.islice(entries, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DamagedError, match=f"{log.path(5)}: not a log entry"):
        next(entries)


# Writers at the same time


def test_each_unit_lands_exactly_once_whoever_writes_it(lake: Lake) -> None:
    def work(_: int) -> int:
        mine, refused = Lake(lake.path), 0
        for run in range(1, 7):
            try:
                add(mine, run, f"encode/a/c/{run}")
            except ConflictError:
                refused += 1
        return refused

    with ThreadPoolExecutor(3) as pool:
        refused = sum(pool.map(work, range(3)))
    snapshot = Lake(lake.path).snapshot()
    assert (refused, snapshot.version) == (12, 6)
    assert sorted(file.run or 0 for file in snapshot.files.values()) == list(range(7))
    assert objects(lake) == set(snapshot.files)


def test_two_processes_race_for_every_version_and_all_lands(lake: Lake) -> None:
    head = f"from tests.jobs.test_lake import add; from sae.jobs.lake import Lake; lake = Lake({lake.path!r})"
    scripts = [
        f"{head}\nfor run in range({start}, {start + 8}): add(lake, run, f'encode/a/c/{{run}}')" for start in (1, 9)
    ]
    root = Path(__file__).parents[2]
    started = [subprocess.Popen([sys.executable, "-c", script], cwd=root) for script in scripts]
    assert [process.wait(120) for process in started] == [0, 0]
    assert atoms(lake) == list(range(17))
    assert lake.log.versions() == list(range(17))


# A network that fails


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("waits")
def test_an_entry_is_linked_once_whatever_becomes_of_the_answer(lake: Lake, proxy: Proxy, fault: Fault) -> None:
    proxy.inject(fault, 2 if fault != "cut" else 1, asks_for("/_log/", "PUT"))
    add(lake, 1, "encode/a/c/1")
    assert atoms(Lake(lake.path)) == [0, 1]
    assert lake.log.versions() == [0, 1]
    assert objects(lake) == set(lake.snapshot().files)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("waits")
def test_a_file_arrives_whole_whatever_becomes_of_the_answers(lake: Lake, proxy: Proxy, fault: Fault) -> None:
    data = bytes(range(256)) * (4 if fault == "slow" else 24 << 10)  # 6 MiB are two parts
    proxy.inject(fault, 2, asks_for("checkpoints/", "PUT", "POST"))
    with lake.transaction("train") as transaction:
        transaction.write_with("checkpoints", "safetensors", lambda path: put(path, data))
    assert list(damages(Lake(lake.path))) == []
    assert objects(lake) == set(lake.snapshot().files)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("waits")
def test_reads_are_tried_again(lake: Lake, proxy: Proxy, fault: Fault) -> None:
    proxy.inject(fault, 2, asks_for("/_log/", "GET"))
    proxy.inject(fault, 2, asks_for("latents/", "GET"))
    assert atoms(Lake(lake.path)) == [0]


@pytest.mark.parametrize("fault", ["500", "lost request"])
def test_an_upload_that_never_succeeds_leaves_nothing_to_see(
    lake: Lake, proxy: Proxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_RETRY", {"max_retries": 1})
    monkeypatch.setattr(stores, "_TRIES", 2)
    stores._opened.cache_clear()
    proxy.inject(fault, 50, asks_for("latents/", "PUT", "POST"))
    with pytest.raises(StorageError, match=r"cannot write .*; check the network and the credentials") as caught:
        add(lake, 1)
    proxy.forget_faults()
    stores._opened.cache_clear()
    assert "\n" not in str(caught.value)
    assert atoms(Lake(lake.path)) == [0]
    assert objects(lake) == set(lake.snapshot().files)


def test_files_stay_where_the_entry_can_still_appear(lake: Lake, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store took the entry, but no answer ever came, nor to any later request for it."""
    monkeypatch.setattr(stores, "_RETRY", {"max_retries": 0})
    monkeypatch.setattr(stores, "_TRIES", 1)
    stores._opened.cache_clear()
    proxy.inject("lost answer", 1, asks_for("/_log/", "PUT"))
    with pytest.raises(StorageError, match="cannot write"):
        add(lake, 1)
    stores._opened.cache_clear()
    assert atoms(Lake(lake.path)) == [0, 1]


# What a user gets wrong


@pytest.mark.parametrize("create", [False, True])
def test_a_missing_bucket_is_told(served: Served, create: bool) -> None:
    bucket = served[0][:-1] + "x"
    with pytest.raises(StorageError, match=f"{bucket}/lake/.*no such.* bucket; ") as caught:
        Lake(f"{bucket}/lake", create=create).snapshot()
    assert "\n" not in str(caught.value)


def test_a_bucket_that_may_only_be_read_is_told(lake: Lake, proxy: Proxy) -> None:
    proxy.inject("403", 1, asks_for("latents/", "PUT", "POST"))
    with pytest.raises(StorageError, match=r"cannot write .*: permission denied; use a bucket that you may write to"):
        add(lake, 1)
    assert atoms(Lake(lake.path)) == [0]


def test_a_wrong_key_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_through_proxy("az") as (bucket, _):  # the emulator that checks signatures
        monkeypatch.setenv("AZURE_STORAGE_KEY", "d3Jvbmc=")  # pragma: allowlist secret
        with pytest.raises(StorageError, match=r"lake/.*: permission denied; set AZURE_STORAGE_ACCOUNT and AZURE"):
            Lake(f"{bucket}/lake")
        with pytest.raises(StorageError, match=r"cannot write .*/lake/x: permission denied; use a bucket that you may"):
            storage.write_atomic(f"{bucket}/lake/x", b"")


def test_a_place_without_a_lake_is_told(served: Served) -> None:
    with pytest.raises(LakeError, match="nothing/here: no lake here"):
        Lake(f"{served[0]}/nothing/here")


# The steps


def alike(rows: list[Any], others: list[Any]) -> bool:
    """Whether rows are equal but for the last bits of sums, which DuckDB's threads add up in any order."""
    if len(rows) != len(others):
        return False
    pairs = ((a, b) for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True))
    return all(a == b or (isinstance(a, float) and math.isclose(a, b, rel_tol=1e-12)) for a, b in pairs)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", [pytest.param(store, marks=pytest.mark.long) for store in STORES])
def test_the_pipeline_gives_the_same_rows_as_in_a_folder(finished: Lab, store: str, tmp_path: Path) -> None:
    with serve_through_proxy(store) as (bucket, _):
        url = f"{bucket}/lake"
        overrides = {"lake": url, "export.folder": str(tmp_path / "viewer")}
        arguments = [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]
        # In a process of its own: the workers of a Ray that runs already know nothing of this store.
        command = [sys.executable, "-m", "sae.jobs.cli", "run", str(finished.config), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        local, remote = connect(str(finished.lake)), connect(url)
        for table, order in ORDER.items():
            if table != "metrics":  # of the evaluation there are none in the folder, and others tell of time
                query = f"select * from {table} order by {order}"
                assert alike(remote.execute(query).fetchall(), local.execute(query).fetchall()), table
        assert (tmp_path / "viewer").exists()
        verified = sae("verify", url)
        assert (verified.code, verified.stderr) == (0, "")
