"""Files whose bytes are damaged while their size is right: found when they are read, told in one line."""

import json
from pathlib import Path

import pytest

from tests.lakes import NAME, Small, small_lake
from tests.tiny_run import Result, sae


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_lake(tmp_path / "lake")


def step(small: Small, name: str) -> Result:
    """The step through the command line; a JSON text is a YAML one."""
    config = Path(small.config.lake).with_name("run.yaml")
    config.write_text(json.dumps(small.config.model_dump(mode="json")))
    return sae(name, config)


def damage(small: Small, table: str) -> None:
    for file in small.lake.snapshot().select(table):
        path = Path(small.lake.absolute(file))
        data = path.read_bytes()
        # The footer stays, so that what it says of the pages is false.
        path.write_bytes(data[:4] + b"\xff" * (len(data) // 3) + data[4 + len(data) // 3 :])


def assert_one_line(result: Result) -> None:
    assert result.code == 1
    (line,) = (line for line in result.lines if not line.startswith("export:"))
    assert line.startswith("error: ")
    assert "damaged" in line


@pytest.mark.parametrize("table", ["moments", "top", "samples"])
def test_aggregate(small: Small, table: str) -> None:
    with small.lake.transaction("test") as transaction:
        transaction.set(f"aggregate/{NAME}", None)
    damage(small, table)
    before = small.lake.snapshot().version
    assert_one_line(step(small, "aggregate"))
    assert small.lake.snapshot().version == before


@pytest.mark.parametrize("table", ["latents", "atoms", "contexts"])
def test_export(small: Small, table: str) -> None:
    damage(small, table)
    assert_one_line(step(small, "export"))
