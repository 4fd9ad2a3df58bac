"""The SQL files on tables made by hand."""

import duckdb
import pyarrow as pa

from sae.jobs import views
from sae.schemas.tables import SCHEMAS

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
