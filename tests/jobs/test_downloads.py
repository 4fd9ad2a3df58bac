"""Downloads from an emulator of Azure's store: fetched once through blobfile, checked at each use, never twice."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from sae.jobs import downloads, storage
from sae.schemas.errors import StorageError
from tests.object_stores import Put, serve

DATA = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def put() -> Iterator[Put]:
    with serve("az") as put:
        yield put


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAE_OFFLINE", raising=False)
    return tmp_path / "cache"


def copy_of(cache: Path, path: str) -> Path:
    return cache / "pretrained" / path.replace("://", "/")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a store is an error from here on."""
    opened = storage.open_read

    def ask(path: str) -> BinaryIO:
        assert storage.is_local(path), f"{path} was asked for"
        return opened(path)

    monkeypatch.setattr(storage, "state", ask)
    monkeypatch.setattr(storage, "open_read", ask)


def test_a_file_comes_whole_and_is_noted(put: Put, cache: Path) -> None:
    path = put("folder/8.pt", DATA)
    copy = Path(downloads.fetched(path))
    assert copy == copy_of(cache, path)
    assert copy.read_bytes() == DATA
    noted = json.loads(Path(f"{copy}.json").read_text())
    assert noted["source"] == path
    assert (noted["size"], noted["sha256"]) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert noted["version"] == storage.state(path).version


def test_the_copy_is_used_without_the_store(put: Put, request: pytest.FixtureRequest) -> None:
    path = put("a.pt", DATA)
    first = downloads.fetched(path)
    storage._blobs.remove(path)
    request.getfixturevalue("no_network")
    assert downloads.fetched(path) == first
    assert downloads.fetched(path, offline=True) == first


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"x", None])
def test_a_damaged_copy_is_fetched_anew(
    put: Put, cache: Path, damage: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put("damaged.pt", DATA)
    copy = Path(downloads.fetched(path))
    if damage is None:
        Path(f"{copy}.json").write_text("{")
    else:
        copy.write_bytes(damage)
    capsys.readouterr()
    assert Path(downloads.fetched(path)).read_bytes() == DATA
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"import: {path}: ")
    assert line.endswith(f"({copy}); fetching it anew")
    downloads.fetched(path, offline=True)


@pytest.mark.parametrize("left", ["copy", "note"])
def test_half_of_what_a_killed_process_left_is_not_used(put: Put, left: str) -> None:
    path = put("killed.pt", DATA)
    copy = Path(downloads.fetched(path))
    (Path(f"{copy}.json") if left == "copy" else copy).unlink()
    with pytest.raises(StorageError, match="not in the cache"):
        downloads.fetched(path, offline=True)
    assert Path(downloads.fetched(path)).read_bytes() == DATA


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_offline_only_the_cache_is_used(
    put: Put, value: str, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setenv("SAE_OFFLINE", value)
    with pytest.raises(StorageError) as caught:
        downloads.fetched("az://openaipublic/sparse-autoencoder/gpt2-small/a.pt")
    assert str(caught.value).startswith("az://openaipublic/sparse-autoencoder/gpt2-small/a.pt: not in the cache (")
    assert str(caught.value).endswith("no store may be asked (SAE_OFFLINE or --offline); fetch it once online")


def test_offline_a_damaged_copy_is_told(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("b.pt", DATA)
    Path(downloads.fetched(path)).write_bytes(DATA[::-1])
    monkeypatch.setenv("SAE_OFFLINE", "1")
    with pytest.raises(StorageError, match=rf"^{path}: its copy in the cache is damaged \(.*fetch it once online$"):
        downloads.fetched(path)


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_online_is_what_holds_otherwise(put: Put, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_OFFLINE", value)
    assert Path(downloads.fetched(put("c.pt", DATA))).read_bytes() == DATA


def test_what_is_not_there_is_told(put: Put, cache: Path) -> None:
    missing = put("d.pt", b"x").replace("d.pt", "no-such.pt")
    with pytest.raises(StorageError, match=rf"^{missing}: no such file, folder or bucket; check the path$"):
        downloads.fetched(missing)
    assert not cache.exists()


@pytest.mark.parametrize("when", ["while it is read", "after it was read"])
def test_what_changes_meanwhile_is_refused(put: Put, cache: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    path = put("changing.pt", DATA)
    name = "open_read" if when == "while it is read" else "state"
    ask = getattr(storage, name)
    asked: list[object] = []

    def changing(path: str) -> object:
        if name == "state" and asked:
            put("changing.pt", DATA[::-1])
        asked.append(ask(path))
        if name == "open_read":
            put("changing.pt", DATA[::-1])
        return asked[-1]

    monkeypatch.setattr(storage, name, changing)
    expected = {"open_read": "cannot read {}: .*etag mismatch", "state": "{}: was changed while it was fetched; run"}
    with pytest.raises(StorageError, match="^" + expected[name].format(path)):
        downloads.fetched(path)
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def test_what_the_disk_has_no_room_for_is_not_begun(put: Put, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("large.pt", DATA)
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    with pytest.raises(
        StorageError, match=r"has 1,280,000 bytes, 1,000 are free for .*; free some space, or set SAE_C"
    ):
        downloads.fetched(path)
    assert not cache.exists()


def test_a_local_file_is_its_own_copy(tmp_path: Path, no_network: None) -> None:
    assert downloads.fetched(str(tmp_path / "x.pt")) == str(tmp_path / "x.pt")


@pytest.mark.parametrize("path", ["az://a/b/../../../x", "az://a/b//x", "az://a/b/./x", "az://a/b/"])
def test_no_path_leads_out_of_the_cache(path: str) -> None:
    with pytest.raises(StorageError, match=r"names no object; write the path without empty names, \. and \.\."):
        downloads.fetched(path)


def test_the_cache_is_in_the_home_folder(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put("e.pt", DATA)
    assert Path(downloads.fetched(path)) == copy_of(tmp_path / ".cache" / "sae", path)
