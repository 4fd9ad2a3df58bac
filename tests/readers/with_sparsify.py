"""Loads, or makes and saves, autoencoders with EleutherAI's sparsify, and says what they make of x [B, d]."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _work import Given, Job, work
from sparsify import SparseCoder, SparseCoderConfig


def outputs(coder: Any, x: Tensor) -> Given:
    values, indices, _ = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(1, indices, values)
    recons = coder.decode(values, indices)
    if coder.W_skip is not None:
        recons = recons + x @ coder.W_skip.mT
    return {"latents": latents, "recons": recons}


def load(job: Job, x: Tensor) -> Given:
    return outputs(SparseCoder.load_from_disk(job["folder"]), x)


def save(job: Job, x: Tensor) -> Given:
    """A random one of job's config."""
    coder = SparseCoder(x.shape[1], SparseCoderConfig(**job["config"]))
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    coder.save_to_disk(job["folder"])
    return outputs(coder, x)


work({"load": load, "save": save})
