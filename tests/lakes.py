"""A small lake made without models: tokens and activations are drawn, the tables are laid out as the steps do it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from sae.activations import TopK
from sae.jobs import aggregate, checkpoints, runs
from sae.jobs.lake import Lake, write_views
from sae.model import Autoencoder
from sae.schemas.config import Run
from sae.schemas.tables import SCHEMAS
from sae.statistics import SortedRun, round_act

NAME, CORPUS = "small", "texts"
N_LATENTS, D_MODEL, DEAD, EXAMPLES, BIN_WIDTH = 8, 4, 5, 4, 0.2
CONTEXT_LENGTH, CONTEXTS_PER_RUN = 8, 8
# Strings that break naive JSON, HTML or SQL, and words.
TOKENS = [
    '"',
    "\\",
    "\n",
    "</script>",
    "'; --",
    "é",
    "🙂",
    "\u2028",
    " fox",
    " dog",
    " and",
    "NaN",
    "\t",
    " a",
    " b",
    " c",
]


@dataclass(frozen=True)
class Small:
    """The lake's config, its contexts, and the stored activations dense: [context, position, latent]."""

    config: Run
    contexts: list[list[int]]
    acts: npt.NDArray[np.float32]

    @property
    def lake(self) -> Lake:
        return Lake(self.config.lake)

    def copy(self, folder: Path) -> "Small":
        """The same lake in another folder, free to be changed."""
        shutil.copytree(self.config.lake, folder)
        return replace(self, config=small_config(folder, self.config.autoencoder.name))

    @property
    def n_tokens(self) -> int:
        """Tokens that are not at the masked position 0."""
        return sum(len(tokens) - 1 for tokens in self.contexts)


def small_config(lake: Path, name: str = NAME, **export: Any) -> Run:
    return Run.model_validate(
        {
            "lake": str(lake),
            "subject": {"model": "models/tiny", "hook": "blocks.1.hook_resid_pre", "masked_positions": [0]},
            "corpus": {"name": CORPUS, "paths": ["*.txt"], "context_length": CONTEXT_LENGTH},
            "autoencoder": {"name": name, "n_latents": N_LATENTS, "k": 3},
            "encode": {"run_tokens": CONTEXTS_PER_RUN * CONTEXT_LENGTH, "examples": EXAMPLES},
            "export": {"folder": str(lake.parent / "viewer"), **export},
        }
    )


def small_lake(folder: Path, n_contexts: int = 20, seed: int = 0, name: str = NAME) -> Small:
    """Writes the lake to `folder`: tokenized, trained, encoded in several runs, aggregated; latent DEAD never fires."""
    draw = np.random.default_rng(seed)
    lengths = [CONTEXT_LENGTH, *draw.integers(2, CONTEXT_LENGTH + 1, n_contexts - 1)]
    contexts = [draw.integers(0, len(TOKENS), length).tolist() for length in lengths]
    acts = np.zeros((n_contexts, CONTEXT_LENGTH, N_LATENTS), np.float32)
    for context, length in enumerate(lengths):
        fires = draw.random((length, N_LATENTS)) < np.linspace(0.05, 0.6, N_LATENTS)
        acts[context, :length] = round_act(np.exp(draw.normal(size=fires.shape)).astype(np.float32)) * fires
    acts[:, 0] = 0
    acts[:, :, DEAD] = 0
    small = Small(small_config(folder, name), contexts, acts)
    lake = Lake(str(folder), create=True)
    _tokenize(lake, small)
    train(lake, small.config)
    for run in range(-(-n_contexts // CONTEXTS_PER_RUN)):
        encode(small, run)
    aggregate.run(small.config)
    write_views(lake)
    return small


def encode(small: Small, run: int) -> None:
    """Commits one run of latents with its partial statistics."""
    bounds = slice(run * CONTEXTS_PER_RUN, (run + 1) * CONTEXTS_PER_RUN)
    context, pos, atom = np.nonzero(small.acts[bounds])
    latents = SortedRun.from_rows(
        atom.astype(np.int32), context + bounds.start, pos.astype(np.uint16), small.acts[bounds][context, pos, atom]
    )
    tables = {
        "latents": latents.rows(),
        "moments": latents.moments(),
        "histograms": latents.histogram(BIN_WIDTH),
        "top": latents.top(EXAMPLES),
        "samples": latents.samples(EXAMPLES, 0),
    }
    name = small.config.autoencoder.name
    held = small.contexts[bounds]
    tokens = sum(len(tokens) - 1 for tokens in held)
    with small.lake.transaction("encode", runs.unit("encode", name, CORPUS, run)) as transaction:
        for table, columns in tables.items():
            rows = {"run": np.full(len(columns["atom"]), run, np.int32), **columns}
            data = pa.table({key: rows[key] for key in SCHEMAS[table].names}).cast(SCHEMAS[table])
            named: dict[str, Any] = {"corpus": CORPUS, "autoencoder": name, "run": run, "tokens": tokens}
            transaction.write(table, data, contexts=(bounds.start, bounds.start + len(held) - 1), **named)
        fixed = {"run_tokens": small.config.encode.run_tokens, "bin_width": BIN_WIDTH, "examples": EXAMPLES}
        checkpoint = checkpoints.identity(transaction.base, name)
        transaction.set(f"encode/{name}", {"checkpoint": checkpoint, "seed": 0, **fixed})


def _tokenize(lake: Lake, small: Small) -> None:
    n = len(small.contexts)
    tables: dict[str, dict[str, Any]] = {
        "documents": {
            "doc_id": range(n),
            "source": ["texts"] * n,
            "external_id": [f"{number}.txt" for number in range(n)],
            "n_tokens": [len(tokens) for tokens in small.contexts],
        },
        "contexts": {"context_id": range(n), "doc_id": range(n), "start": [0] * n, "token_ids": small.contexts},
        "vocabulary": {"token_id": range(len(TOKENS)), "token": TOKENS},
    }
    with lake.transaction("tokenize", f"tokenize/{CORPUS}/1") as transaction:
        for table, columns in tables.items():
            transaction.write(table, pa.table(columns, schema=SCHEMAS[table]), corpus=CORPUS)
        counts = {"n_documents": n, "n_contexts": n, "n_tokens": sum(map(len, small.contexts)), "n_shards": 1}
        made_with = {"subject.model": small.config.subject.model}
        state = {"number": 0, "context_length": CONTEXT_LENGTH, "complete": True, "made_with": made_with, **counts}
        transaction.set(f"corpus/{CORPUS}", state)


def train(lake: Lake, config: Run, seed: int = 0) -> Autoencoder:
    """Commits an autoencoder whose weights are drawn."""
    name = config.autoencoder.name
    torch.manual_seed(seed)
    autoencoder = Autoencoder(N_LATENTS, D_MODEL, TopK(3))
    everything = [range(N_LATENTS)]
    tensors = {key: value for key, value in autoencoder.state_dict().items() if isinstance(value, torch.Tensor)}
    of_state = {f"autoencoder.{key}": tensor for key, tensor in tensors.items()}
    with lake.transaction("train") as transaction:
        files = {
            "model": [checkpoints.write_tensors(transaction, "checkpoints", name, tensors, everything)],
            "state": [checkpoints.write_tensors(transaction, "training_states", name, of_state, everything)],
        }
        state = {
            "model": config.subject.model,
            "hook": config.subject.hook,
            "masked_positions": [0],
            "corpus": CORPUS,
            "config": autoencoder.config(),
            "d_model": D_MODEL,
            "n_latents": N_LATENTS,
            "k": 3,
            "step": 1,
            "tokens": 64,
            "complete": True,
            "checkpoints": [files],
        }
        transaction.set(f"autoencoder/{name}", state)
    return autoencoder
