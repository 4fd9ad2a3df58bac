"""Step aggregate: merges the partial statistics of an autoencoder's runs into the tables `atoms` and `examples`."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from sae.jobs import checkpoints, contexts, decoders, partials, progress, runs
from sae.jobs.lake import DataFile, Lake, Snapshot, write_views
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError


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
        n_latents = checkpoints.state_of(snapshot, name)["n_latents"]
        moments = snapshot.select("moments", autoencoder=name)
        transaction.remove(file for table in ("atoms", "examples") for file in snapshot.select(table, autoencoder=name))
        live = 0

        def counted() -> Iterator[pa.Table]:
            nonlocal live
            for rows in partials.atoms(lake, moments, n_latents):
                live += int(np.count_nonzero(rows["n_active"].to_numpy()))
                yield rows

        transaction.write("atoms", counted(), autoencoder=name)
        transaction.write("examples", _examples(lake, snapshot, name, n_latents), autoencoder=name)
        merged = f"aggregate/{name}"
        before = snapshot.properties.get(merged)
        transaction.set(merged, _identity(moments))
        transaction.require(lambda now: now.properties.get(merged) == before, f"{merged}: changed")
        transaction.require(lambda now: all(file.path in now.files for file in moments), f"runs of {name}: dropped")
    n_tokens = sum(file.tokens for file in moments)
    progress.say(f"aggregate: {live:,} of {n_latents:,} atoms fire, over {n_tokens:,} tokens")


def _examples(lake: Lake, snapshot: Snapshot, name: str, n_latents: int) -> Iterator[pa.Table]:
    """Those of the runs that were merged before are not merged again, unless one of them is gone."""
    moments = snapshot.select("moments", autoencoder=name)
    before = snapshot.select("examples", autoencoder=name)
    known = set(snapshot.properties.get(f"aggregate/{name}") or []) if before else set()
    if not known <= set(_identity(moments)):
        before, known = [], set()
    new = {(file.corpus, file.run) for file in moments if file.sha256 not in known}
    top, samples = (
        [file for file in snapshot.select(table, autoencoder=name) if (file.corpus, file.run) in new]
        for table in ("top", "samples")
    )
    encoding = snapshot.properties[f"encode/{name}"]
    return partials.examples(lake, top, samples, before, n_latents, encoding["examples"], encoding["seed"])


def _identity(moments: Iterable[DataFile]) -> list[str]:
    """Of the runs that atoms are merged from."""
    return sorted(file.sha256 for file in moments)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("aggregate")
