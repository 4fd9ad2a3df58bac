"""What a training step of a TopK autoencoder costs on a mesh of GPUs: plain arithmetic on its sizes.

Shapes: B rows of a replica, d features, n latents, k selected latents per row, m dead latents; of n and m a rank has
1/tp. Bytes are those of GPUs: products in bfloat16, master weights and sums in float32.
"""

from dataclasses import dataclass
from typing import Final, Literal

from sae.kernels.encode import scratch_rows
from sae.kernels.topk import GROUP
from sae.kernels.update import CHUNK
from sae.sparse_step import MULTI

_HALF: Final = 2
_FULL: Final = 4
# A candidate of a sharded top-k: its value as it came, put in order, and whether it won.
_CANDIDATE: Final = 2 * _FULL + 1
# Values, their gradients, latents' numbers, the index and what sorting it takes, for each selected latent.
_ENTRY: Final = 40

Items = dict[str, int]


@dataclass(frozen=True)
class Mesh:
    """tp ranks share the latents of one autoencoder, dp groups of them the rows of a batch."""

    tp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class Sizes:
    """Of one training.

    batch: tokens of a step, of all replicas together
    dead: share of the latents that are dead; AuxK costs in proportion to it
    buffered: tokens that are shuffled together, in how many lanes; vector_item: bytes of one of their numbers
    subject: bytes of the subject model's weights; subject_flops: of its forward, for each token
    readers: ranks that read the batches, where they are more than those of the mesh: in a sweep
    """

    batch: int
    d_model: int
    n_latents: int
    k: int
    auxk: int = 256
    dead: float = 0.1
    ema: bool = True
    clip: bool = False
    multi: bool = False
    buffered: int = 0
    lanes: int | None = None
    vector_item: int = _FULL
    subject: int = 0
    subject_flops: int = 0
    readers: int | None = None

    @property
    def parameters(self) -> int:
        """Encoder, its bias, decoder, and the bias of the reconstruction."""
        return self.n_latents * (2 * self.d_model + 1) + self.d_model

    @property
    def model_bytes(self) -> int:
        """Of a checkpoint's weights on disk, with the statistics of each latent that the published format has."""
        return _FULL * self.parameters + (8 + 2 * _FULL) * self.n_latents

    @property
    def state_bytes(self) -> int:
        """Of what a training goes on from: weights, statistics, both moments, the average."""
        return self.model_bytes + (3 if self.ema else 2) * _FULL * self.parameters

    def rows(self, mesh: Mesh) -> int:
        """B."""
        return self.batch // mesh.dp

    def read_by(self, mesh: Mesh) -> int:
        """Ranks of which each reads its share of a batch."""
        return self.readers or mesh.ranks

    def chunk(self, mesh: Mesh) -> int:
        """Tokens of the shuffle on a rank: those of its lanes."""
        readers = self.read_by(mesh)
        lanes = self.lanes or readers
        return -(-lanes // readers) * (self.buffered // lanes)

    def local(self, mesh: Mesh) -> int:
        """Latents of a rank."""
        return self.n_latents // mesh.tp

    def local_dead(self, mesh: Mesh) -> int:
        return int(self.dead * self.local(mesh)) if self.auxk else 0

    def selections(self) -> int:
        """Latents that are reconstructed with, per row, but for AuxK's."""
        return self.k * (1 + MULTI) if self.multi else self.k

    def candidates(self) -> int:
        """Latents that are found per row, of which the best k are selected."""
        return self.k * MULTI if self.multi else self.k

    def entries(self, mesh: Mesh) -> int:
        """Places for the selected latents of a replica's rows, which Multi-TopK takes twice."""
        return self.rows(mesh) * self.candidates() * (1 + self.multi)


def flops(sizes: Sizes) -> Items:
    """Floating-point operations of a step, of all ranks together."""
    batch, d = sizes.batch, sizes.d_model
    # Forward, gradient of the values, gradients of both weights.
    sparse = 4 * 2 * batch * sizes.selections() * d
    # The same with all dead latents for k, and their encoder product.
    aux = 5 * 2 * batch * sizes.local_dead(Mesh()) * d
    return {
        "encoder product": 2 * batch * d * sizes.n_latents,
        "sparse parts": sparse,
        "AuxK": aux,
        "subject model": batch * sizes.subject_flops,
    }


def memory(sizes: Sizes, mesh: Mesh) -> Items:
    """Bytes on the GPU of a rank, item by item; what is zero is left out."""
    owned = sizes.parameters // mesh.ranks
    held = 2 * sizes.local(mesh) * sizes.d_model
    entries, tp = sizes.entries(mesh), mesh.tp
    gradients = held + (held // mesh.dp if mesh.dp > 1 else 0)  # what is sent, and this rank's share of the sum
    kept = {
        "master weights": _FULL * owned,
        "Adam's moments": 2 * _FULL * owned,
        "moving average": _FULL * owned if sizes.ema else 0,
        "working copies": _HALF * held,
        # One in use, and the next both in the order of the text and shuffled.
        "shuffle buffer": 3 * sizes.chunk(mesh) * sizes.d_model * sizes.vector_item,
        "subject model": sizes.subject,
    }
    of_step = {
        "gradients": _FULL * gradients if mesh.dp > 1 or sizes.clip else 0,
        "rows and errors": sizes.rows(mesh) * sizes.d_model * _row_bytes(sizes, mesh),
        "selected latents": entries * (_ENTRY + (_CANDIDATE * tp if tp > 1 else 0)),
        "sums of frequent latents": 2 * _FULL * sizes.d_model * (entries // CHUNK),
        "pre-activations": scratch(sizes.rows(mesh), sizes.local(mesh)),
        "AuxK": _aux_memory(sizes, mesh),
    }
    return {name: size for name, size in (kept | of_step).items() if size}


def _row_bytes(sizes: Sizes, mesh: Mesh) -> int:
    """Of each feature of a row: activations, those without the bias, and errors; parts of a reconstruction."""
    # Multi-TopK has two errors, and lays them and the rows one behind the other.
    own = 2 * _HALF * (4 if sizes.multi else 1)
    if mesh.ranks == sizes.read_by(mesh) and mesh.tp == 1:
        return sizes.vector_item + own
    # What is gathered is gathered ahead of its use.
    return 2 * sizes.vector_item + own + (_FULL if mesh.tp > 1 else 0)


def scratch(rows: int, latents: int) -> int:
    """Pre-activations and the maxima of their groups, for as many rows as are held at a time."""
    padded = -(-latents // 128) * 128
    held = min(rows, scratch_rows(padded * _HALF))
    return _HALF * held * (padded + padded // GROUP)


def _aux_memory(sizes: Sizes, mesh: Mesh) -> int:
    """Copies of the dead latents' weights, gradients of all rows and of a block, and what one block needs."""
    dead, rows, d = sizes.local_dead(mesh), sizes.rows(mesh), sizes.d_model
    if not dead:
        return 0
    block = min(rows, scratch_rows(dead * _HALF))
    candidates = _CANDIDATE * mesh.tp * min(sizes.auxk, dead) if mesh.tp > 1 else 0
    # Latents dense, as they are found and as they are kept, and the gradients before and behind the threshold.
    of_block = block * (4 * _HALF * dead + 2 * _HALF * d + candidates)
    return 2 * dead * d * (_HALF + _FULL * (1 if block == rows else 2)) + of_block


@dataclass(frozen=True)
class Transfer:
    """A collective of every step. `size`: bytes of the whole result; `sent`: bytes that each rank sends for it."""

    what: str
    operation: Literal["all-gather", "all-reduce", "reduce-scatter"]
    over: Literal["tp", "dp", "all"]
    ranks: int
    size: int

    @property
    def sent(self) -> int:
        """By a ring, which sends no less than any other way."""
        passes = 2 if self.operation == "all-reduce" else 1
        return passes * self.size * (self.ranks - 1) // self.ranks


def transfers(sizes: Sizes, mesh: Mesh) -> list[Transfer]:
    """What the ranks tell each other in a step."""
    readers, d = sizes.read_by(mesh), sizes.d_model
    rows = Transfer("rows of the batch", "all-gather", "all", readers, sizes.vector_item * sizes.batch * d)
    sums = Transfer("gradients of the bias, sums", "all-reduce", "all", mesh.ranks, _FULL * (3 * d + 7))
    return [
        *([rows] if readers > mesh.ranks else []),
        *(_of_rows(sizes, mesh) if mesh.tp > 1 else []),
        *(_of_weights(sizes, mesh) if mesh.dp > 1 else []),
        *([sums] if mesh.ranks > 1 else []),
    ]


def _of_rows(sizes: Sizes, mesh: Mesh) -> list[Transfer]:
    """Latents are split: every rank of a group needs all rows, the best of all latents, and all parts of a sum."""
    tp, rows, d = mesh.tp, sizes.rows(mesh), sizes.d_model
    found_here = rows * min(sizes.candidates(), sizes.local(mesh)) * (1 + sizes.multi)
    dead = sizes.local_dead(mesh)
    found = [
        Transfer("rows of the batch", "all-gather", "tp", tp, sizes.vector_item * rows * d),
        Transfer("candidates of top-k", "all-gather", "tp", tp, _FULL * tp * found_here),
        Transfer("reconstructions", "all-reduce", "tp", tp, _FULL * rows * d * (1 + sizes.multi)),
    ]
    if dead:
        found += [
            Transfer("candidates of AuxK", "all-gather", "tp", tp, _FULL * tp * rows * min(sizes.auxk, dead)),
            Transfer("reconstructions of AuxK", "all-reduce", "tp", tp, _FULL * rows * d),
        ]
    return found


def _of_weights(sizes: Sizes, mesh: Mesh) -> list[Transfer]:
    """Rows are split: a rank sums and moves its share of the latents, for all replicas."""
    local, dp, d = sizes.local(mesh), mesh.dp, sizes.d_model
    return [
        Transfer("gradients", "reduce-scatter", "dp", dp, _FULL * local * (2 * d + 1)),
        Transfer("new weights", "all-gather", "dp", dp, local * (2 * _HALF * d + _FULL)),
        Transfer("latents that fired", "all-reduce", "dp", dp, local),
    ]


@dataclass(frozen=True)
class Rates:
    """What the hardware does. The defaults are fitted to, or measured on, H200s; see docs/cluster.md.

    product, subject: FLOP/s of the encoder's and AuxK's products, and of the subject's forward
    moved: bytes/s to and from memory; selected, aux_selected: pre-activations a second that are searched
    launched, aux_launched: seconds of a step that no size changes
    link: bytes/s that a GPU sends to others of its host; network: bytes/s that a host sends to others
    started: seconds that a collective takes however small it is
    """

    product: float = 650e12
    subject: float = 300e12
    moved: float = 2.9e12
    selected: float = 3.3e12
    aux_selected: float = 6.2e10
    launched: float = 1.1e-3
    aux_launched: float = 0.5e-3
    link: float = 300e9
    network: float = 400e9
    started: float = 60e-6
    gpus_per_host: int = 8


def seconds(sizes: Sizes, mesh: Mesh, rates: Rates) -> dict[str, float]:
    """An estimate of a step's time, part after part, as if nothing overlapped."""
    rows, d, dead = sizes.rows(mesh), sizes.d_model, sizes.local_dead(mesh)
    aux = 5 * 2 * rows * dead * d / rates.product + rows * dead / rates.aux_selected + rates.aux_launched
    parts = {
        "subject model": sizes.batch // sizes.read_by(mesh) * sizes.subject_flops / rates.subject,
        "encoder product": 2 * rows * d * sizes.local(mesh) / rates.product,
        "selection": rows * sizes.local(mesh) / rates.selected,
        "reconstruction, gradients, update": _bytes_moved(sizes, mesh) / rates.moved,
        "AuxK": aux if dead else 0.0,
        "launches": rates.launched,
        "communication": sum(transfer_seconds(one, mesh, rates) for one in transfers(sizes, mesh)),
    }
    return {name: time for name, time in parts.items() if time}


def _bytes_moved(sizes: Sizes, mesh: Mesh) -> int:
    """Rows of weights and of the batch for each selected latent, three times; then the weights and all that is kept."""
    gathered = 3 * _HALF * sizes.rows(mesh) * sizes.selections() // mesh.tp * sizes.d_model
    owned = 2 * sizes.n_latents * sizes.d_model // mesh.ranks
    kept = (2 * (4 if sizes.ema else 3) * _FULL + _HALF) * owned
    written = mesh.dp > 1 or sizes.clip
    return gathered + kept + (_FULL * (2 * sizes.local(mesh) * sizes.d_model + owned) if written else 0)


def transfer_seconds(transfer: Transfer, mesh: Mesh, rates: Rates) -> float:
    """Within a host at the rate of a GPU's links; else all groups of a host share its network."""
    time = transfer.sent / rates.link
    if transfer.over != "tp" and max(mesh.ranks, transfer.ranks) > rates.gpus_per_host:
        time = max(time, mesh.tp * transfer.sent / rates.network)
    return rates.started + time
