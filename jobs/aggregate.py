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
    if made is None:
        raise IncompleteError(f"aggregate: nothing is encoded with {name} in {config.lake}; run sae encode first")
    contexts.state_of(snapshot, corpus)
    for each in {corpus, *(file.corpus or "" for file in snapshot.select("moments", autoencoder=name))}:
        plan, missing = runs.outstanding(snapshot, "encode", name, each, made["run_tokens"])
        if missing:
            raise IncompleteError(
                f"aggregate: {len(missing)} of {plan.n_runs} runs of {each} are not encoded; run sae encode first"
            )
    merged_from = sorted(file.sha256 for file in snapshot.select("moments", autoencoder=name))
    if snapshot.properties.get(f"aggregate/{name}") == merged_from:
        progress.say(f"aggregate: atoms of {name} are up to date")
    else:
        merge(lake, snapshot, name, merged_from)
    decoders.refresh(lake, name)
    write_views(lake)


def merge(lake: Lake, snapshot: Snapshot, name: str, merged_from: list[str]) -> None:
    """Replaces `atoms` and `examples` of an autoencoder by what its runs of the snapshot give."""
    state = checkpoints.state_of(snapshot, name)
    n_tokens = sum(file.tokens for file in snapshot.select("moments", autoencoder=name))
    atoms = merged_atoms(lake, snapshot, name, state["n_latents"])
    connection = connect(lake.path, snapshot.version)
    given = {"autoencoder": name, "n": snapshot.properties[f"encode/{name}"]["examples"]}
    examples = connection.sql(views.query("examples"), params=given).to_arrow_table()
    with lake.transaction("aggregate") as transaction:
        for table, rows in (("atoms", atoms), ("examples", examples)):
            transaction.remove(snapshot.select(table, autoencoder=name))
            transaction.write(table, rows, autoencoder=name)
        transaction.set(f"aggregate/{name}", merged_from)
    live = int(np.count_nonzero(atoms["n_active"].to_numpy()))
    progress.say(f"aggregate: {live:,} of {state['n_latents']:,} atoms fire, over {n_tokens:,} tokens")


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
