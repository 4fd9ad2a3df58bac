"""Tokens per second of `Subject.activations` against the bare Hugging Face forward of the same blocks.

Both run in turn, in one process, at the same batch and threads; the rates are of the median time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae.smollm2 import smollm2_folder
from sae.subject import DTYPES, Subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", type=int, default=4, help="harvest the residual stream before this block")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()

    rows = []
    for dtype in args.dtype:
        harvest, bare = subjects(args.layer, dtype, args.device)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for context in args.context:
                ids = random_ids(args.batch, context, args.device)
                ours, theirs = rates([harvest, bare], ids, args.seconds)
                row = {
                    "dtype": dtype,
                    "threads": threads,
                    "batch": args.batch,
                    "context": context,
                    "harvest_tok_s": round(ours),
                    "bare_tok_s": round(theirs),
                    "ratio": round(ours / theirs, 3),
                }
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
                rows.append(row)
    if args.json:
        result = {"benchmark": "harvest", "torch": torch.__version__, "layer": args.layer, "rows": rows}
        print(json.dumps(result))


Forward = Callable[[Tensor], object]


def subjects(layer: int, dtype: str, device: str) -> tuple[Forward, Forward]:
    """The harvest, and a bare model of the blocks before `layer` with no final norm and no logits."""
    subject = Subject.load("smollm2", f"blocks.{layer}.hook_resid_pre", layers=layer + 1, dtype=dtype, device=device)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder(), num_hidden_layers=layer, dtype=DTYPES[dtype])
    model.to(device)
    model.model.norm = torch.nn.Identity()

    @torch.no_grad()
    def bare(ids: Tensor) -> object:
        return model.model(input_ids=ids, use_cache=False)

    return subject.activations, bare


def random_ids(batch: int, context: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(17, 49152, (batch, context), generator=generator).to(device)


def rates(forwards: list[Forward], ids: Tensor, seconds: float) -> list[float]:
    """Tokens per second of each of `forwards`, taking turns so that both see the same machine."""
    times: list[list[float]] = [[] for _ in forwards]
    for forward in forwards:
        forward(ids)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for forward, taken in zip(forwards, times, strict=True):
            synchronize(ids)
            start = time.perf_counter()
            forward(ids)
            synchronize(ids)
            taken.append(time.perf_counter() - start)
    return [ids.numel() / statistics.median(taken) for taken in times]


def synchronize(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
