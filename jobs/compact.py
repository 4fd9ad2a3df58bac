"""Step compact: merges the sorted runs of an autoencoder into files of atom ranges, each sorted as the runs are."""

from collections.abc import Iterator
from typing import Final

import duckdb
import pyarrow as pa

from sae.jobs import progress, views
from sae.jobs.lake import DataFile, Lake, connect, write_views
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError

_BATCH_ROWS: Final = 8 * 131_072


def run(config: Run) -> None:
    """Compacts when there is more than one run that is not yet part of a range file."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    name = config.autoencoder.name
    files = snapshot.select("latents", autoencoder=name)
    if not files:
        raise IncompleteError(f"compact: {name} has no latents in {config.lake}; run sae encode first")
    if not is_worthwhile(files):
        progress.say(f"compact: the latents of {name} are compact")
        return
    connection = connect(lake.path, snapshot.version)
    ranges = _ranges(connection, name, config.compact.file_rows)
    with lake.transaction("compact") as transaction, progress.bar("compact", len(ranges), "files") as bar:
        transaction.remove(files)
        for low, high in ranges:
            transaction.write("latents", _sorted(connection, name, low, high), autoencoder=name)
            bar.advance(1)
    write_views(lake)
    progress.say(f"compact: {len(files)} files of {name} became {len(ranges)}")


def is_worthwhile(files: list[DataFile]) -> bool:
    """Whether any file is still a run among several files; a lone run is sorted as a range file would be."""
    return len(files) > 1 and any(file.run is not None for file in files)


def _ranges(connection: duckdb.DuckDBPyConnection, name: str, file_rows: int) -> list[tuple[int, int]]:
    """Inclusive atom ranges of about file_rows rows each; an atom is never split."""
    counts = connection.execute(
        "select atom, sum(n_active)::bigint from moments where autoencoder = $1 group by atom order by atom",
        [name],
    ).fetchall()
    ranges: list[tuple[int, int]] = []
    first, rows = 0, 0
    for atom, n in counts:
        if rows and rows + n > file_rows:
            ranges.append((first, atom - 1))
            first, rows = atom, 0
        rows += n
    return [*ranges, (first, counts[-1][0])] if counts else []


def _sorted(connection: duckdb.DuckDBPyConnection, name: str, low: int, high: int) -> Iterator[pa.Table]:
    rows = connection.sql(views.query("latents_of_atoms"), params={"autoencoder": name, "low": low, "high": high})
    for batch in rows.to_arrow_reader(_BATCH_ROWS):
        yield pa.Table.from_batches([batch])


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("compact")
