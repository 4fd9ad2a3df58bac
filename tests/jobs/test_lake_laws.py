"""Whatever is encoded, merged and dropped, in any order: the lake answers like one table of the rows that are left."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.jobs import aggregate, by_token, compact, drop, encode, formats, partials
from sae.jobs.lake import Lake, connect
from sae.jobs.runs import outstanding, unit
from sae.schemas.tables import CORPUS_SHIFT, SCHEMAS
from sae.statistics import SortedRun, priority

NAME: Final = "a"
N_ATOMS, N_CONTEXTS, PER_RUN, WIDTH, EXAMPLES = 5, 9, 2, 3, 3
CORPORA = {"one": 0, "two": 1}
ENCODING: dict[str, Any] = {
    "checkpoint": "c",
    "seed": 4,
    "run_tokens": PER_RUN * WIDTH,
    "bin_width": 0.2,
    "examples": EXAMPLES,
}
RUNS = [(corpus, run) for corpus in CORPORA for run in range(-(-N_CONTEXTS // PER_RUN))]
# So few that most activations are tied; none is changed by the rounding to 10 bits.
ACTS = np.array([0, 0, 0, 0.25, 0.375, 1.0, 3.5], np.float32)
Row = tuple[int, int, int, float]


@dataclass
class World:
    """A lake, and what it should hold: acts [context, position, atom], lengths [context], by corpus."""

    lake: Lake
    acts: dict[str, npt.NDArray[np.float32]]
    lengths: dict[str, npt.NDArray[np.int64]]
    alive: set[tuple[str, int]] = field(default_factory=set)
    encoded: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def new(cls, folder: Path, draw: np.random.Generator) -> "World":
        lake = Lake(str(folder), create=True)
        shape = N_CONTEXTS, WIDTH, N_ATOMS
        lengths = {corpus: draw.integers(1, WIDTH + 1, N_CONTEXTS) for corpus in CORPORA}
        acts = {corpus: draw.choice(ACTS, shape) for corpus in CORPORA}
        with lake.transaction("test") as transaction:
            for corpus, number in CORPORA.items():
                acts[corpus][np.arange(WIDTH) >= lengths[corpus][:, None]] = 0
                # Position 0 is masked.
                acts[corpus][:, 0] = 0
                ids = np.arange(N_CONTEXTS) + (number << CORPUS_SHIFT)
                rows = {"context_id": ids, "doc_id": ids, "start": np.zeros(N_CONTEXTS)}
                tokens = [[0] * length for length in lengths[corpus]]
                table = pa.table({**rows, "token_ids": tokens}).cast(SCHEMAS["contexts"])
                transaction.write("contexts", table, corpus=corpus)
                counts = {"n_documents": 0, "n_contexts": N_CONTEXTS, "n_tokens": int(lengths[corpus].sum())}
                fixed = {"number": number, "context_length": WIDTH, "complete": True}
                transaction.set(f"corpus/{corpus}", {**counts, **fixed, "made_with": {"subject.model": "m"}})
            trained = {"n_latents": N_ATOMS, "masked_positions": [0], "complete": True}
            transaction.set(f"autoencoder/{NAME}", trained)
        return cls(lake, acts, lengths, {(corpus, each) for corpus in CORPORA for each in range(N_CONTEXTS)})

    def held(self, corpus: str, run: int) -> list[int]:
        """The contexts that are left of a run."""
        mine = range(run * PER_RUN, min((run + 1) * PER_RUN, N_CONTEXTS))
        return [context for context in mine if (corpus, context) in self.alive]

    def n_tokens(self, corpus: str, run: int) -> int:
        return sum(int(self.lengths[corpus][context]) - 1 for context in self.held(corpus, run))

    def rows(self, corpus: str, run: int) -> list[Row]:
        """(atom, context_id, pos, act) of a run."""
        base = CORPORA[corpus] << CORPUS_SHIFT
        return [
            (int(atom), base + context, int(pos), float(self.acts[corpus][context, pos, atom]))
            for context in self.held(corpus, run)
            for pos, atom in zip(*np.nonzero(self.acts[corpus][context]), strict=True)
        ]

    def every_row(self) -> list[Row]:
        return sorted(row for run in self.encoded for row in self.rows(*run))


def sorted_run(rows: list[Row]) -> SortedRun:
    atom, context, pos, act = np.array(rows, float).reshape(-1, 4).T
    return SortedRun.from_rows(atom.astype(np.int32), context.astype(np.int64), pos.astype(np.uint16), act)


# What is done to the world.


def encode_run(world: World, corpus: str, run: int) -> None:
    plan, missing = outstanding(world.lake.snapshot(), "encode", NAME, corpus, ENCODING["run_tokens"])
    wanted = (corpus, run) not in world.encoded and bool(world.held(corpus, run))
    assert (run in missing) == wanted
    if wanted:
        latents = sorted_run(world.rows(corpus, run))
        tokens = world.n_tokens(corpus, run)
        encode.commit_run(world.lake, NAME, corpus, ENCODING, plan, run, latents, tokens)
        world.encoded.add((corpus, run))


def merge(world: World, chosen: int, file_rows: int) -> None:
    """Some of the sorted sets, in files of that many rows."""
    sets = compact.sorted_sets(world.lake.snapshot().select("latents", autoencoder=NAME))
    some = [each for number, each in enumerate(sets) if chosen >> number & 1 and each.rows]
    if some:
        compact.merge_sets(world.lake, NAME, some, file_rows)


def copy_by_token(world: World, memory: int) -> None:
    """Those that have no copy, so many bytes of rows at once."""
    before = set(world.lake.snapshot().select(by_token.TABLE))
    n = len(by_token.missing(world.lake.snapshot(), NAME))
    assert by_token.refresh(world.lake, NAME, memory) == n
    now = world.lake.snapshot().select(by_token.TABLE)
    assert before <= set(now)
    assert len(now) == len(before) + n
    assert {(file.corpus, file.run) for file in now} == {run for run in world.encoded if world.rows(*run)}


def drop_run(world: World, corpus: str, run: int) -> None:
    if (corpus, run) in world.encoded:
        taken = drop.latents(world.lake, corpus, [NAME], run)
        assert taken == len(world.rows(corpus, run))
        world.encoded.remove((corpus, run))


def drop_latents(world: World, corpus: str) -> None:
    mine = {(of, run) for of, run in world.encoded if of == corpus}
    if mine:
        drop.latents(world.lake, corpus, [NAME])
        world.encoded -= mine


def drop_contexts(world: World, corpus: str, first: int, last: int) -> None:
    base = CORPORA[corpus] << CORPUS_SHIFT
    gone = {(corpus, context) for context in range(first, last + 1)} & world.alive
    if len(gone) < sum(of == corpus for of, _ in world.alive):
        assert drop.text(world.lake, corpus, (base + first, base + last))[0] == len(gone)
        world.alive -= gone
        world.encoded = {run for run in world.encoded if world.held(*run)}


def merge_statistics(world: World) -> None:
    if world.encoded:
        aggregate.merge(world.lake, NAME)


runs_ = st.sampled_from(RUNS)
corpora = st.sampled_from(sorted(CORPORA))
contexts = st.tuples(st.integers(0, N_CONTEXTS - 1), st.integers(0, 3)).map(
    lambda at: (at[0], min(sum(at), N_CONTEXTS - 1))
)
steps = st.one_of(
    runs_.map(lambda run: (encode_run, run)),
    st.tuples(st.integers(1, 2**10), st.sampled_from([4, 10**6])).map(lambda how: (merge, how)),
    st.sampled_from([32, 300, 10**6]).map(lambda memory: (copy_by_token, (memory,))),
    runs_.map(lambda run: (drop_run, run)),
    st.tuples(corpora, contexts).map(lambda what: (drop_contexts, (what[0], *what[1]))),
    st.just((merge_statistics, ())),
    corpora.map(lambda corpus: (drop_latents, (corpus,))),
)


@given(first=st.permutations(RUNS), more=st.lists(steps, max_size=9), seed=st.integers(0, 2**20))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_answers_are_those_of_one_table_of_what_is_left(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    first: list[tuple[str, int]],
    more: list[tuple[Any, tuple[Any, ...]]],
    seed: int,
) -> None:
    # Footers tell where a file can be cut: files of several row groups are needed, and several parts of the atoms.
    for table in ("latents", "moments", "top", "samples", "examples"):
        monkeypatch.setitem(formats._ROW_GROUP, table, 4)
    monkeypatch.setattr(partials, "_ATOMS_AT_ONCE", 3)
    monkeypatch.setattr(partials, "_ROWS_AT_ONCE", 20)
    world = World.new(tmp_path_factory.mktemp("lake"), np.random.default_rng(seed))
    for run in first[: seed % 7 + 1]:
        encode_run(world, *run)
    for step, arguments in more:
        step(world, *arguments)
    encode_run(world, *first[0])
    merge_statistics(world)
    check(world)


def check(world: World) -> None:
    lake, snapshot = world.lake, world.lake.snapshot()
    connection = connect(lake.path)

    def answer(query: str) -> list[Any]:
        return connection.sql(query).fetchall()

    rows = world.every_row()
    assert answer("select atom, context_id, pos, act from latents order by all") == rows
    for file in snapshot.select("latents"):
        assert rows_in_order(lake.read([file]))
    check_by_token(world, rows, answer)
    units = {unit("encode", NAME, *run) for run in world.encoded}
    assert {each for each in snapshot.units if each.startswith("encode/")} == units
    tokens = {run: world.n_tokens(*run) for run in world.encoded}
    assert sorted(answer("select corpus, run, n_tokens from runs")) == sorted((*run, n) for run, n in tokens.items())
    assert answer("select corpus, n_contexts, n_tokens from corpora order by corpus") == [
        (corpus, len(alive), sum(int(world.lengths[corpus][context]) for context in alive))
        for corpus in CORPORA
        for alive in [[context for of, context in world.alive if of == corpus]]
    ]
    check_partials(world, answer)
    if world.encoded:
        check_atoms(rows, sum(tokens.values()), answer)
        check_examples(rows, answer)


def check_by_token(world: World, rows: list[Row], answer: Any) -> None:
    """Whatever runs have a copy, all rows are there once; a copy is in order and holds what its run does."""
    assert answer("select atom, context_id, pos, act from latents_by_token order by all") == rows
    for file in world.lake.snapshot().select(by_token.TABLE):
        columns = world.lake.read([file]).select(["context_id", "pos", "atom", "act"]).to_pydict().values()
        own = [(context, pos, atom, act) for atom, context, pos, act in world.rows(str(file.corpus), file.run or 0)]
        assert list(zip(*columns, strict=True)) == sorted(own)


def rows_in_order(table: pa.Table) -> bool:
    found = list(zip(*(table[name].to_pylist() for name in ("atom", "context_id", "pos")), strict=True))
    return found == sorted(found)


def check_partials(world: World, answer: Any) -> None:
    """They are those of runs that never held anything else, to the last bit."""
    for corpus, run in world.encoded:
        tables = encode.run_tables(sorted_run(world.rows(corpus, run)), ENCODING)
        for table in ("moments", "histograms", "top", "samples"):
            columns = tables[table]
            expected = list(zip(*(column.tolist() for column in columns.values()), strict=True))
            found = answer(f"select {', '.join(columns)} from {table} where corpus = '{corpus}' and run = {run}")
            assert sorted(found) == sorted(expected)


def check_atoms(rows: list[Row], n_tokens: int, answer: Any) -> None:
    names = "n_active, n_tokens, mean_act, mean_act_squared, skew, kurtosis, max_act"
    for atom, *found in answer(f"select atom, {names} from atoms order by atom"):
        act = np.array([row[3] for row in rows if row[0] == atom])
        assert found[:2] == [len(act), max(1, n_tokens)]
        if len(act):
            one, two, three, four = ((act**power).sum() / n_tokens for power in (1, 2, 3, 4))
            expected = [one, two, three / two**1.5, four / two**2, act.max()]
            np.testing.assert_allclose(found[2:], expected, rtol=1e-12)
    bins = Counter((atom, int(np.ceil(act / ENCODING["bin_width"]))) for atom, _, _, act in rows)
    found = answer("select atom, bin, sum(n) from histograms group by all")
    assert sorted(found) == sorted((*key, n) for key, n in bins.items())


def check_examples(rows: list[Row], answer: Any) -> None:
    columns = "select rank, context_id, pos, act from examples"
    for atom in range(N_ATOMS):
        mine = [row[1:] for row in rows if row[0] == atom]
        peaks: dict[int, tuple[int, int, float]] = {}
        for context, pos, act in mine:
            if context not in peaks or act > peaks[context][2]:
                peaks[context] = context, pos, act
        top = sorted(peaks.values(), key=lambda row: (-row[2], row[0]))[:EXAMPLES]
        places = (np.array([row[column] for row in mine], np.int64) for column in (0, 1))
        hashed = priority(ENCODING["seed"], np.full(len(mine), atom), *places)
        order = np.argsort(hashed, kind="stable")[:EXAMPLES]
        expected = {"top": top, "random": [mine[at] for at in order]}
        for kind, wanted in expected.items():
            found = answer(f"{columns} where atom = {atom} and kind = '{kind}' order by rank")
            assert found == [(rank, *row) for rank, row in enumerate(wanted)]
