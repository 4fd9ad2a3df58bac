"""A corpus that stopped at a bad row behind its first shards goes on, or starts afresh, with the right rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from sae.jobs import tokenize
from sae.jobs.lake import Lake, connect
from tests.tiny_run import CORPUS, Lab, rows

TABLES = ("documents", "contexts", "vocabulary")


def document(number: int) -> str:
    return json.dumps({"text": f"the lazy dog paid {number} yen " * 5})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Rows of which one behind the first shards is bad."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(document, range(12)), "{", *map(document, range(12, 16))]))
    return path


@pytest.fixture
def stopped(lab: Lab, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lake with the shards in front of the bad row."""
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 100)
    monkeypatch.setattr(tokenize, "_BATCH_DOCUMENTS", 2)
    there = lab.without_lake(tmp_path / "stopped")
    result = there.sae("tokenize", corpus__paths=[str(file)])
    assert (result.code, len(result.lines)) == (1, 1)
    assert f"{file}:13" in result.stderr
    state = Lake(str(there.lake)).snapshot().properties[f"corpus/{CORPUS}"]
    assert state["n_shards"] >= 2
    assert not state["complete"]
    return there


def assert_same_tables(one: Lab, other: Lab) -> None:
    for table in TABLES:
        assert rows(one.lake, table) == rows(other.lake, table), table


def test_tokenizing_goes_on_once_bad_rows_are_to_be_skipped(stopped: Lab, lab: Lab, file: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"corpus__paths": [str(file)], "corpus__on_bad_row": "skip"}
    assert "1 bad row" in stopped.done("tokenize", **given).stderr
    fresh = lab.without_lake(tmp_path / "fresh")
    fresh.done("tokenize", **given)
    assert len(rows(stopped.lake, "documents")) == 16
    assert_same_tables(stopped, fresh)


def test_an_unfinished_corpus_starts_afresh_with_changed_files(
    stopped: Lab, lab: Lab, file: Path, tmp_path: Path
) -> None:
    file.write_text("\n".join(map(document, range(40, 46))))
    assert "starting it afresh" in stopped.done("tokenize", corpus__paths=[str(file)]).stderr
    fresh = lab.without_lake(tmp_path / "fresh")
    fresh.done("tokenize", corpus__paths=[str(file)])
    assert len(rows(stopped.lake, "documents")) == 6
    assert_same_tables(stopped, fresh)
    stopped.done("tokenize", corpus__name="second", corpus__paths=[str(file)])
    query = "select distinct context_id >> 40 as number from contexts order by number"
    assert connect(str(stopped.lake)).sql(query).fetchall() == [(0,), (1,)], "starting afresh takes no second number"
