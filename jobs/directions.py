"""The tables `logits` and `neighbours`: what follows from decoder rows, and from a sample of activations, of all atoms.

Each is made anew where the weights or the merged runs that it was made from are no longer those of the lake.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from torch.nn import functional as F

from sae import neighbours
from sae.direct_logits import direct_logits
from sae.jobs import activity, checkpoints, cluster, progress
from sae.jobs.lake import Lake, Snapshot
from sae.kernels.extremes import extremes
from sae.schemas.config import Run
from sae.schemas.tables import SCHEMAS
from sae.subject import Subject

_LOGITS: int = 1 << 24  # numbers of a block of them


def stale(snapshot: Snapshot, name: str, sources: Mapping[str, Any]) -> list[str]:
    """The tables that are not made from what they would be now."""
    return [table for table, source in sources.items() if snapshot.properties.get(f"{table}/{name}") != source]


def sources(source: Mapping[str, Any], config: Run) -> dict[str, dict[str, Any]]:
    """What each table is made from, given the same of the effects."""
    return {
        "logits": {"checkpoint": source["checkpoint"], "tokens": config.effects.logits},
        "neighbours": {
            **{key: source[key] for key in ("checkpoint", "aggregate")},
            "atoms": config.effects.neighbours,
            "seed": config.seed,
        },
    }


def refresh(config: Run, made_from: Mapping[str, Any]) -> None:
    """Makes those of the tables that are stale."""
    lake, name = Lake(config.lake), config.autoencoder.name
    tables = stale(lake.snapshot(), name, made_from)
    if not tables:
        return
    with cluster.connected(config):
        task = ray.remote(_make).options(**cluster.worker_options(config, 1))
        try:
            for table in tables:
                rows = ray.get(task.remote(config, table, made_from[table]))
                progress.say(f"effects: {rows:,} rows of {table} of {name}")
        except RayError as error:
            raise cluster.cause(error) from None


@torch.no_grad()
def _make(config: Run, table: str, source: dict[str, Any]) -> int:
    """Replaces a table's rows of an autoencoder; returns how many there are."""
    device = cluster.use_device(1)
    lake, name = Lake(config.lake), config.autoencoder.name
    chosen = config.encode.weights, config.encode.checkpoint
    rows = F.normalize(checkpoints.load(lake, name, *chosen).decoder_rows.float(), dim=1).to(device)
    with lake.transaction(table) as transaction:
        transaction.remove(transaction.base.select(table, autoencoder=name))
        if table == "logits":
            parts = _logits(rows, Subject.load(**config.subject.model_dump(), device=device), source["tokens"])
        else:
            parts = _neighbours(
                rows, activity.sampled(lake, transaction.base, name, config.seed, device), source["atoms"]
            )
        file = transaction.write(table, parts, autoencoder=name)
        transaction.set(f"{table}/{name}", source)
        key = f"encode/{name}"
        encoding = transaction.base.properties[key]
        transaction.require(lambda now: now.properties.get(key) == encoding, f"{key}: changed")
    return file.rows


def _logits(rows: Tensor, subject: Subject, n: int) -> Iterator[pa.Table]:
    logits = direct_logits(subject)
    if logits is None:
        progress.say(f"effects: no logits, no direct path leads from {subject.hook} to them")
        return
    first, n = 0, min(n, subject.vocab_size)
    for part in rows.split(max(1, _LOGITS // subject.vocab_size)):
        found = logits(part)
        kinds = {"down": extremes(found, n, largest=False), "up": extremes(found, n, largest=True)}
        yield _ranked("logits", first, kinds)
        first += len(part)


def _neighbours(rows: Tensor, active: neighbours.Activity, n: int) -> Iterator[pa.Table]:
    at_once = neighbours.block(len(rows))
    for first in range(0, len(rows), at_once):
        last = min(first + at_once, len(rows)) - 1
        kinds = {"coactive": active.correlated(first, last, n), "near": neighbours.nearest(rows, first, last, n)}
        yield _ranked("neighbours", first, kinds)


def _ranked(table: str, first: int, kinds: Mapping[str, tuple[Tensor, Tensor]]) -> pa.Table:
    """Rows of atoms from the first on; of each kind, in alphabetical order, numbers and values [b, k] by rank.

    A value of -infinity stands for nothing.
    """
    schema = SCHEMAS[table]
    numbers, values = (torch.cat(parts, dim=1).cpu() for parts in zip(*kinds.values(), strict=True))
    b, width = numbers.shape
    kind = np.concatenate([np.full(of.shape[1], at) for at, (of, _) in enumerate(kinds.values())])
    rank = np.concatenate([np.arange(of.shape[1]) for of, _ in kinds.values()])
    kept = torch.isfinite(values).flatten().numpy()
    names = pa.array(list(kinds)).take(pa.array(np.tile(kind, b)[kept]))
    atom = np.repeat(np.arange(first, first + b), width)[kept]
    columns = [atom, names, np.tile(rank, b)[kept], numbers.flatten().numpy()[kept], values.flatten().numpy()[kept]]
    return pa.table(columns, names=schema.names).cast(schema)
