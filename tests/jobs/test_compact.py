"""Merging sorted runs: the same rows in the same order, in little memory, and no more often than is worth it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import compact, formats, merge
from sae.jobs.encode import commit_run
from sae.jobs.lake import Lake, connect
from sae.jobs.runs import Plan
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError, LakeError
from sae.schemas.tables import LATENTS
from sae.statistics import SortedRun

ENCODING = {"checkpoint": "c", "seed": 0, "run_tokens": 8, "bin_width": 0.2, "examples": 5}
PLAN = Plan(0, 10_000, 2)
Row = tuple[int, int, int]


def table(rows: list[Row]) -> pa.Table:
    atom, context, pos = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table([atom, context, pos, [1.0 + a % 7 for a in atom]], schema=LATENTS)


def triples(found: pa.Table) -> list[Row]:
    return list(zip(*(found[name].to_pylist() for name in ("atom", "context_id", "pos")), strict=True))


keys = st.tuples(st.integers(0, 6) | st.sampled_from([70_000, 10**7]), st.integers(0, 12), st.integers(0, 3))


@given(
    rows=st.sets(keys, max_size=60),
    owners=st.randoms(use_true_random=False),
    n_chains=st.integers(1, 4),
    disjoint=st.booleans(),
    row_group=st.integers(1, 9),
    low=st.integers(0, 7),
    high=st.integers(0, 7) | st.just(10**8),
)
def test_chains_become_one_stream_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    rows: set[Row],
    owners: Any,
    n_chains: int,
    disjoint: bool,
    row_group: int,
    low: int,
    high: int,
) -> None:
    folder = tmp_path_factory.mktemp("chains")
    owned: list[list[Row]] = [[] for _ in range(n_chains)]
    for row in sorted(rows):
        owned[row[1] % n_chains if not disjoint else row[1] * n_chains // 13].append(row)
    chains = []
    for number, mine in enumerate(owned):
        # Some chains are of two files, cut between two atoms.
        cut = owners.choice([0, *(at for at in range(1, len(mine)) if mine[at][0] != mine[at - 1][0])])
        paths: list[str] = []
        for part in filter(None, (mine[:cut], mine[cut:])):
            paths.append(str(folder / f"{number}-{len(paths)}.parquet"))
            pq.write_table(table(part), paths[-1], row_group_size=row_group)
        chains.append(paths)
    found = list(merge.merged(chains, (low, high)))
    expected = sorted(row for row in rows if low <= row[0] <= high)
    assert [row for part in found for row in triples(part)] == expected
    assert [act for part in found for act in part["act"].to_pylist()] == [1.0 + atom % 7 for atom, _, _ in expected]


def test_only_whole_row_groups_but_for_the_last(tmp_path: Path) -> None:
    atoms = np.repeat(np.arange(50, dtype=np.int32), 6000)
    paths = []
    for number in range(2):
        columns = [atoms, np.tile(np.arange(6000), 50) + 6000 * number, np.zeros(len(atoms)), np.ones(len(atoms))]
        paths.append(str(tmp_path / f"{number}.parquet"))
        pq.write_table(pa.table(columns, names=LATENTS.names).cast(LATENTS), paths[-1], row_group_size=131_072)
    sizes = [len(part) for part in merge.merged([[path] for path in paths], (0, 49))]
    assert all(size % 131_072 == 0 for size in sizes[:-1])
    assert sum(sizes) == 2 * len(atoms)


def config(lake: Path, **of_compact: int) -> Run:
    return Run.model_validate(
        {
            "lake": str(lake),
            "subject": {"model": "m", "hook": "h"},
            "corpus": {"name": "c", "paths": ["x"], "context_length": 4},
            "autoencoder": {"name": "a", "n_latents": 64, "k": 2},
            "training": {"tokens": 8, "batch_tokens": 8},
            "compact": of_compact,
        }
    )


def add_runs(path: Path, numbers: range) -> None:
    lake = Lake(str(path), create=True)
    with lake.transaction("test") as transaction:
        transaction.set("corpus/c", {"number": 0, "n_contexts": PLAN.n_contexts, "context_length": 4})
    for run in numbers:
        generator = np.random.default_rng(run)
        key = generator.choice(64 * 8, 40, replace=False)
        first = PLAN.bounds(run)[0]
        latents = SortedRun.from_rows(key // 8, first + key % 8 // 4, key % 4, generator.random(40) + 0.1)
        commit_run(lake, "a", "c", ENCODING, PLAN, run, latents, 8)


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    query = "select atom, context_id, pos, act from latents order by all"
    return connect(str(path)).sql(query).fetchall()


def layout(path: Path) -> list[tuple[int | None, int]]:
    return [(file.run, file.rows) for file in Lake(str(path)).snapshot().select("latents")]


def test_runs_become_range_files_with_the_same_rows(tmp_path: Path) -> None:
    add_runs(tmp_path, range(5))
    before = rows_of(tmp_path)
    compact.run(config(tmp_path))
    assert layout(tmp_path) == [(None, 200)]
    assert rows_of(tmp_path) == before
    version = Lake(str(tmp_path)).snapshot().version
    compact.run(config(tmp_path))
    assert Lake(str(tmp_path)).snapshot().version == version
    (file,) = Lake(str(tmp_path)).snapshot().select("latents")
    stored = pq.read_table(Lake(str(tmp_path)).absolute(file))
    assert triples(stored) == sorted(triples(stored))


def test_what_is_much_larger_is_left_alone_until_enough_is_new(tmp_path: Path) -> None:
    add_runs(tmp_path, range(20))
    compact.run(config(tmp_path))
    add_runs(tmp_path, range(20, 22))
    compact.run(config(tmp_path))
    assert sorted(rows for _, rows in layout(tmp_path)) == [80, 800]
    add_runs(tmp_path, range(22, 24))
    compact.run(config(tmp_path))
    assert sorted(rows for _, rows in layout(tmp_path)) == [960]
    assert len(rows_of(tmp_path)) == 960


def test_several_ranges_are_made_side_by_side(tmp_path: Path, one_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Footers tell where a file can be cut: runs of several row groups are needed.
    monkeypatch.setitem(formats._ROW_GROUP, "latents", 8)
    add_runs(tmp_path, range(4))
    before = rows_of(tmp_path)
    # More memory than there is anywhere: no reason to wait for ever.
    compact.run(config(tmp_path, file_rows=50, memory_mb=10**7))
    files = Lake(str(tmp_path)).snapshot().select("latents")
    atoms = sorted(file.atoms for file in files if file.atoms)
    assert len(atoms) > 2
    assert all(one[1] < other[0] for one, other in itertools.pairwise(atoms))
    assert rows_of(tmp_path) == before


def test_as_many_files_as_before_are_other_files(
    tmp_path: Path, one_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats._ROW_GROUP, "latents", 8)
    add_runs(tmp_path, range(2))
    compact.run(config(tmp_path, file_rows=48))
    files = Lake(str(tmp_path)).snapshot().select("latents")
    assert [file.run for file in files] == [None, None]
    views = (tmp_path / "views.sql").read_text()
    assert all(file.path in views for file in files)


def test_more_runs_than_memory_has_room_for(tmp_path: Path) -> None:
    add_runs(tmp_path, range(11))
    before = rows_of(tmp_path)
    compact.run(config(tmp_path, memory_mb=100))
    assert rows_of(tmp_path) == before
    assert layout(tmp_path) == [(None, 440)]


def test_runs_without_a_row_leave_no_file(tmp_path: Path) -> None:
    nothing = SortedRun.from_rows(*(np.empty(0, kind) for kind in (np.int32, np.int64, np.uint16, np.float32)))
    add_runs(tmp_path, range(1))
    for run in (1, 2):
        commit_run(Lake(str(tmp_path)), "a", "c", ENCODING, PLAN, run, nothing, 8)
    assert layout(tmp_path) == [(0, 40), (1, 0), (2, 0)]
    compact.run(config(tmp_path))
    assert layout(tmp_path) == [(0, 40)]
    assert connect(str(tmp_path)).sql("select run, n_tokens from runs order by run").fetchall() == [
        (0, 8),
        (1, 8),
        (2, 8),
    ]
    version = Lake(str(tmp_path)).snapshot().version
    compact.run(config(tmp_path))
    assert Lake(str(tmp_path)).snapshot().version == version


def test_a_damaged_run_changes_nothing(tmp_path: Path) -> None:
    add_runs(tmp_path, range(3))
    lake = Lake(str(tmp_path))
    path = Path(lake.absolute(lake.snapshot().select("latents")[1]))
    path.write_bytes(b"x" * path.stat().st_size)
    before = layout(tmp_path)
    with pytest.raises(LakeError, match=f"{path}: damaged"):
        compact.run(config(tmp_path))
    assert layout(tmp_path) == before
    assert len(list((tmp_path / "latents").rglob("*.parquet"))) == 3


def test_nothing_encoded(tmp_path: Path) -> None:
    add_runs(tmp_path, range(0))
    with pytest.raises(IncompleteError, match="run sae encode first"):
        compact.run(config(tmp_path))
