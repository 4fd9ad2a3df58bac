"""The section of docs/format.md that tells the tables' columns: python -m tests.format_page writes it anew.

How columns are stored is read from files that are written as the lake's are.
"""

import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from sae.jobs import formats, views
from sae.schemas.tables import SCHEMAS

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "format.md"
BEGIN: Final = "<!-- tables: begin, made by python -m tests.format_page -->\n"
END: Final = "<!-- tables: end -->\n"
_VECTORS: Final = "activations"
_OTHER_ROWS: Final = 131_072  # as in formats.write


def written(page: str) -> str:
    """The page's text with the section as the schemas have it."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def section() -> str:
    """Of all tables, in their order in schemas/tables.py."""
    return "\n".join(line for table in SCHEMAS for line in _table(table))


def _table(table: str) -> Iterator[str]:
    schema = SCHEMAS[table]
    grain, order = (schema.metadata[key].decode() for key in (b"grain", b"order"))
    yield f"### {table}\n"
    yield textwrap.fill(f"{grain[0].upper()}{grain[1:]}.", 120)
    yield f"\nSorted by {order}. {_said(table)}\n"
    stored = _stored(table)
    yield "| column | type | stored |"
    yield "|---|---|---|"
    for field in schema:
        null = ", or null" if field.nullable else ""
        yield f"| `{field.name}` | {_type(field.type)}{null} | {stored[field.name]} |"
    yield ""


def _said(table: str) -> str:
    if table == _VECTORS:
        return "Arrow IPC, one record batch, uncompressed. The log tells `corpus` and `subject` of each file."
    columns = " and ".join(f"`{name}`" for name in views._PER_FILE[table])
    rows = formats._ROW_GROUP.get(table, _OTHER_ROWS)
    return f"Row groups of {rows:,}. The log tells {columns} of each file, and the views add it as a column."


def _type(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.value_type}, as many as the activation is wide"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def _stored(table: str) -> dict[str, str]:
    """How each column is encoded in a file of one row."""
    schema = SCHEMAS[table]
    if table == _VECTORS:
        return dict.fromkeys(schema.names, "plain")
    row = pa.table([pa.array([_value(field.type)], field.type) for field in schema], schema=schema)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "one.parquet")
        formats.write(table, [row], path)
        group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(at) for at in range(group.num_columns)]
    return {chunk.path_in_schema.partition(".")[0]: _encoding(chunk.encodings) for chunk in chunks}


def _value(kind: pa.DataType) -> object:
    if pa.types.is_list(kind):
        return [_value(kind.value_type)]
    return "" if pa.types.is_string(kind) else 0


def _encoding(encodings: tuple[str, ...]) -> str:
    if "RLE_DICTIONARY" in encodings:
        return "dictionary"
    special = {"DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT"} & {*encodings}
    return special.pop() if special else "plain"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
