"""Settings of the whole suite: no network, no busy waiting, no deadline on a shared machine."""

import os
import signal

# Before torch, transformers or ray are imported: they read these once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# The behaviour that Ray announces as its next default; without it ray.init warns.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import torch

# Read by triton's decorators; Triton kernels are run on the CPU where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# Ignored where the suite runs in the background of a script; tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("sae", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("sae")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
