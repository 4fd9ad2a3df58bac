"""Settings of the whole suite: no network, no busy waiting, no deadline on a shared machine."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from unittest.mock import patch

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


@pytest.fixture(autouse=True, scope="session")
def no_power_cut() -> Iterator[None]:
    """Files are not forced onto the disk: no test cuts the power, and each of many thousand commits would wait."""
    with patch.object(os, "fsync", lambda _: None):
        yield


TESTS: Final = Path(__file__).parent
# What takes longest begins first, so that workers that are handed file after file end at about the same time.
LONGEST: Final = (
    "jobs/test_pipeline.py",
    "jobs/test_effects.py",
    "jobs/test_evaluate.py",
    "jobs/test_explain.py",
    "jobs/test_bad_input.py",
    "jobs/test_sweep.py",
    "sae/test_sharded.py",
    "jobs/test_lake_stores.py",
    "kernels/test_compile.py",
    "jobs/test_import.py",
    "jobs/test_architectures.py",
    "jobs/test_corpus.py",
    "sae/test_recovery.py",
    "kernels/test_fused.py",
    "kernels/test_exact.py",
    "sae/test_sharded_kernels.py",
    "sae/test_subject.py",
    "sae/test_training.py",
    "kernels/test_reference_ops.py",
    "kernels/test_edges.py",
    "test_step_docs.py",
    "jobs/test_drop.py",
    "jobs/test_lake_laws.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, and skip tests marked `gpu` where torch sees no CUDA device."""
    # Files of the one Ray come first: a Ray that other tests start for themselves is not like it.
    of_one_ray = {item.path for item in items if "one_ray" in getattr(item, "fixturenames", ())}
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path not in of_one_ray, places.get(item.path, len(places))))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
