"""Examples are shown the same from mapped arrays and from Parquet; arrays of other contexts are not used."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sae.jobs import compact, drop
from sae.jobs.lake import Lake, connect
from sae.jobs.token_cache import Tokens, open_tokens
from sae.jobs.token_sql import contexts_of
from sae.schemas.tables import CORPUS_SHIFT
from tests.lakes import CORPUS, N_LATENTS, NAME, Small, small_lake

MACROS = [f"atom_examples('{NAME}', {atom}, '{kind}')" for atom in range(N_LATENTS) for kind in ("top", "random")]
MACROS += [f"atom_top_tokens('{NAME}', {atom})" for atom in range(N_LATENTS)] + ["example_contexts order by all"]


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_lake(tmp_path / "lake")


def answers(lake: Lake, version: int | None = None, **bounds: Any) -> list[Any]:
    connection = connect(lake.path, version, **bounds)
    return [connection.sql(f"from {macro}").fetchall() for macro in MACROS]


def uses_arrays(lake: Lake, version: int | None = None) -> bool:
    found = connect(lake.path, version).sql(
        "select count(*) from duckdb_functions() where function_name = 'context_of'"
    )
    return found.fetchall() == [(1,)]


def test_answers_are_the_same_with_and_without_arrays(small: Small) -> None:
    bounds: list[dict[str, Any]] = [{}, {"contexts": (2, 5)}, {"atoms": (1, 3), "contexts": (0, 11)}]
    before = [answers(small.lake, **each) for each in bounds]
    assert not uses_arrays(small.lake)
    assert any(before[0])
    open_tokens(small.lake, small.lake.snapshot(), CORPUS)
    assert uses_arrays(small.lake)
    assert [answers(small.lake, **each) for each in bounds] == before


def test_asking_makes_no_arrays(small: Small) -> None:
    answers(small.lake)
    assert not Path(small.config.lake, "_cache").exists()


def test_arrays_of_other_contexts_are_not_used(small: Small) -> None:
    before, version = answers(small.lake), small.lake.snapshot().version
    open_tokens(small.lake, small.lake.snapshot(), CORPUS)
    drop.text(small.lake, CORPUS, (3, 4))
    assert not uses_arrays(small.lake)
    open_tokens(small.lake, small.lake.snapshot(), CORPUS)
    assert uses_arrays(small.lake)
    assert not uses_arrays(small.lake, version)
    assert answers(small.lake, version) == before


def test_compact_makes_them_where_a_copy_by_token_is_asked_for(small: Small) -> None:
    asked = small.config.model_copy(update={"compact": small.config.compact.model_copy(update={"by_token": True})})
    compact.run(small.config)
    assert not uses_arrays(small.lake)
    compact.run(asked)
    assert uses_arrays(small.lake)


def test_contexts_of_several_corpora_come_in_the_order_that_is_asked() -> None:
    one = Tokens(0, np.array([7, 8, 9], np.uint16), np.array([0, 1, 3]), np.array([10, 11]))
    two = Tokens(1 << CORPUS_SHIFT, np.array([5], np.uint32), np.array([0, 0, 1]), np.array([20, 21]))
    base = 1 << CORPUS_SHIFT
    found = contexts_of({0: ("one", one), 1: ("two", two)}, np.array([base + 1, 1, base, 0, 5, 1]))
    assert found.to_pylist() == [
        {"corpus": "two", "doc_id": 21, "token_ids": [5]},
        {"corpus": "one", "doc_id": 11, "token_ids": [8, 9]},
        None,
        {"corpus": "one", "doc_id": 10, "token_ids": [7]},
        None,
        {"corpus": "one", "doc_id": 11, "token_ids": [8, 9]},
    ]
    assert isinstance(found, pa.StructArray)


def test_a_program_that_leaves_its_connection_open_ends_quietly(small: Small) -> None:
    open_tokens(small.lake, small.lake.snapshot(), CORPUS)
    program = (
        "from sae.jobs.lake import connect\n"
        f"lake = connect({small.config.lake!r})\n"
        f"""rows = lake.execute("from atom_examples('{NAME}', 3, 'top')").fetchall()\n"""
        "assert rows"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
