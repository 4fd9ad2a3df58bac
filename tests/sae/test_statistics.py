"""A run's statistics are what a slow, obvious computation over its rows gives, and partials merge exactly."""

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sae import statistics
from sae.schemas.errors import ConfigError
from sae.statistics import Columns, Fields, SortedRun, priority, round_act

Row = tuple[int, int, int, float]

# Few distinct keys and values, so that ties and hot atoms are common.
KEYS = st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 5))
ACTS = st.one_of(st.sampled_from([0.25, 0.5, 0.6, 1.0]), st.floats(2.0**-10, 50, width=32))
ROWS = st.dictionaries(KEYS, ACTS, max_size=120).map(lambda rows: [(*key, act) for key, act in rows.items()])
POSITIVE = st.floats(2.0**-100, 2.0**100, width=32)


def sorted_run(rows: list[Row]) -> SortedRun:
    atom, context_id, pos, act = zip(*rows, strict=True) if rows else ((), (), (), ())
    return SortedRun.from_rows(
        np.array(atom, np.int64), np.array(context_id, np.int64), np.array(pos, np.int64), np.array(act, np.float32)
    )


def tuples(columns: Columns) -> list[tuple[float, ...]]:
    return list(zip(*(column.tolist() for column in columns.values()), strict=True))


def stored(rows: list[Row]) -> dict[int, list[tuple[int, int, float]]]:
    """The rows of each atom as they are stored, in order."""
    by_atom: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for atom, context_id, pos, act in sorted(rows):
        by_atom[atom].append((context_id, pos, float(round_act(np.array([act]))[0])))
    return by_atom


@given(ROWS, st.randoms())
def test_rows_are_sorted_whatever_order_they_arrive_in(rows: list[Row], random: st.DataObject) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert tuples(sorted_run(shuffled).rows()) == [
        (atom, *row) for atom, atom_rows in stored(rows).items() for row in atom_rows
    ]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from([0, 1, 2**20, 2**50, 2**61]))))
def test_hashes_that_begin_alike_are_told_apart_by_their_ends(drawn: list[tuple[int, int, int]]) -> None:
    atom = np.array([a for a, _, _ in drawn], np.int32)
    hashed = np.array([(high << 62) + low for _, high, low in drawn], np.uint64)
    assert statistics._order(atom, hashed).tolist() == np.lexsort((hashed, atom)).tolist()


@given(st.data(), st.lists(st.integers(0, 2**20), min_size=1, max_size=4))
def test_packed_fields_sort_as_rows_do(data: st.DataObject, largest: list[int]) -> None:
    fields = Fields(*largest)
    rows = data.draw(st.lists(st.tuples(*(st.integers(0, each) for each in largest)), min_size=1))
    if not fields.fits:
        return
    packed = fields.pack(*(np.array(column) for column in zip(*rows, strict=True)))
    packed.sort()
    columns = fields.unpack(packed, *[np.int32] * len(largest))
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == sorted(rows)


def test_large_ids_keep_their_order() -> None:
    high = 8191 << 40
    rows = [(2**31 - 1, high + 5, 65535, 1.0), (0, high, 0, 1.0), (2**31 - 1, high, 65535, 1.0)]
    assert tuples(sorted_run(rows).rows()) == sorted(rows)


@given(ROWS)
def test_moments_are_sums_of_powers(rows: list[Row]) -> None:
    expected = []
    for atom, atom_rows in stored(rows).items():
        acts = [Fraction(act) for _, _, act in atom_rows]
        sums = [float(sum(act**power for act in acts)) for power in (1, 2, 3, 4)]
        expected.append((atom, len(acts), *sums, float(max(acts))))
    found = tuples(sorted_run(rows).moments())
    # At most 78 rows an atom: double precision sums positive terms to far better than this.
    assert [pytest.approx(row, rel=1e-13) for row in expected] == found


@given(ROWS, st.sampled_from([0.2, 0.25, 1.0]))
def test_histogram_counts_every_row_in_the_bin_that_ends_at_or_above_it(rows: list[Row], width: float) -> None:
    counts = Counter(
        (atom, math.ceil(act / width)) for atom, atom_rows in stored(rows).items() for _, _, act in atom_rows
    )
    assert tuples(sorted_run(rows).histogram(width)) == [(*key, counts[key]) for key in sorted(counts)]


@given(ROWS, st.integers(1, 5))
def test_top_has_the_contexts_with_the_highest_activation(rows: list[Row], n: int) -> None:
    expected = []
    for atom, atom_rows in stored(rows).items():
        contexts = [list(group) for _, group in itertools.groupby(atom_rows, key=lambda row: row[0])]
        peaks = [max(group, key=lambda row: (row[2], -row[1])) for group in contexts]
        expected += [(atom, *row) for row in sorted(peaks, key=lambda row: (-row[2], row[0]))[:n]]
    assert tuples(sorted_run(rows).top(n)) == expected


@given(ROWS, st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_samples_are_the_rows_with_the_smallest_priority(rows: list[Row], n: int, seed: int) -> None:
    run = sorted_run(rows)
    hashed = priority(seed, run.atom, run.context_id, run.pos).tolist()
    expected = []
    for _, group in itertools.groupby(zip(tuples(run.rows()), hashed, strict=True), key=lambda row: row[0][0]):
        expected += sorted(row for row, _ in sorted(group, key=lambda row: row[1])[:n])
    assert tuples(run.samples(n, seed)) == expected


def test_samples_of_a_hot_atom_are_complete() -> None:
    """With far more rows than are kept, a first cut by hash saves sorting them all; nothing may be lost by it."""
    n_rows, n = 30_000, 50
    run = SortedRun.from_rows(
        np.zeros(n_rows, np.int64), np.arange(n_rows) // 60, np.arange(n_rows) % 60, np.ones(n_rows, np.float32)
    )
    for seed in range(20):
        hashed = np.sort(priority(seed, run.atom, run.context_id, run.pos))
        found = run.samples(n, seed)
        kept = priority(seed, *(found[name] for name in ("atom", "context_id", "pos")))
        assert np.sort(kept).tolist() == hashed[:n].tolist()


def test_sampling_is_uniform_over_activations() -> None:
    """Over many seeds each row is drawn equally often: a chi-squared test at about five standard deviations."""
    n_rows, n, n_seeds = 200, 20, 400
    run = sorted_run([(3, row // 10, row % 10, 1.0 + row) for row in range(n_rows)])
    drawn = np.concatenate([run.samples(n, seed)["act"] for seed in range(n_seeds)]).astype(np.int64) - 1
    counts = np.bincount(drawn, minlength=n_rows)
    expected = n_seeds * n / n_rows
    # Drawing without replacement makes the variance of a count smaller than Poisson's by this factor.
    chi2 = ((counts - expected) ** 2 / (expected * (1 - n / n_rows))).sum()
    assert abs(chi2 - n_rows) < 5 * math.sqrt(2 * n_rows)


@given(ROWS, st.integers(1, 12))
def test_counts_and_sums_of_two_runs_add_up_to_those_of_their_union(rows: list[Row], cut: int) -> None:
    parts = [sorted_run([row for row in rows if (row[1] < cut) == first]) for first in (True, False)]
    whole = sorted_run(rows)

    counts: Counter[tuple[float, ...]] = Counter()
    for part in parts:
        counts.update({row[:2]: int(row[2]) for row in tuples(part.histogram(0.2))})
    assert counts == {row[:2]: row[2] for row in tuples(whole.histogram(0.2))}

    sums: dict[float, list[float]] = {}
    for row in itertools.chain.from_iterable(tuples(part.moments()) for part in parts):
        known = sums.setdefault(row[0], [0.0] * 5)
        sums[row[0]] = [a + b for a, b in zip(known, row[1:6], strict=True)]
    # Only the order of double precision sums differs.
    assert {row[0]: pytest.approx(list(row[1:6]), rel=1e-13) for row in tuples(whole.moments())} == sums


def test_a_run_without_rows_has_empty_statistics() -> None:
    run = sorted_run([])
    tables = [run.rows(), run.moments(), run.histogram(0.2), run.top(5), run.samples(5, 0)]
    assert [tuples(table) for table in tables] == [[]] * 5


@given(st.lists(POSITIVE, min_size=1))
def test_rounding_keeps_ten_mantissa_bits_and_moves_at_most_half_a_step(values: list[float]) -> None:
    act = np.array(values, np.float32)
    rounded = round_act(act)
    assert (rounded.view(np.uint32) & 0x1FFF == 0).all()
    assert (np.abs(rounded.astype(np.float64) - act) <= act.astype(np.float64) * 2.0**-11).all()
    assert (round_act(rounded) == rounded).all()
    order = np.argsort(act)
    assert (np.diff(rounded[order]) >= 0).all()


@given(POSITIVE)
def test_rounding_takes_the_nearest_and_on_a_tie_the_even_one(value: float) -> None:
    mantissa, exponent = math.frexp(np.float32(value))
    expected = math.ldexp(round(mantissa * 2**11), exponent - 11)  # Python rounds half to even
    assert round_act(np.array([value], np.float32))[0] == expected


@given(st.tuples(*[st.integers(0, 2**31 - 1)] * 4), st.tuples(*[st.integers(0, 2**31 - 1)] * 4))
def test_every_key_changes_the_priority(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assume(one != other)

    def hashed(keys: tuple[int, ...]) -> int:
        atom, context_id, pos = (np.array([key]) for key in keys[1:])
        return int(priority(keys[0], atom, context_id, pos)[0])

    assert hashed(one) != hashed(other)


def test_priorities_never_change() -> None:
    """Samples of lakes made years apart must merge: a known value, computed with Python's integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    keys: list[npt.NDArray[np.int64]] = [np.array([12]), np.array([5 << 40]), np.array([63])]
    assert int(priority(7, *keys)[0]) == mix(mix(mix(mix(7) ^ 12) ^ 5 << 40) ^ 63)


def test_bins_that_are_too_narrow_to_be_numbered_are_refused() -> None:
    run = sorted_run([(0, 0, 0, 1.0)])
    assert run.histogram(2.0**-30)["bin"].tolist() == [2**30]
    with pytest.raises(ConfigError, match=r"encode\.bin_width: got 4\.\d+e-10, too narrow .*; widen it"):
        run.histogram(2.0**-31)


@given(ROWS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_examples_of_several_runs_are_those_of_all_rows(rows: list[Row], n_runs: int, n: int, seed: int) -> None:
    runs = [sorted_run([row for row in rows if row[1] % n_runs == run]) for run in range(n_runs)]
    top = statistics.merged_top(joined([run.top(n) for run in runs]), n)
    assert tuples(top) == tuples(sorted_run(rows).top(n))
    samples = statistics.merged_samples(joined([run.samples(n, seed) for run in runs]), n, seed)
    keys = [samples[name] for name in ("atom", "context_id", "pos")]
    hashed = priority(seed, *keys)
    assert sorted(zip(keys[0], hashed, strict=True)) == list(zip(keys[0], hashed, strict=True))
    assert sorted(tuples(samples)) == tuples(sorted_run(rows).samples(n, seed))


def joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@given(ROWS, st.integers(1, 5), st.integers(0, 3))
def test_atoms_of_several_runs_are_those_of_all_rows(rows: list[Row], n_runs: int, more_tokens: int) -> None:
    n_atoms, n_tokens = 6, 200 + more_tokens
    runs = [sorted_run([row for row in rows if row[1] % n_runs == run]) for run in range(n_runs)]
    found = statistics.atoms((run.moments() for run in runs), range(n_atoms), n_tokens)
    by_atom = stored(rows)
    for atom in range(n_atoms):
        acts = np.array([act for _, _, act in by_atom.get(atom, [])])
        mean, square, cube, fourth = (float((acts**power).sum()) / n_tokens for power in range(1, 5))
        assert found["n_active"][atom] == len(acts)
        assert found["density"][atom] == len(acts) / n_tokens
        assert found["max_act"][atom] == acts.max(initial=0)
        assert found["mean_act"][atom] == pytest.approx(mean)
        assert found["mean_act_squared"][atom] == pytest.approx(square)
        if len(acts):
            assert found["skew"][atom] == pytest.approx(cube / square**1.5)
            assert found["kurtosis"][atom] == pytest.approx(fourth / square**2)
        else:
            assert np.isnan(found["skew"][atom])
            assert np.isnan(found["kurtosis"][atom])
