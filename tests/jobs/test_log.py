"""The log: entries are the truth and are checked; checkpoints only save time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs.lake import Lake
from sae.jobs.log import CHECKPOINT_EVERY, DamagedError, sealed
from sae.jobs.snapshots import Snapshot
from sae.jobs.verify import damages
from sae.schemas.errors import LakeError
from tests.jobs.test_lake import add


def entry(version: int) -> dict[str, object]:
    """Adds a file, every third takes an earlier one away."""
    file = {"path": f"latents/{version:016x}.parquet", "table": "latents", "rows": 1, "bytes": 1, "sha256": "0"}
    named = {"corpus": "c", "autoencoder": "a", "subject": None, "run": version, "tokens": 1}
    return {
        "format": 1,
        "id": f"{version:032x}",
        "version": version,
        "operation": "encode",
        "unit": f"encode/a/c/{version}",
        "created": "2026-11-23T00:00:00Z",
        "add": [{**file, **named, "atoms": [0, 9], "contexts": None}],
        "remove": [f"latents/{version // 2:016x}.parquet"] if version % 3 == 2 else [],
        "forget": [],
        "set": {"setting/last": version, f"setting/{version % 7}": version},
    }


def write_log(path: str | Path, n: int, checkpoints: int = 4) -> Lake:
    """A lake with a log of n entries, as a writer leaves it but for the older ones of its checkpoints."""
    lake, snapshot = Lake(str(path), create=True), Snapshot()
    for version in range(n):
        one = sealed(entry(version))
        assert lake.log.link(one)
        snapshot = snapshot.apply([one])
        if (version + 1) % CHECKPOINT_EVERY == 0 and version >= n - checkpoints * CHECKPOINT_EVERY:
            lake.log.write_checkpoint(snapshot, one)
    return Lake(str(path))


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_log(tmp_path_factory.mktemp("lake"), 200).path)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return write_log(tmp_path / "lake", 150)


def replayed(version: int) -> Snapshot:
    return Snapshot().apply(sealed(entry(each)) for each in range(version + 1))


def flip(path: str, at: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at % len(data)] ^= 1
    Path(path).write_bytes(data)


@given(version=st.integers(0, 199))
def test_every_version_is_the_sum_of_its_entries(long_log: Path, version: int) -> None:
    lake = Lake(str(long_log))
    assert lake.snapshot(version) == replayed(version)


def test_a_writer_stores_a_checkpoint_from_which_a_reader_starts(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"), create=True)
    for run in range(CHECKPOINT_EVERY + 1):
        with lake.transaction("set", f"set/{run}") as transaction:
            transaction.set("setting/a", {"numbers": (1, 2.5), "run": run})
    assert lake.log.checkpoints() == [CHECKPOINT_EVERY - 1]
    whole = lake.snapshot()
    Path(lake.log.path(5)).unlink()  # a reader that starts at the checkpoint never asks for it
    assert Lake(lake.path).snapshot() == whole
    assert whole.properties["setting/a"] == {"numbers": [1, 2.5], "run": CHECKPOINT_EVERY}


def test_a_lake_of_5000_entries_opens_at_once(tmp_path: Path) -> None:
    path = write_log(tmp_path / "lake", 5000).path
    start = time.monotonic()
    assert Lake(path).snapshot().version == 4999
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("what", ["hint", "hint is no number", "newest", "all"])
def test_missing_and_damaged_checkpoints_do_no_harm(lake: Lake, what: str) -> None:
    hint = Path(lake.path, "_log/last_checkpoint")
    if what == "hint":
        hint.unlink()
    elif what == "hint is no number":
        hint.write_bytes(b"\xff")
    for version in {"newest": [127], "all": [63, 127]}.get(what, []):
        flip(lake.log.checkpoint_path(version), 1000)
    fresh = Lake(lake.path)
    assert fresh.snapshot() == replayed(149)
    assert fresh.snapshot(100) == replayed(100)


def test_a_checkpoint_of_another_log_is_not_believed(lake: Lake, tmp_path: Path) -> None:
    other = Lake(str(tmp_path / "other"), create=True)
    for run in range(CHECKPOINT_EVERY):
        with other.transaction("set") as transaction:
            transaction.set("setting/a", run)
    Path(lake.log.checkpoint_path(127)).unlink()
    Path(other.log.checkpoint_path(63)).rename(lake.log.checkpoint_path(63))
    Path(other.path, "_log/last_checkpoint").rename(Path(lake.path, "_log/last_checkpoint"))
    assert Lake(lake.path).snapshot() == replayed(149)


def test_gc_keeps_the_last_two_checkpoints(tmp_path: Path) -> None:
    lake = write_log(tmp_path / "lake", 4 * CHECKPOINT_EVERY)
    assert len(lake.log.checkpoints()) == 4
    lake.collect_garbage(older_than_s=-1)
    assert lake.log.checkpoints() == [3 * CHECKPOINT_EVERY - 1, 4 * CHECKPOINT_EVERY - 1]
    assert lake.log.versions() == list(range(4 * CHECKPOINT_EVERY))
    assert Lake(lake.path).snapshot(10) == replayed(10)


@given(at=st.integers(0, 10_000))
def test_a_flipped_bit_anywhere_in_an_entry_is_noticed(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    lake = write_log(tmp_path_factory.mktemp("lake"), 2)
    flip(lake.log.path(1), at)
    with pytest.raises(LakeError) as caught:
        Lake(lake.path).snapshot()
    assert "\n" not in str(caught.value)


def test_an_entry_of_an_older_lake_has_no_checksum(lake: Lake) -> None:
    path = Path(lake.log.path(149))
    old = json.loads(path.read_text())
    del old["sha256"]
    path.write_text(json.dumps(old))
    assert Lake(lake.path).snapshot() == replayed(149)
    old["sha"] = "0"  # as damage to the name of the checksum would look
    path.write_text(json.dumps(old))
    with pytest.raises(DamagedError, match="not a log entry"):
        Lake(lake.path).snapshot()


def test_what_a_newer_sae_notes_of_a_file_is_told_in_one_line(tmp_path: Path) -> None:
    lake = write_log(tmp_path / "lake", CHECKPOINT_EVERY - 1)
    newer: dict[str, Any] = entry(CHECKPOINT_EVERY - 1)
    newer["add"] = [{**file, "sorted": True, "codec": "zstd"} for file in newer["add"]]
    assert lake.log.link(sealed(newer))
    told = f"^{newer['add'][0]['path']}: the lake's log has codec, sorted for it, .* newer one wrote it; upgrade sae$"
    with pytest.raises(LakeError, match=told):
        Lake(lake.path).snapshot()
    assert lake.log.read_checkpoint(CHECKPOINT_EVERY - 1) is None
    checkpoint = {"format": 1, **replayed(CHECKPOINT_EVERY - 2).to_json(), "version": CHECKPOINT_EVERY - 1}
    checkpoint["files"] = [{**file, "sorted": True} for file in checkpoint["files"]]
    checkpoint["entry"] = sealed(newer)["sha256"]
    Path(lake.log.checkpoint_path(CHECKPOINT_EVERY - 1)).write_text(json.dumps(sealed(checkpoint)))
    assert lake.log.read_checkpoint(CHECKPOINT_EVERY - 1) is None
    with pytest.raises(LakeError, match=told):
        Lake(lake.path).snapshot()


def test_verify_names_every_damaged_file_with_its_remedy(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"), create=True)
    for run in range(CHECKPOINT_EVERY + 3):
        add(lake, run)
    assert list(damages(lake)) == []
    files = lake.snapshot().select("latents")
    flip(lake.absolute(files[3]), 100)
    Path(lake.absolute(files[4])).write_bytes(b"")
    entry_7 = Path(lake.log.path(7))
    entry_7.write_text(entry_7.read_text().replace('"encode"', '"encodf"'))
    Path(lake.log.path(8)).unlink()
    flip(lake.log.checkpoint_path(CHECKPOINT_EVERY - 1), 500)
    remedy = "restore the file from a copy of the lake"
    assert sorted(damages(Lake(lake.path))) == sorted(
        [
            f"{lake.log.path(7)}: another sha256 than it was written with; {remedy}",
            f"{lake.log.path(8)}: is missing; {remedy}",
            f"{lake.log.checkpoint_path(CHECKPOINT_EVERY - 1)}: is damaged; delete it, it only saves time",
            f"{lake.absolute(files[3])}: has another sha256 than the log says; {remedy}",
            f"{lake.absolute(files[4])}: has 0 bytes, the log says {files[4].bytes}; {remedy}",
        ]
    )
