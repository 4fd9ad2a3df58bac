"""Files behave alike in every store; a local file is never seen half written."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import storage
from sae.schemas.errors import StorageError
from tests.object_stores import STORES, Put, serve


@pytest.fixture(scope="module", params=["local", *STORES])
def put(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Put]:
    if request.param != "local":
        with serve(request.param) as put_remote:
            yield put_remote
        return
    folder = tmp_path_factory.mktemp("files")

    def put_local(name: str, data: bytes) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        return f"{folder}/{name}"

    yield put_local


# Every store


def test_reads_what_was_put(put: Put) -> None:
    data = os.urandom(300_000)
    path = put("read/some.bin", data)
    assert storage.read_bytes(path) == data
    assert storage.size(path) == len(data)
    assert storage.exists(path)
    assert storage.exists(path.rsplit("/", 1)[0])
    with storage.open_read(path) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(100_000)
        assert (file.read(7), file.tell()) == (data[100_000:100_007], 100_007)


def test_reads_an_empty_file(put: Put) -> None:
    path = put("read/empty", b"")
    assert storage.read_bytes(path) == b""
    assert storage.size(path) == 0


def test_sha256_is_that_of_the_contents(put: Put) -> None:
    # The known digest of "abc" (FIPS 180-4, example 1).
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert storage.sha256(put("read/abc", b"abc")) == expected


def test_parquet_reads_through_a_stream(put: Put) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"n": range(50_000)})
    pq.write_table(table, sink)
    with storage.open_read(put("read/t.parquet", sink.getvalue().to_pybytes())) as file:
        assert pq.read_table(file).equals(table)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["1.txt", "2.txt", "10.txt"]),
        ("?.txt", ["1.txt", "2.txt"]),
        ("*/*.txt", ["a/3.txt", "b/4.txt"]),
        ("a/*", ["a/3.txt", "a/x[1].bin"]),
        ("a/x[1].*", ["a/x[1].bin"]),
        ("**/*.txt", ["1.txt", "2.txt", "10.txt", "a/3.txt", "b/4.txt", "b/c/5.txt"]),
        ("b/**", ["b/4.txt", "b/c/5.txt"]),
        ("b/**/5.txt", ["b/c/5.txt"]),
        ("**/c/*", ["b/c/5.txt"]),
        ("1*", ["1.txt", "10.txt"]),
        ("1.txt", ["1.txt"]),
        ("a", []),
        ("absent", []),
        ("absent*/*.txt", []),
        ("absent/*.txt", []),
    ],
)
def test_glob_means_the_same_everywhere(put: Put, pattern: str, expected: list[str]) -> None:
    names = ["2.txt", "10.txt", "a/3.txt", "a/x[1].bin", "b/4.txt", "b/c/5.txt", ".hidden.txt", ".h/6.txt"]
    base = put("glob/1.txt", b"1.txt").removesuffix("1.txt")
    for name in names:
        put(f"glob/{name}", name.encode())
    assert storage.glob(base + pattern) == sorted(base + name for name in expected)
    assert [file.size for file in storage.find(base + pattern)] == [len(n) for n in sorted(expected)]


@pytest.mark.parametrize("name", ["with space", "ümlaut", "100%25", "a#b", "a+b", "q=1&r"])
def test_names_with_unusual_characters(put: Put, name: str) -> None:
    path = put(f"names/{name}/{name}.txt", name.encode())
    assert storage.read_bytes(path) == name.encode()
    assert path in storage.glob(path.rsplit("/", 2)[0] + "/**/*.txt")


def test_a_missing_file_is_named(put: Put) -> None:
    path = put("missing/one", b"") + "-not"
    assert not storage.exists(path)
    for read in (storage.read_bytes, storage.size, storage.open_read):
        with pytest.raises(StorageError, match="one-not: no such file"):
            read(path)


def test_what_is_written_reads_back_and_goes_away(put: Put) -> None:
    folder = put("write/x", b"").removesuffix("/x")
    path = f"{folder}/new folder/ümlaut.bin"
    began = time.time()
    storage.write_atomic(path, b"old")
    storage.write_atomic(path, lambda file: file.write(b"new"))
    assert storage.read_bytes(path) == b"new"
    assert began - 2 < storage.modified(path) < time.time() + 2
    assert storage.list_files(folder) == ["new folder/ümlaut.bin", "x"]
    with storage.local_copy(path) as local:
        assert Path(local).read_bytes() == b"new"
    storage.remove(path)
    storage.remove(path)
    assert storage.list_files(folder) == ["x"]
    assert storage.read_if_there(path) is None


def test_the_first_of_two_is_kept(put: Put) -> None:
    path = put("absent/x", b"").removesuffix("x") + "1.json"
    assert storage.put_if_absent(path, b"first")
    assert not storage.put_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"


def test_a_write_that_fails_is_not_seen(put: Put) -> None:
    folder = put("failed/x", b"").removesuffix("/x")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(f"{folder}/y", fail)
    assert storage.list_files(folder) == ["x"]


def test_what_killed_writers_left_on_this_machine_goes_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"old": ".sae-" + "0" * 32, "new": ".sae-" + "1" * 32, "somebody's": ".sae-notes"}
    for name in names.values():
        (tmp_path / name).touch()
    for key in ("old", "somebody's"):
        os.utime(tmp_path / names[key], (0, time.time() - 86_500))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve("s3") as put:
        storage.write_atomic(put("x", b"") + "/y", b"data")
    assert set(os.listdir(tmp_path)) == {names["new"], names["somebody's"]}


@pytest.mark.parametrize("store", STORES)
def test_a_missing_bucket_is_named(store: str) -> None:
    with serve(store) as put:
        path = put("x", b"").replace("bucket", "other-bucket")
        assert not storage.exists(path)
        with pytest.raises(StorageError, match="other-bucket/x: no such file"):
            storage.read_bytes(path)
        with pytest.raises(StorageError, match=r"cannot write .*other-bucket/x: no such bucket; create it"):
            storage.write_atomic(path, b"")


@pytest.mark.parametrize("path", ["s3://", "s3:///x", "gs://", "az://account", "az://account/"])
def test_a_path_without_a_bucket_is_told(path: str) -> None:
    with pytest.raises(StorageError, match="names no bucket; write "):
        storage.read_bytes(path)


def test_an_s3_object_that_changes_while_it_is_read_is_noticed() -> None:
    with serve("s3") as put, storage.open_read(put("changing", bytes(10_000_000))) as file:
        assert file.read(10) == bytes(10)
        put("changing", b"1" * 10_000_000)
        with pytest.raises(StorageError, match="s3://bucket/changing"):
            file.read()


# Paths


@pytest.mark.parametrize("path", ["file:///x", "https://host/x", "hf://datasets/x"])
def test_an_unknown_scheme_is_refused(path: str) -> None:
    with pytest.raises(StorageError, match="unknown scheme"):
        storage.open_read(path)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("a", "b", "c"), "a/b/c"),
        (("/", "b"), "/b"),
        (("", "b"), "b"),
        (("s3://bucket", "/b"), "s3://bucket/b"),
        (("a/", "b/"), "a/b/"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(*parts) == expected


def test_a_folder_is_not_read_as_a_file(tmp_path: Path) -> None:
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(StorageError, match="is a folder"):
            read(str(tmp_path))


def test_glob_finds_relative_paths_and_linked_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.txt").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "circle").symlink_to("..")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    assert storage.glob("*/*.txt") == ["link/1.txt", "real/1.txt"]
    assert storage.glob("./re*//1.txt") == ["./real/1.txt"]
    assert storage.glob("**/*.txt") == ["real/1.txt"]


# Writing


@given(data=st.binary(max_size=5000))
def test_a_written_file_reads_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("lake")
    for name, write in (("bytes", data), ("function", lambda file: file.write(data))):
        path = f"{folder}/new/folder/{name}"
        storage.write_atomic(path, write)
        assert storage.read_bytes(path) == data
    assert storage.list_files(str(folder)) == ["new/folder/bytes", "new/folder/function"]
    assert storage.list_files(str(folder), temporary=True) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    storage.write_atomic(path, b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, fail)
    assert storage.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_no_visible_file(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from sae.jobs import storage\n"
        "with storage.staged(sys.argv[1] + '/out.parquet') as path, open(path, 'wb') as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.kill()
    assert storage.list_files(str(tmp_path)) == []
    assert storage.glob(f"{tmp_path}/**") == []
    (left,) = storage.list_files(str(tmp_path), temporary=True)
    storage.remove(f"{tmp_path}/{left}")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(StorageError, match=f"{tmp_path}/x: No space left on device; free some space"):
        storage.write_atomic(str(tmp_path / "x"), fill)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [storage.write_atomic, storage.put_if_absent])
def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path, write: object) -> None:
    assert callable(write)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match="raise the limit on file sizes"):
            write(str(tmp_path / "x"), bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="use a folder that this user may write to"):
        storage.write_atomic(str(tmp_path / "x"), b"")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file: is a file, a folder was expected"):
        storage.write_atomic(f"{tmp_path}/file/x", b"")


def test_errors_of_other_files_are_not_blamed_on_the_staged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), storage.staged(str(tmp_path / "x")):
        open(tmp_path / "other").close()
    assert os.listdir(tmp_path) == []


def test_put_if_absent_keeps_the_first(tmp_path: Path) -> None:
    path = str(tmp_path / "log" / "0001")
    assert storage.put_if_absent(path, b"first")
    assert not storage.put_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"
    assert os.listdir(tmp_path / "log") == ["0001"]


def test_one_of_many_threads_wins(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def race(me: int) -> list[bool]:
        won = []
        for round_ in range(20):
            barrier.wait()
            won.append(storage.put_if_absent(f"{tmp_path}/{round_}", b"%d" % me))
        return won

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(race, range(8)))
    for round_, winners in enumerate(zip(*won, strict=True)):
        assert sum(winners) == 1
        assert storage.read_bytes(f"{tmp_path}/{round_}") == b"%d" % winners.index(True)
    assert len(os.listdir(tmp_path)) == 20


def _claim(folder: str, me: int) -> list[bool]:
    return [storage.put_if_absent(f"{folder}/{n}", b"%d" % me) for n in range(50)]


def test_one_of_many_processes_wins(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as processes:
        won = list(processes.map(_claim, [str(tmp_path)] * 3, range(3)))
    for n, winners in enumerate(zip(*won, strict=True)):
        assert sum(winners) == 1
        assert storage.read_bytes(f"{tmp_path}/{n}") == b"%d" % winners.index(True)


def test_what_only_a_disk_has_is_not_asked_of_a_store() -> None:
    for ask in (storage.make_folder, storage.check_writable, storage.free_bytes):
        with pytest.raises(StorageError, match="is in an object store; give a local folder"):
            ask("s3://bucket/lake")


def test_remove_twice_and_free_bytes_of_a_future_folder(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    storage.write_atomic(path, b"")
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)
    assert storage.free_bytes(f"{tmp_path}/not/yet/there") > 0


def test_a_disk_without_hard_links_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", source, None, target)

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match="hard links"):
        storage.put_if_absent(str(tmp_path / "x"), b"")
    assert os.listdir(tmp_path) == []
