"""What the lake's steps write and take: plain arithmetic on sizes, at rates that were measured.

Rows are nonzero latents where no table is named. Measured means docs/cluster.md, "The lake's steps", and
benchmarks/results/2026-11-23.md.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sae.device_statistics import BYTES_PER_ROW
from sae.jobs.cluster import CPU_RUNS, GPU_RUNS
from sae.jobs.compact import worth_merging
from sae.jobs.costs import Rates, scratch
from sae.jobs.decoders import atoms_per_file
from sae.jobs.exports.folder import ATOMS_PER_TASK
from sae.jobs.formats import LATENTS_ROW_GROUP
from sae.jobs.merge import CHAIN_BYTES

_FULL: Final = 4
_HALF: Final = 2
_KINDS: Final = 2  # of examples: top and random

# Bytes of a row on disk. In brackets what was found in a synthetic lake of 32,768 latents, and in the demo's of 2,304.
RUN: Final = 3.15  # (3.15, 2.95)
COMPACTED: Final = 2.87  # (2.91 from 13 runs and 2.87 from 64, 2.84)
BY_TOKEN: Final = 3.4  # (3.41)
MOMENTS: Final = 38  # (38, 42)
HISTOGRAMS: Final = 1.5  # (1.4, 1.5)
TOP: Final = 4.4  # (4.4, 4.0)
SAMPLES: Final = 4.4  # (4.3, 4.3)
ATOMS: Final = 50  # (43, 55)
EXAMPLES: Final = 6.4  # (6.4, 5.2)
KEY: Final = 10  # of an activation, beside its vector
DIRECTION: Final = 7 / 8  # of a direction in float32 (-, 0.85)
CONTEXT_TOKEN: Final = 1.8  # of each token of a context (3.6 where they are random, 1.76)
VOTE: Final = 4.7  # of an effect on a token, for each token in one of its four lists (-, 4.7)
LOGIT: Final = 9  # (-, 8.4)
NEIGHBOUR: Final = 7  # (-, 6.7)
EXPLANATION: Final = 700  # (-, 808 with the footer of a file of 20)
PAGE_TOKEN: Final = 18.5  # of each token of an example in JSON (20.3, 17.2)
BINS: Final = 24  # that an atom has in a run (15, 24)

# Of one core, a second: on a laptop's two.
TOKENIZED: Final = 0.3e6  # tokens: the demo's 0.43 million in 1.6 s
COMPUTED: Final = 60e9  # operations of subject and encoder: 64e9 in the demo's encoding, 33e9 to 59e9 in forward passes
SORTED: Final = 3.5e6  # rows, to a run and its statistics: 7.9 million in 2.1 to 2.3 s
WRITTEN: Final = 16e6  # rows, to Parquet alone: 7.9 million in 0.39 to 0.60 s
MERGED: Final = 6e6  # rows: 504.5 million in 46.5 s, 102.5 million in 18.3 s, with Ray's start and an odd file
COPIED: Final = 2e6  # rows, in the order of tokens: 102.5 million in 25 s, beside other work
REDUCED: Final = 3.5e6  # rows of top and samples, to examples: 40.8 million in 11.7 s
PAGED: Final = 2e6  # tokens of examples, to JSON: 209.7 million in 57.5 s with Ray's start

# Tokens that the subject runs for an example, to find its pattern: of 1,000 of the demo's atoms 84.7.
PROBED: Final = 85
PROBE: Final = 8  # tokens of such a sequence, on average: 8.7 to 9.6
MATCHED: Final = 55e6  # tokens times atoms, with activations and scores: 19.5 million in 0.35 s, beside other work

# Of one GPU: an H200, with SmolLM2 to block 15 and 32,768 latents.
EAGER: Final = 0.4  # of the rate of a compiled subject: 116 of 300 TFLOP/s
FOUND: Final = (
    16  # bytes that are moved for a row and feature, beside the encoder's product: 17.5 ms for 131,072 tokens
)
COMMITTED: Final = 0.81  # of the rate of subject and encoder alone: 0.81 compiled, 0.85 not

STARTED: Final = 5.0  # seconds until Ray has processes that work: 4 to 7

# Memory, in bytes.
PROCESS: Final = 190_000_000  # that works, before it has anything: 0.35 GB with 13 chains of compact
PACKAGES: Final = 350_000_000  # of the subject, with its tokenizer: 0.54 GB in tokenize
RUN_ROW: Final = 90  # of a run that is sorted or written: 20 as it is found, 68 more at the most
COPIED_ROW: Final = 32  # of a block that is copied in the order of tokens: as by_token counts it
REDUCING: Final = 200_000_000  # of examples, a range of atoms at a time: 0.39 GB in aggregate, whatever the runs
PROBING: Final = 300_000_000  # of latents that are known already, and of contexts that are matched
PAGES: Final = 340_000_000  # of atoms that are gathered at once, and of contexts as JSON: 0.53 GB a process of export


class Table(NamedTuple):
    rows: int
    bytes: int
    files: int


@dataclass(frozen=True)
class Sizes:
    """Of one autoencoder's latents of one corpus.

    tokens, contexts: of the corpus, with width tokens each at most; kept: tokens that are not at a masked position
    shards, runs: parts that are tokenized and encoded; run_tokens: tokens of a run
    examples: of an atom and kind; exported: atoms; ablated: examples whose effects are wanted
    votes, logits, neighbours: of each list; unit_examples: of a file of effects
    explained: atoms, from `probed` examples together and measured on `scored` contexts; unit_atoms: of a file of those
    file_rows: of a compacted file; merged_at_once: sorted sets that are merged together at most; task: memory
    of a task of compact
    subject, subject_flops: bytes of the subject's weights, and operations of its forward to the hook, for a token;
    whole_flops: those to its logits
    compiled: whether a GPU has the subject compiled; cached: whether activations are harvested; by_token: whether runs
    are copied in the order of tokens
    """

    tokens: int
    contexts: int
    width: int
    kept: int
    shards: int
    runs: int
    run_tokens: int
    d_model: int
    n_latents: int
    k: int
    examples: int
    exported: int
    file_rows: int
    merged_at_once: int
    task: int
    subject: int
    subject_flops: int
    compiled: bool
    cached: bool
    by_token: bool
    ablated: int = 0
    votes: int = 10
    logits: int = 20
    neighbours: int = 20
    unit_examples: int = 1024
    explained: int = 0
    probed: int = 0
    scored: int = 0
    unit_atoms: int = 512
    whole_flops: int = 0

    @property
    def rows(self) -> int:
        return self.kept * self.k

    @property
    def run_rows(self) -> int:
        """Of a run that is not the last."""
        return min(self.rows, self.run_tokens * self.k)


@dataclass(frozen=True)
class Hosts:
    """What the steps may use together: cores, GPUs for encoding (none: the cores encode), and how fast these are."""

    cores: int
    gpus: int
    rates: Rates


@dataclass(frozen=True)
class Step:
    """tables: what it writes; memory: bytes of all its processes, were they on one host; gpu_memory: of one GPU."""

    name: str
    tables: dict[str, Table]
    memory: int
    core_seconds: float
    seconds: float
    gpu_seconds: float = 0.0
    gpu_memory: int = 0


def steps(sizes: Sizes, hosts: Hosts) -> list[Step]:
    """All of them, in order; rows of partial statistics and examples are the most that there can be."""
    harvest = [_harvest] if sizes.cached else []
    made = (_tokenize, *harvest, _encode, _compact, _aggregate, _effects, _explain, _export)
    return [each(sizes, hosts) for each in made]


def _table(rows: int, row_bytes: float, files: int) -> Table:
    return Table(rows, int(rows * row_bytes), files)


def _tokenize(sizes: Sizes, hosts: Hosts) -> Step:
    contexts = Table(sizes.contexts, int(sizes.tokens * CONTEXT_TOKEN), sizes.shards)
    seconds = sizes.tokens / TOKENIZED
    return Step("tokenize", {"contexts": contexts}, PROCESS + PACKAGES, seconds, seconds)


def _harvest(sizes: Sizes, hosts: Hosts) -> Step:
    activations = _table(sizes.kept, _HALF * sizes.d_model + KEY, sizes.runs)
    held = sizes.run_tokens * sizes.d_model * (_FULL + _HALF)
    on_gpu = sizes.subject_flops / (EAGER * hosts.rates.subject)
    return _computed("harvest", {"activations": activations}, sizes, hosts, sizes.subject_flops, on_gpu, 0.0, held)


def _encode(sizes: Sizes, hosts: Hosts) -> Step:
    of_run = {
        "moments": (min(sizes.n_latents, sizes.run_rows), MOMENTS),
        "histograms": (min(BINS * sizes.n_latents, sizes.run_rows), HISTOGRAMS),
        "top": (_examples_of_run(sizes), TOP),
        "samples": (_examples_of_run(sizes), SAMPLES),
    }
    partials = {name: _table(sizes.runs * rows, each, sizes.runs) for name, (rows, each) in of_run.items()}
    tables = {"latents": _table(sizes.rows, RUN, sizes.runs), **partials}
    product = 2 * sizes.d_model * sizes.n_latents
    subject = sizes.subject_flops / (hosts.rates.subject * (1.0 if sizes.compiled else EAGER))
    moved = FOUND * sizes.d_model * sizes.k / hosts.rates.moved
    on_gpu = (subject + product / hosts.rates.product + moved) / COMMITTED
    at_once = min(sizes.runs, GPU_RUNS * hosts.gpus or CPU_RUNS)
    held = at_once * sizes.run_rows * RUN_ROW
    core_seconds = sizes.rows / (WRITTEN if hosts.gpus else SORTED)
    return _computed("encode", tables, sizes, hosts, sizes.subject_flops + product, on_gpu, core_seconds, held)


def _computed(
    name: str,
    tables: dict[str, Table],
    sizes: Sizes,
    hosts: Hosts,
    flops: int,
    on_gpu: float,
    core_seconds: float,
    held: int,
) -> Step:
    """A step that runs the subject, by GPUs or by cores.

    flops, on_gpu: operations, and seconds of a GPU, for a token; core_seconds: of all that is not computed; held: bytes
    of what is computed and not yet written.
    """
    loaded = PROCESS + PACKAGES + sizes.subject + _FULL * _parameters(sizes)
    if not hosts.gpus:
        core_seconds += sizes.tokens * flops / COMPUTED
        return Step(name, tables, loaded + held, core_seconds, core_seconds / hosts.cores)
    gpu_seconds = sizes.tokens * on_gpu
    seconds = max(gpu_seconds / hosts.gpus, core_seconds / hosts.cores)
    memory = hosts.gpus * loaded + held
    return Step(name, tables, memory, core_seconds, seconds, gpu_seconds, _gpu_memory(sizes))


def _parameters(sizes: Sizes) -> int:
    return 2 * sizes.d_model * sizes.n_latents


def _examples_of_run(sizes: Sizes) -> int:
    """Of one kind."""
    return min(sizes.n_latents * sizes.examples, sizes.run_rows)


def _gpu_memory(sizes: Sizes) -> int:
    """Weights, their rounded copy, pre-activations, and the rows of a run."""
    weights = (_FULL + _HALF) * _parameters(sizes)
    return sizes.subject + weights + scratch(sizes.run_tokens, sizes.n_latents) + BYTES_PER_ROW * sizes.run_rows


def _compact(sizes: Sizes, hosts: Hosts) -> Step:
    groups = -(-sizes.run_rows // LATENTS_ROW_GROUP)
    moved = merged_rows([sizes.run_rows] * sizes.runs, sizes.merged_at_once)
    chains = min(sizes.runs, sizes.merged_at_once)
    # A file begins where a row group does, and all sets begin with the first atom.
    files = min(-(-sizes.rows // sizes.file_rows), 1 + (groups - 1) * chains)
    memory = min(hosts.cores, files) * (PROCESS + chains * CHAIN_BYTES)
    tables = {"latents": _table(sizes.rows, COMPACTED, files)}
    core_seconds, seconds = moved / MERGED, _seconds(moved / MERGED, files, hosts)
    if sizes.by_token:
        tables["latents_by_token"] = _table(sizes.rows, BY_TOKEN, sizes.runs)
        copied, held = sizes.rows / COPIED, min(sizes.task, sizes.rows * COPIED_ROW)
        memory = max(memory, min(hosts.cores, sizes.runs) * (PROCESS + held))
        core_seconds, seconds = core_seconds + copied, seconds + copied / min(hosts.cores, sizes.runs)
    return Step("compact", tables, memory, core_seconds, seconds)


def _seconds(core_seconds: float, tasks: int, hosts: Hosts) -> float:
    """Of so many equal tasks, each on one core; several are given to Ray."""
    if tasks == 1:
        return core_seconds
    return STARTED + core_seconds / tasks * -(-tasks // hosts.cores)


def merged_rows(sets: Sequence[int], at_once: int) -> int:
    """Rows that are written until no sorted sets of so many rows are worth merging."""
    written, left = 0, sorted(sets)
    while n := worth_merging(left[:at_once]):
        together = sum(left[:n])
        left = sorted([*left[n:], together])
        written += together
    return written


def _aggregate(sizes: Sizes, hosts: Hosts) -> Step:
    n, d = sizes.n_latents, sizes.d_model
    found = _KINDS * min(n * sizes.examples, sizes.rows)
    tables = {
        "atoms": _table(n, ATOMS, 1),
        "examples": _table(found, EXAMPLES, 1),
        "decoders": _table(n, DIRECTION * _FULL * d, -(-n // atoms_per_file(d))),
    }
    seconds = _KINDS * sizes.runs * _examples_of_run(sizes) / REDUCED
    return Step("aggregate", tables, PROCESS + REDUCING, seconds, seconds)


def _effects(sizes: Sizes, hosts: Hosts) -> Step:
    """Each example has a context of its own, which runs as it is and ablated; half of its tokens are later ones."""
    n, found = sizes.n_latents, min(sizes.ablated, sizes.rows)
    later, tokens = found * sizes.width // 2, found * sizes.width
    files = -(-found // sizes.unit_examples)
    tables = {
        "effects": _table(found, later / max(1, found) * 4 * sizes.votes * VOTE, files),
        "logits": _table(_KINDS * n * sizes.logits, LOGIT, 1),
        "neighbours": _table(_KINDS * n * sizes.neighbours, NEIGHBOUR, 1),
    }
    flops = 2 * sizes.whole_flops
    of_unit = min(found, sizes.unit_examples) * sizes.width * sizes.votes * 4 * (_FULL + 2 * _FULL)
    of_run = dataclasses.replace(sizes, tokens=tokens)
    on_gpu = flops / (EAGER * hosts.rates.subject)
    return _computed("effects", tables, of_run, hosts, flops, on_gpu, 0.0, of_unit)


def _explain(sizes: Sizes, hosts: Hosts) -> Step:
    """Examples run as many short sequences, with latents at the last token of each."""
    found, tokens = min(sizes.probed, sizes.rows), min(sizes.scored, sizes.contexts) * sizes.width
    tables = {"explanations": _table(sizes.explained, EXPLANATION, -(-sizes.explained // sizes.unit_atoms))}
    product = 2 * sizes.d_model * sizes.n_latents // PROBE
    on_gpu = sizes.subject_flops / (EAGER * hosts.rates.subject) + product / hosts.rates.product
    run = dataclasses.replace(sizes, tokens=found * PROBED)
    matched = sizes.explained * tokens / MATCHED
    return _computed("explain", tables, run, hosts, sizes.subject_flops + product, on_gpu, matched, PROBING)


def _export(sizes: Sizes, hosts: Hosts) -> Step:
    found = _KINDS * min(sizes.exported * sizes.examples, sizes.rows)
    tokens = found * sizes.width
    written = Table(sizes.exported, int(tokens * PAGE_TOKEN), sizes.exported)
    tasks, core_seconds = -(-sizes.exported // ATOMS_PER_TASK), tokens / PAGED
    memory = min(hosts.cores, tasks) * (PROCESS + PAGES)
    return Step("export", {"json": written}, memory, core_seconds, _seconds(core_seconds, tasks, hosts))
