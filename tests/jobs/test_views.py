"""The SQL files on tables made by hand, and the views on the files of a small lake."""

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import views
from sae.jobs.lake import connect
from sae.schemas.errors import ConfigError
from sae.schemas.tables import SCHEMAS
from tests.lakes import CONTEXTS_PER_RUN, N_LATENTS, NAME, Small, small_lake

WORDS = ["Once", " upon", " time", " there", " lived"]


def rows_as(table: str, **columns: list[object]) -> pa.Table:
    """Rows in the table's own column types, those that are not given null."""
    schema = SCHEMAS[table]
    n = len(next(iter(columns.values())))
    return pa.table(
        [pa.array(columns.get(field.name, [None] * n), field.type) for field in schema],
        schema=pa.schema([pa.field(field.name, field.type) for field in schema]),
    )


def test_interesting_atoms_shows_peaks_at_the_start_of_a_context() -> None:
    """A peak has fewer tokens before it than the snippet would show."""
    connection = duckdb.connect()
    positions: list[object] = [0, 1]
    tables = {
        "examples": rows_as(
            "examples", atom=[0, 1], kind=["top"] * 2, rank=[0, 0], context_id=[7, 7], pos=positions, act=[2.0, 1.0]
        ),
        "atoms": rows_as("atoms", atom=[0, 1], density=[0.01, 0.01], max_act=[2.0, 1.0]),
        "contexts": rows_as("contexts", context_id=[7], doc_id=[0], start=[0], token_ids=[[0, 1, 2, 3, 4]]),
        "vocabulary": rows_as("vocabulary", token_id=list(range(5)), token=list(WORDS)),
    }
    owner = {"examples": "autoencoder", "atoms": "autoencoder", "contexts": "corpus", "vocabulary": "corpus"}
    for name, table in tables.items():
        connection.register("given", table)
        connection.execute(f"create table {name} as select *, 'x' as {owner[name]} from given")
    found = connection.execute(views.query("interesting_atoms"), {"autoencoder": "x", "n": 5}).fetchall()
    assert [(atom, context) for atom, _, _, _, context in found] == [
        (0, "[Once] upon time there lived"),
        (1, "Once[upon] time there lived"),
    ]


RANGES = st.none() | st.tuples(st.integers(-1, 9), st.integers(-1, 22)).map(lambda pair: (min(pair), max(pair)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """With the latents of each atom in files of their own, beside the runs that hold all."""
    small = small_lake(tmp_path_factory.mktemp("views") / "lake")
    rows = connect(small.config.lake).sql("select atom, context_id, pos, act from latents").to_arrow_table()
    with small.lake.transaction("split") as transaction:
        transaction.remove(small.lake.snapshot().select("latents")[:2])
        for atom in range(N_LATENTS):
            chosen = (pc.field("atom") == atom) & (pc.field("context_id") < 2 * CONTEXTS_PER_RUN)
            transaction.write("latents", rows.filter(chosen), autoencoder=NAME)
    return small


@given(atoms=RANGES, contexts=RANGES)
def test_a_limited_connection_shows_the_rows_of_the_whole_that_are_within(
    small: Small, atoms: views.Range | None, contexts: views.Range | None
) -> None:
    whole, limited = connect(small.config.lake), connect(small.config.lake, atoms=atoms, contexts=contexts)
    bounds = {key: bound for key, bound in (("atom", atoms), ("context_id", contexts)) if bound is not None}
    for table in (*views.TABLES, "example_contexts"):
        schema = SCHEMAS[table if table in views.TABLES else "examples"]
        keys = [key for key in bounds if key in schema.names]
        within = "".join(f" and {key} between {bounds[key][0]} and {bounds[key][1]}" for key in keys)
        query = f"select * from {table} where true{within} order by all"
        assert limited.sql(f"select * from {table} order by all").fetchall() == whole.sql(query).fetchall()


@pytest.mark.parametrize(("atoms", "contexts"), [((3, 2), None), (None, (1, 0))])
def test_a_range_that_ends_before_it_begins_is_refused(
    small: Small, atoms: views.Range | None, contexts: views.Range | None
) -> None:
    with pytest.raises(ConfigError, match="give the first and the last that you want, in this order"):
        connect(small.config.lake, atoms=atoms, contexts=contexts)
