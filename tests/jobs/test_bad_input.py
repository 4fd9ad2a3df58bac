"""Whatever is wrong with the input is told in one line with a remedy, and the lake is as it was."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.models import tiny_gpt2
from tests.tiny_run import NAME, Lab


def refused(lab: Lab, step: str, *expected: str, **overrides: Any) -> str:
    """The one line with which a step is refused; every file of the lake must be as before, and no other there."""
    before = lab.bytes()
    result = lab.sae(step, **overrides)
    assert result.code == 1, result.stderr
    assert len(result.lines) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for part in expected:
        assert part in result.stderr
    assert lab.bytes() == before
    return result.stderr


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_file(lab: Lab, table: str) -> Path:
    """The newest file of a table of which there is one in use."""
    return max((lab.lake / table).rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)


ROWS = {
    "invalid JSON": b'{"text": "x"',
    "no column 'text'": b'{"body": "x"}',
    "column 'text' is of type int": b'{"text": 3}',
    "column 'text' is null": b'{"text": null}',
    "invalid UTF-8": b'{"text": "\xff"}',
    "empty text": b'{"text": " "}',
}


@pytest.mark.parametrize("cause", ROWS)
def test_a_bad_row_stops_with_its_place(cause: str, lab: Lab, tmp_path: Path) -> None:
    corpus = tmp_path / "rows.jsonl"
    corpus.write_bytes(b'{"text": "good"}\n' + ROWS[cause] + b'\n{"text": "good"}\n')
    line = refused(lab.without_lake(tmp_path), "tokenize", cause, f"{corpus}:2", corpus__paths=[str(corpus)])
    assert "corpus.on_bad_row: skip" in line


@pytest.mark.parametrize(("cause", "text"), [("invalid UTF-8", b"caf\xe9"), ("empty text", b"\n")])
def test_a_bad_text_file_stops(cause: str, text: bytes, lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(text)
    refused(lab.without_lake(tmp_path), "tokenize", cause, "1.txt", corpus__paths=[str(tmp_path / "*.txt")])


def test_a_second_corpus_with_a_bad_row_leaves_the_first_alone(tokenized: Lab, tmp_path: Path) -> None:
    corpus = tmp_path / "rows.jsonl"
    corpus.write_bytes(b'{"text": "good"}\n' * 100 + b"{\n")
    refused(tokenized, "tokenize", f"{corpus}:101", corpus__name="second", corpus__paths=[str(corpus)])


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_a_truncated_corpus_file(name: str, lab: Lab, tmp_path: Path) -> None:
    corpus = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": [f"document {i}" for i in range(1000)]}), corpus)
    else:
        lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(1000))
        corpus.write_bytes(subprocess.run(["gzip"], input=lines.encode(), capture_output=True, check=True).stdout)
    truncate(corpus)
    refused(lab.without_lake(tmp_path), "tokenize", str(corpus), corpus__paths=[str(corpus)])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"corpus__paths": ["/nowhere/*.txt"]}, ["corpus.paths", "no file matches /nowhere/*.txt"]),
        ({"corpus__context_length": 65}, ["corpus.context_length: got 65", "at most 64"]),
        ({"subject__model": "./nowhere"}, ["./nowhere"]),
        ({"autoencoder__n_latents": 3}, ["k is 4, more than n_latents 3", "choose k <= n_latents"]),
        ({"training__lr": "fast"}, ["training.lr: got 'fast'", "number"]),
        ({"training__lrs": 1}, ["training.lrs: unknown key; did you mean lr?"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(
    overrides: dict[str, Any], expected: list[str], lab: Lab, tmp_path: Path
) -> None:
    refused(lab.without_lake(tmp_path), "tokenize", *expected, **overrides)


def test_a_config_that_is_missing(lab: Lab) -> None:
    missing = Lab(lab.folder / "nowhere", lab.lake)
    refused(missing, "tokenize", str(missing.config))


def test_a_corpus_that_changed(tokenized: Lab) -> None:
    refused(tokenized, "tokenize", "corpus.context_length", "32", "16", corpus__context_length=16)


@pytest.mark.parametrize("hook", ["blocks.1.hook_nonsense", "blocks.7.hook_resid_pre"])
def test_an_unknown_hook(hook: str, tokenized: Lab, no_ray: None) -> None:
    refused(tokenized, "train", "hook", hook, subject__hook=hook)


@pytest.mark.parametrize(
    ("key", "value"),
    [("subject__hook", "blocks.0.hook_resid_pre"), ("subject__masked_positions", []), ("subject__dtype", "bfloat16")],
)
def test_encoding_other_activations_than_were_trained_on(key: str, value: Any, trained: Lab) -> None:
    refused(trained, "encode", key.replace("__", "."), "is trained with", **{key: value})


def test_training_on_with_other_settings(trained: Lab) -> None:
    refused(trained, "train", "training.lr", "0.002", "0.5", training__lr=0.5)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training__clip_norm", 1.0, "is trained with null, now it is 1.0; give null, or"),
        ("autoencoder__normalize", False, "is trained with true, now it is false; give true, or"),
        ("subject__masked_positions", [1, 2], "is trained with [0], now it is [1, 2]; give [0], or"),
    ],
)
def test_other_settings_are_told_as_yaml_has_them(key: str, value: Any, told: str, trained: Lab) -> None:
    refused(trained, "train", key.replace("__", "."), told, **{key: value})


def test_encoding_on_with_other_settings(finished: Lab) -> None:
    refused(finished, "encode", "encode.bin_width", "0.2", "0.5", "sae drop", encode__bin_width=0.5)


def test_an_autoencoder_of_another_width(trained: Lab, no_ray: None, tmp_path: Path) -> None:
    """The model's folder holds another model than when the autoencoder was trained."""
    lab = trained.copy(tmp_path)
    wide = tiny_gpt2(tmp_path / "wide", d=48)
    for entry in (lab.lake / "_log").iterdir():
        kept = json.loads(entry.read_text().replace(str(lab.folder / "model"), str(wide)))
        kept.pop("sha256", None)  # as entries of older lakes
        entry.write_text(json.dumps(kept))
    refused(lab, "encode", f"autoencoder {NAME}", "width 32", "48", subject__model=str(wide))


def test_a_truncated_checkpoint(trained: Lab, no_ray: None, tmp_path: Path) -> None:
    lab = trained.copy(tmp_path)
    path = only_file(lab, "checkpoints")
    truncate(path)
    refused(lab, "encode", str(path), "restore the file from a copy")


def test_a_truncated_training_state(trained: Lab, no_ray: None, tmp_path: Path) -> None:
    lab = trained.copy(tmp_path)
    path = only_file(lab, "training_states")
    truncate(path)
    refused(lab, "train", str(path), "restore the file from a copy", training__tokens=12800)


def test_truncated_contexts(tokenized: Lab, no_ray: None, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    path = only_file(lab, "contexts")
    truncate(path)
    refused(lab, "train", str(path), "restore the file from a copy")


@pytest.mark.parametrize(("table", "step"), [("latents", "compact"), ("atoms", "evaluate"), ("moments", "aggregate")])
def test_a_truncated_table(table: str, step: str, finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    path = only_file(lab, table)
    truncate(path)
    if step == "compact":
        refused(lab, step, str(path), "restore the file from a copy")
    from_sql = lab.query("select count(*) from atoms")
    assert from_sql.code == 1
    assert from_sql.lines == [line for line in from_sql.lines if line.startswith("error: ") and str(path) in line]


def test_a_damaged_log(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    entry = lab.lake / "_log" / f"{0:020}.json"
    entry.write_bytes(entry.read_bytes()[:-20])
    refused(lab, "train", str(entry), "restore the file from a copy")


def remount_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def fill(disk: Path, left: int) -> None:
    """Fills a disk up to about so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with filler.open("rb+") as file:
        file.truncate(max(0, filler.stat().st_size - left))


def test_an_unwritable_lake(finished: Lab, lab: Lab, small_disk: Path) -> None:
    there = finished.copy(small_disk)
    remount_read_only(small_disk)
    refused(there, "tokenize", "cannot write", str(there.lake), corpus__name="second")
    refused(there, "compact", "cannot write", str(there.lake))
    refused(lab.without_lake(small_disk / "new"), "tokenize", "cannot write", str(small_disk))


@pytest.mark.slow
def test_what_a_training_worker_finds_wrong_is_told(tokenized: Lab, one_ray: None) -> None:
    refused(tokenized, "train", "hook", "blocks.7.hook_resid_pre", subject__hook="blocks.7.hook_resid_pre")


# Enough for none or for some of the files of a commit.
@pytest.mark.parametrize("left", [0, 8192])
def test_a_full_lake(left: int, finished: Lab, small_disk: Path) -> None:
    there = finished.copy(small_disk)
    fill(small_disk, left)
    refused(there, "tokenize", "cannot write", "No space left", str(there.lake), corpus__name="second")
    refused(there, "compact", "cannot write", "No space left", str(there.lake))


def test_a_run_that_finds_the_lake_full(trained: Lab, no_ray: None, small_disk: Path) -> None:
    there = trained.copy(small_disk)
    fill(small_disk, 8192)
    refused(there, "encode", "cannot write", "No space left", str(there.lake))


@pytest.mark.slow
def test_encoding_into_a_full_lake(trained: Lab, one_ray: None, small_disk: Path) -> None:
    there = trained.copy(small_disk)
    fill(small_disk, 8192)
    before = there.bytes()
    result = there.sae("encode")
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    for part in ("error: ", "cannot write", "No space left", str(there.lake)):
        assert part in result.stderr
    # The worker is killed, and another of its runs may be on its way to the disk.
    assert {path: data for path, data in there.bytes().items() if "/.tmp-" not in path} == before


def test_training_on_a_full_lake(tokenized: Lab, no_ray: None, small_disk: Path) -> None:
    """It began, which the log tells, and left nothing else."""
    there = tokenized.copy(small_disk)
    fill(small_disk, 20480)
    before = there.bytes()
    result = there.sae("train")
    assert result.code == 1, result.stderr
    *progress, line = result.lines  # which a slow machine tells once a minute
    assert all(each.startswith("train: ") for each in progress), result.stderr
    for part in ("error: ", "cannot write", "No space left", str(there.lake)):
        assert part in line
    after = there.bytes()
    (began,) = after.keys() - before.keys()
    assert json.loads(after.pop(began))["add"] == []
    assert after == before


def test_a_ray_that_does_not_start(tokenized: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own processes have half a minute to come up, which on an overloaded machine is too short."""

    def slow(*_: Any, **__: Any) -> None:
        raise Exception("The current node timed out during startup.")  # what Ray raises then

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    refused(tokenized, "train", "Ray did not start at local", "end other work")
