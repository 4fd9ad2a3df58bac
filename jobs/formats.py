"""How each table is laid out on disk, and how its files are written and read: Parquet, and Arrow IPC for vectors."""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae.jobs import storage
from sae.schemas.errors import LakeError
from sae.schemas.tables import EFFECTS, FLOATS, LATENTS, SCHEMAS, activations

# Rows of latents are sorted, so that deltas of the keys are tiny; pos and act have few distinct values.
_LATENTS: Final[dict[str, Any]] = {
    "use_dictionary": ["pos", "act"],
    "column_encoding": {"atom": "DELTA_BINARY_PACKED", "context_id": "DELTA_BINARY_PACKED"},
}
# No two weights are equal, but their exponents are alike: an eighth smaller than with a dictionary.
_DECODERS: Final[dict[str, Any]] = {"use_dictionary": False, "use_byte_stream_split": ["direction.list.element"]}
# Numbers as directions are; a token of 49,152 takes its two bytes.
_EFFECTS: Final[dict[str, Any]] = {
    "use_dictionary": False,
    "use_byte_stream_split": [f"{field.name}.list.element" for field in EFFECTS if field.type == FLOATS],
}
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "latents": _LATENTS,
    "latents_by_token": _LATENTS,
    "decoders": _DECODERS,
    "effects": _EFFECTS,
}
LATENTS_ROW_GROUP: Final = 131_072
# Of partials, one of every run is in memory while they are merged; of examples, one is read to show an atom.
_PARTIALS: Final = {"moments": 32_768, "top": 32_768, "samples": 32_768}
_ROW_GROUP: Final = {"contexts": 512, "latents": LATENTS_ROW_GROUP, "examples": 16_384, "effects": 256, **_PARTIALS}


def write(table: str, batches: Iterable[pa.Table], path: str) -> int:
    """Writes tables of one schema, in order, to a local path; returns the number of rows.

    Each batch starts a new row group, so that a caller streams in multiples of the group's size.
    """
    rows = 0
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_page_index": True}
    with pq.ParquetWriter(path, SCHEMAS[table], **options, **_OPTIONS.get(table, {})) as writer:
        for batch in batches:
            writer.write_table(batch.cast(SCHEMAS[table]), row_group_size=_ROW_GROUP.get(table, 131_072))
            rows += batch.num_rows
    return rows


def read(path: str, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """The rows of one file; raises LakeError where it is damaged."""
    try:
        return pq.read_table(_source(path), columns=columns, filters=filters, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def _source(path: str) -> str | BinaryIO:
    """What Arrow reads: of an object only the parts that it needs."""
    return path if storage.is_local(path) else storage.open_object(path)


def _damaged(path: str, error: Exception) -> LakeError:
    return LakeError(f"{path}: damaged or unreadable file ({' '.join(str(error).split())}); restore it from a copy")


def parquet(path: str) -> pq.ParquetFile:
    """A Parquet file, opened; raises LakeError where it is damaged."""
    try:
        return pq.ParquetFile(_source(path), memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of latents: inclusive ranges of its atoms and contexts, and the largest position."""

    path: str
    number: int
    rows: int
    atoms: tuple[int, int]
    contexts: tuple[int, int]
    last_pos: int

    def overlaps(self, atoms: tuple[int, int]) -> bool:
        return self.atoms[0] <= atoms[1] and self.atoms[1] >= atoms[0]


def row_groups(path: str) -> Iterator[RowGroup]:
    """Of a file of latents, from its footer; raises LakeError where it is damaged."""
    footer = parquet(path).metadata
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        bounds = [group.column(LATENTS.names.index(name)).statistics for name in ("atom", "context_id", "pos")]
        atoms, contexts, pos = ((found.min, found.max) for found in bounds)
        yield RowGroup(path, number, group.num_rows, atoms, contexts, pos[1])


def columns(path: str, file: pq.ParquetFile, row_group: int, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Columns without nulls of one row group, as numpy arrays [m]."""
    try:
        found = file.read_row_group(row_group, list(names), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None
    return {name: found[name].to_numpy() for name in found.column_names}


def batches(path: str, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Columns of a file in order, so many rows at a time; raises LakeError where it is damaged."""
    try:
        yield from parquet(path).iter_batches(rows, columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def list_elements(path: str) -> int:
    """Elements of all lists of a file of which one column holds lists, none empty; from its footer."""
    footer = parquet(path).metadata
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return sum(max(group.column(at).num_values for at in range(group.num_columns)) for group in groups)


def rows_of_atoms(path: str, file: pq.ParquetFile, names: Sequence[str], atoms: tuple[int, int]) -> Iterator[pa.Table]:
    """Columns, `atom` among them, of the rows of an inclusive range of atoms in a file that is sorted by atom.

    A table for each row group that holds some; no other is read. Raises LakeError where the file is damaged.
    """
    footer = file.metadata
    column = footer.schema.names.index("atom")

    def bounds(number: int) -> tuple[int, int]:
        found = footer.row_group(number).column(column).statistics
        return found.min, found.max

    groups = range(footer.num_row_groups)
    first = bisect.bisect_left(groups, atoms[0], key=lambda number: bounds(number)[1])
    for number in groups[first:]:
        if bounds(number)[0] > atoms[1]:
            return
        try:
            rows = file.read_row_group(number, list(names), use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from None
        start, stop = np.searchsorted(rows["atom"].to_numpy(), [atoms[0], atoms[1] + 1])
        yield rows.slice(start, stop - start)


def column_range(table: pa.Table, column: str) -> tuple[int, int] | None:
    """Lowest and highest value of an integer column; None where the table lacks it or is empty."""
    if column not in table.column_names or table.num_rows == 0:
        return None
    bounds = pc.min_max(table[column]).as_py()
    return int(bounds["min"]), int(bounds["max"])


def widest(ranges: Iterator[tuple[int, int] | None]) -> tuple[int, int] | None:
    known = [bounds for bounds in ranges if bounds is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def write_vectors(context_id: npt.NDArray[Any], pos: npt.NDArray[Any], vectors: npt.NDArray[Any], path: str) -> None:
    """Writes rows of the activations table, vectors float16 [m, d], as an uncompressed Arrow IPC file."""
    schema = activations(vectors.shape[1])
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=schema.field("vector").type)
    batch = pa.record_batch([pa.array(context_id), pa.array(pos), values], schema=schema)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def new_array(path: str, kind: npt.DTypeLike, length: int) -> "np.memmap[Any, Any]":
    """An array of zeros that is the local .npy file, mapped."""
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(length,))
    return array


def map_vectors(path: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """context_id [m] and vectors float16 [m, d] of an activations file, mapped into memory, not read."""
    batch = _mapped(path)
    vectors = batch["vector"]
    return batch["context_id"].to_numpy(), np.asarray(vectors.values).reshape(len(vectors), vectors.type.list_size)


def map_positions(path: str) -> npt.NDArray[Any]:
    """pos [m] of an activations file."""
    return np.asarray(_mapped(path)["pos"].to_numpy())


def _mapped(path: str) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(path)).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None
