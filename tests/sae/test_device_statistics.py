"""The tables that torch computes of a run are those that numpy computes, whose tests say what is in them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.device_statistics import BYTES_PER_ROW, DeviceRun, RunBuilder, room
from sae.schemas.errors import ConfigError
from sae.statistics import Columns, RunStatistics, SortedRun
from tests.latent_rows import power_law_rows, tables

Row = tuple[int, int, int, float]

BASE = 8191 << 40  # the last corpus that ids have room for
ATOMS = st.one_of(st.integers(0, 3), st.sampled_from([2**17, 2**31 - 1]))
POSITIONS = st.one_of(st.integers(0, 4), st.sampled_from([2**15 - 1, 2**15, 2**16 - 1]))
KEYS = st.tuples(ATOMS, st.integers(BASE, BASE + 12), POSITIONS)
# Few values, so that peaks are tied; two that become equal only when rounded; and the whole range of float32.
ACTS = st.one_of(
    st.sampled_from([0.25, 1.0, 1.0 + 2.0**-12, 2.0**-149, 2.0**-126, 4e8]),
    st.floats(0, 4e8, width=32, exclude_min=True, allow_subnormal=True),
)
ROWS = st.dictionaries(KEYS, ACTS, max_size=150).map(lambda rows: [(*key, act) for key, act in rows.items()])


def tensors(rows: list[Row]) -> tuple[Tensor, ...]:
    """Columns as an autoencoder gives them."""
    columns = list(zip(*rows, strict=True)) or [()] * 4
    kinds = (torch.int64, torch.int64, torch.int64, torch.float32)
    return tuple(torch.tensor(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True))


def by_numpy(rows: tuple[Tensor, ...]) -> SortedRun:
    return SortedRun.from_rows(*(column.cpu().numpy() for column in rows))


def assert_same_table(found: Columns, expected: Columns) -> None:
    assert list(found) == list(expected)
    for name, column in expected.items():
        assert found[name].dtype == column.dtype, name
        if name.startswith("sum_act"):
            # Only the order of additions of positive doubles differs.
            np.testing.assert_allclose(found[name], column, rtol=1e-12, atol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], column, name)


def assert_same_tables(found: RunStatistics, expected: RunStatistics) -> None:
    assert len(found) == len(expected)
    for one, other in zip(tables(found), tables(expected), strict=True):
        assert_same_table(one, other)


@given(ROWS, st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from([0.3, 0.5, 7.0]))
def test_every_table_is_that_of_numpy(rows: list[Row], n: int, seed: int, width: float) -> None:
    columns = tensors(rows)
    found, expected = DeviceRun.from_rows(*columns), by_numpy(columns)
    assert len(found) == len(expected)
    assert_same_table(found.rows(), expected.rows())
    assert_same_table(found.moments(), expected.moments())
    assert_same_table(found.histogram(width), expected.histogram(width))
    assert_same_table(found.top(n), expected.top(n))
    assert_same_table(found.samples(n, seed), expected.samples(n, seed))


@given(ROWS, st.randoms())
def test_the_order_of_arrival_does_not_matter(rows: list[Row], random: st.DataObject) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (tables(DeviceRun.from_rows(*tensors(order))) for order in (rows, shuffled))
    for found, expected in zip(one, other, strict=True):
        for name, column in expected.items():
            assert found[name].tobytes() == column.tobytes(), name


@pytest.mark.parametrize("n_atoms", [1, 300])
def test_a_hot_atom_is_like_any_other(n_atoms: int) -> None:
    """With far more rows than are kept as examples; a single atom fires on every token."""
    columns = power_law_rows(60_000, n_atoms, torch.device("cpu"))
    assert np.bincount(columns[0].numpy()).max() > 1000
    assert_same_tables(DeviceRun.from_rows(*columns), by_numpy(columns))


@pytest.mark.parametrize("width", [2.0**-31, 1e-300])
def test_bins_that_are_too_narrow_to_be_numbered_are_refused(width: float) -> None:
    run = DeviceRun.from_rows(*tensors([(0, 0, 0, 1.0)]))
    assert run.histogram(2.0**-30)["bin"].tolist() == [2**30]
    with pytest.raises(ConfigError, match=r"encode\.bin_width: got .*, too narrow .*; widen it"):
        run.histogram(width)


@pytest.mark.parametrize(("allowed", "kind"), [(0, SortedRun), (29, SortedRun), (30, DeviceRun)])
def test_a_run_with_too_many_rows_is_sorted_on_the_host(allowed: int, kind: type[RunStatistics]) -> None:
    columns = tensors([(i % 4, BASE + i // 5, i % 5, 1.0 + i) for i in range(30)])
    builder = RunBuilder(allowed)
    for part in zip(*(column.split(7) for column in columns), strict=True):
        builder.add(*part)
    run = builder.sorted()
    assert type(run) is kind
    assert_same_tables(run, by_numpy(columns))


def test_a_run_may_have_no_rows() -> None:
    builder = RunBuilder(10)
    builder.add(*tensors([]))
    assert [{len(column) for column in table.values()} for table in tables(builder.sorted())] == [{0}] * 5


def test_nothing_is_sorted_on_a_cpu_that_acts_as_device() -> None:
    assert room(torch.device("cpu")) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [[], [(3, BASE, 65535, 0.7)]])
def test_a_gpu_takes_runs_of_no_row_and_of_one(rows: list[Row]) -> None:
    columns = tuple(column.cuda() for column in tensors(rows))
    assert_same_tables(DeviceRun.from_rows(*columns), by_numpy(columns))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [0.2, 0.35, 0.7])
def test_a_gpu_divides_by_the_width_of_a_bin_as_numpy_does(width: float) -> None:
    """Values at and next to the edges of bins, where a product with the reciprocal lands on the other side."""
    act = torch.arange(1, 2**14, dtype=torch.float32) / 64
    at = torch.arange(len(act))
    columns = tuple(column.cuda() for column in (at * 0, at, at * 0, act))
    assert_same_table(DeviceRun.from_rows(*columns).histogram(width), by_numpy(columns).histogram(width))


@pytest.mark.gpu
def test_a_big_run_on_a_gpu_is_that_of_numpy_and_always_has_the_same_bytes() -> None:
    device = torch.device("cuda")
    columns = power_law_rows(16_000_000, 32_768, device)
    n = len(columns[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = tables(DeviceRun.from_rows(*columns))
    assert torch.cuda.max_memory_allocated() - before < BYTES_PER_ROW * n
    for found, expected in zip(first, tables(by_numpy(columns)), strict=True):
        assert_same_table(found, expected)
    shuffled = torch.randperm(n, device=device)
    for order in (slice(None), shuffled):
        for found, expected in zip(tables(DeviceRun.from_rows(*(c[order] for c in columns))), first, strict=True):
            assert {name: column.tobytes() for name, column in found.items()} == {
                name: column.tobytes() for name, column in expected.items()
            }


@pytest.mark.gpu
def test_rows_on_a_gpu_go_to_the_host_when_they_are_too_many() -> None:
    columns = power_law_rows(4096, 50, torch.device("cuda"))
    for allowed, kind in ((2000, SortedRun), (room(torch.device("cuda")), DeviceRun)):
        builder = RunBuilder(allowed)
        for part in zip(*(column.split(1000) for column in columns), strict=True):
            builder.add(*part)
        run = builder.sorted()
        assert type(run) is kind
        assert_same_tables(run, by_numpy(columns))
