"""Step aggregate: merges the partial statistics of an autoencoder's runs into the tables `atoms` and `examples`."""

from typing import Final

from sae.jobs import checkpoints, contexts, decoders, progress, runs, views
from sae.jobs.lake import Lake, Snapshot, connect, write_views
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError

_MERGED: Final = ("atoms", "examples")


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
    given = {
        "atoms": {"n_tokens": n_tokens, "n_latents": state["n_latents"]},
        "examples": {"n": snapshot.properties[f"encode/{name}"]["examples"]},
    }
    connection = connect(lake.path, snapshot.version)
    with lake.transaction("aggregate") as transaction:
        for table in _MERGED:
            transaction.remove(snapshot.select(table, autoencoder=name))
            rows = connection.sql(views.query(table), params={"autoencoder": name, **given[table]})
            transaction.write(table, rows.to_arrow_table(), autoencoder=name)
        transaction.set(f"aggregate/{name}", merged_from)
    live = len(set(lake.read(snapshot.select("moments", autoencoder=name), ["atom"])["atom"].to_pylist()))
    progress.say(f"aggregate: {live:,} of {state['n_latents']:,} atoms fire, over {n_tokens:,} tokens")


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("aggregate")
