"""Step aggregate: merges the partial statistics of an autoencoder's runs into the tables `atoms` and `examples`."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from sae import statistics
from sae.jobs import checkpoints, contexts, decoders, progress, runs, views
from sae.jobs.lake import DataFile, Lake, Snapshot, connect, write_views
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError
from sae.schemas.tables import ATOMS


def run(config: Run) -> None:
    """Refreshes the tables when runs were added or dropped since they were made."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    name, corpus = config.autoencoder.name, config.corpus.name
    made = snapshot.properties.get(f"encode/{name}")
    moments = snapshot.select("moments", autoencoder=name)
    if made is None or not moments:
        raise IncompleteError(f"aggregate: nothing is encoded with {name} in {config.lake}; run sae encode first")
    contexts.state_of(snapshot, corpus)
    for each in {corpus, *(file.corpus or "" for file in moments)}:
        plan, missing = runs.outstanding(snapshot, "encode", name, each, made["run_tokens"])
        missing = [run for run in missing if runs.drop_mark(name, each, run) not in snapshot.properties]
        if missing:
            raise IncompleteError(
                f"aggregate: {len(missing)} of {plan.n_runs} runs of {each} are not encoded; run sae encode first"
            )
    if snapshot.properties.get(f"aggregate/{name}") == _identity(moments):
        progress.say(f"aggregate: atoms of {name} are up to date")
    else:
        merge(lake, name)
    decoders.refresh(lake, name)
    write_views(lake)


def merge(lake: Lake, name: str) -> None:
    """Replaces `atoms` and `examples` of an autoencoder by what its runs give.

    Raises ConflictError where another did so meanwhile, or runs were dropped.
    """
    with lake.transaction("aggregate") as transaction:
        snapshot = transaction.base
        state = checkpoints.state_of(snapshot, name)
        moments = snapshot.select("moments", autoencoder=name)
        atoms = merged_atoms(lake, snapshot, name, state["n_latents"])
        connection = connect(lake.path, snapshot.version)
        given = {"autoencoder": name, "n": snapshot.properties[f"encode/{name}"]["examples"]}
        examples = connection.sql(views.query("examples"), params=given).to_arrow_table()
        for table, rows in (("atoms", atoms), ("examples", examples)):
            transaction.remove(snapshot.select(table, autoencoder=name))
            transaction.write(table, rows, autoencoder=name)
        merged = f"aggregate/{name}"
        before = snapshot.properties.get(merged)
        transaction.set(merged, _identity(moments))
        transaction.require(lambda now: now.properties.get(merged) == before, f"{merged}: changed")
        transaction.require(lambda now: all(file.path in now.files for file in moments), f"runs of {name}: dropped")
    live = int(np.count_nonzero(atoms["n_active"].to_numpy()))
    n_tokens = sum(file.tokens for file in moments)
    progress.say(f"aggregate: {live:,} of {state['n_latents']:,} atoms fire, over {n_tokens:,} tokens")


def _identity(moments: Iterable[DataFile]) -> list[str]:
    """Of the runs that atoms are merged from."""
    return sorted(file.sha256 for file in moments)


def merged_atoms(lake: Lake, snapshot: Snapshot, name: str, n_latents: int) -> pa.Table:
    """The table `atoms` of an autoencoder, from the moments of its runs."""
    files = sorted(snapshot.select("moments", autoencoder=name), key=lambda file: (file.corpus or "", file.run or 0))
    partials = ({column: found[column].to_numpy() for column in found.column_names} for found in _each(lake, files))
    columns = statistics.atoms(partials, n_latents, max(1, sum(file.tokens for file in files)))
    arrays = [pa.array(columns[field.name], from_pandas=field.nullable) for field in ATOMS]
    return pa.table(arrays, names=ATOMS.names).cast(ATOMS)


def _each(lake: Lake, files: Iterable[DataFile]) -> Iterator[pa.Table]:
    for file in files:
        yield lake.read([file])


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("aggregate")
