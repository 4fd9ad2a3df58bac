"""Loads, or makes and saves, autoencoders with SAELens, and says what they make of x [B, d]."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _work import Given, Job, work
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class

_OF_TRAINING = ("batchtopk", "matryoshka_batchtopk")


def outputs(sae: Any, x: Tensor) -> Given:
    latents = sae.encode(x)
    recons = sae.decode(latents)
    if hasattr(sae, "W_skip"):
        recons = sae.forward(x)
    return {"latents": latents, "recons": recons}


def load(job: Job, x: Tensor) -> Given:
    return outputs(SAE.load_from_disk(job["folder"], device="cpu"), x)


def save(job: Job, x: Tensor) -> Given:
    """A random one of job's architecture and config."""
    config = {"d_in": x.shape[1], "device": "cpu", "dtype": "float32", **job["config"]}
    of_training = job["architecture"] in _OF_TRAINING
    made, configured = (get_sae_training_class if of_training else get_sae_class)(job["architecture"])
    sae = made(configured.from_dict({"architecture": job["architecture"], **config}))
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(1.5, dtype=torch.double)
    sae.save_model(job["folder"])
    if isinstance(sae, TrainingSAE):
        # What is trained over batches is used with its threshold.
        inference = f"{job['folder']}-inference"
        sae.save_inference_model(inference)
        sae = SAE.load_from_disk(inference, device="cpu")
    return outputs(sae, x)


work({"load": load, "save": save})
