"""The table `decoders`: every atom's direction as a row, so that SQL can compare atoms by cosine.

It is made beside `atoms`, not with each checkpoint: a training commits many, and encodes with one.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sae.jobs import checkpoints, progress
from sae.jobs.lake import Lake
from sae.schemas.tables import DECODERS

_FILE_BYTES: Final = 256 << 20
_GROUP_BYTES: Final = 16 << 20


def refresh(lake: Lake, name: str) -> None:
    """Writes the directions of the weights that the autoencoder's latents are encoded with, unless they are there.

    Where training went on since and those weights are no longer kept, it says so and changes nothing.
    """
    snapshot = lake.snapshot()
    encoded_with = snapshot.properties[f"encode/{name}"]["checkpoint"]
    if snapshot.properties.get(f"decoders/{name}") == encoded_with:
        return
    place = checkpoints.find(snapshot, name, encoded_with)
    if place is None:
        progress.say(f"aggregate: no decoders of {name}, the weights that encoded it ({encoded_with}) are not kept")
        return
    shards, prefix = place
    state = snapshot.properties[f"autoencoder/{name}"]
    tied: bool = state["config"]["tied"]
    prefix += "encoder." if tied else "decoder."
    at_once = atoms_per_file(state["d_model"])
    with checkpoints.open_shards(lake, snapshot, shards) as files, lake.transaction("decoders") as transaction:
        transaction.remove(snapshot.select("decoders", autoencoder=name))
        for start in range(0, state["n_latents"], at_once):
            atoms = range(start, min(start + at_once, state["n_latents"]))
            weight = checkpoints.read_opened(files, shards, [atoms], prefix)["weight"]
            # An encoder is [n, d], a decoder [d, n].
            rows = _rows(weight if tied else weight.T, atoms.start)
            transaction.write("decoders", rows, autoencoder=name)
        transaction.set(f"decoders/{name}", encoded_with)


def atoms_per_file(d_model: int) -> int:
    """Of so many features each."""
    return max(1, _FILE_BYTES // (4 * d_model))


def _rows(dictionary: Tensor, first: int) -> Iterator[pa.Table]:
    """Unit-norm rows of a dictionary [n, d] whose first atom is told, in batches of a row group each."""
    for part in dictionary.split(max(1, _GROUP_BYTES // (4 * dictionary.shape[1]))):
        directions = torch.nn.functional.normalize(part.float(), dim=1).contiguous()
        n, width = directions.shape
        offsets = pa.array(np.arange(0, n * width + 1, width, dtype=np.int32))
        rows = pa.ListArray.from_arrays(offsets, pa.array(directions.numpy().reshape(-1)))
        numbers = pa.array(np.arange(first, first + n, dtype=np.int32))
        yield pa.table([numbers, rows.cast(DECODERS.field("direction").type)], schema=DECODERS)
        first += n
