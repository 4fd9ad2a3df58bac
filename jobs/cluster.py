"""Ray: where it runs, and how many processors and GPUs a worker gets."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Final

import ray
import torch

from sae.jobs import storage
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, SaeError, WorkerError

_OBJECT_STORE_BYTES: Final = 256 * 2**20
_GPU_TOKENS: Final = 65_536
_CPU_CONTEXTS: Final = 16
# Compiling takes about half a minute, in which a GPU sees as many tokens of a small model.
COMPILE_FROM_TOKENS: Final = 50_000_000
GPU_RUNS: Final = 8
CPU_RUNS: Final = 2
# Ray sets it for the entrypoint of a submitted job: such a driver belongs to the cluster it was submitted to.
_IN_JOB: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_keeping = False


@contextlib.contextmanager
def connected(config: Run) -> Iterator[None]:
    """Ray for the length of the block: the given cluster, the job's own, or a local one that ends with the block.

    Inside of `kept` it lasts as long as that.

    A program that has called ray.init itself keeps its Ray, and the block uses it.
    """
    if ray.is_initialized():
        yield
        return
    address = "auto" if _IN_JOB in os.environ else config.cluster.address
    _start(address)
    try:
        yield
    finally:
        if not _keeping:
            ray.shutdown()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Ray that `connected` starts inside of the block lasts until its end: to start it takes seconds, for each step.

    Where it is lost between two steps, the command ends; the same command goes on.
    """
    global _keeping
    if _keeping or ray.is_initialized():
        yield
        return
    _keeping = True
    try:
        yield
    finally:
        _keeping = False
        ray.shutdown()


def check_folders_of_job(config: Run, step: str) -> None:
    """In a submitted job, raises ConfigError for folders that would vanish with it; elsewhere any folder will do."""
    if _IN_JOB in os.environ:
        require_shared(config, step)


def require_shared(config: Run, step: str) -> None:
    """Raises ConfigError where the step writes inside of a job's working directory."""
    folders = {"lake": config.lake}
    if step in ("export", "run"):
        folders["export.folder"] = config.export.folder
    if step in ("evaluate", "run") and config.evaluate.report is not None:
        folders["evaluate.report"] = config.evaluate.report
    for key, folder in folders.items():
        if storage.is_local(folder) and not os.path.isabs(folder):
            raise ConfigError(
                f"{key}: {folder} is a relative path, which in a submitted job lies in the job's temporary copy of "
                "the working directory; give an absolute path that all nodes share"
            )


def _start(address: str) -> None:
    # Workers that print, and Ray's own notes, would garble the progress line.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What a worker raises after another one has told the reason is of no interest.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Read when ray.data is first imported, which is later than this.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        with _native_notes_hidden():
            if address == "local":
                # Ray would keep what each task went through, tens of megabytes an hour that nobody can look at.
                os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
                ray.init(
                    address="local",
                    num_cpus=cpu_count(),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
            else:
                ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"cluster.address: can't reach Ray at {address}: {reason}; start it or use local") from None
    except Exception as error:  # a bare one, where Ray's own processes were not up in its time
        reason = " ".join(str(error).split())[:200]
        raise WorkerError(
            f"cluster: Ray did not start at {address}: {reason} If this machine is short of memory or of processor "
            "time, end other work, and run the same command again"
        ) from None
    if threading.current_thread() is threading.main_thread() and on_term is not None:
        signal.signal(signal.SIGTERM, on_term)  # Ray's own aborts


@contextlib.contextmanager
def _native_notes_hidden() -> Iterator[None]:
    """Ray's native code announces its log level on the process' standard error before it heeds it."""
    kept = os.dup(2)
    hidden = os.open(os.devnull, os.O_WRONLY)
    os.dup2(hidden, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(hidden)
        os.close(kept)


def cpu_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def worker_options(config: Run, n_workers: int) -> dict[str, Any]:
    """Ray options for one of n_workers equal workers of a step: a GPU each, or a share where there are fewer.

    Workers beyond the number of GPUs or processors share them rather than wait for ever. Where GPUs come only once they
    are asked for, cluster.gpus_per_worker asks.
    """
    if config.cluster.gpus_per_worker is not None:
        # Ray lets a worker that asks for none see all of them.
        hidden = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
        share = config.cluster.gpus_per_worker
        return {"num_gpus": share, "num_cpus": 1, **(hidden if not share and _gpus() else {})}
    gpus = _gpus()
    if gpus >= 1:
        return {"num_gpus": 1 if gpus >= n_workers else gpus / n_workers, "num_cpus": 1}
    return {"num_cpus": min(1.0, ray.cluster_resources().get("CPU", 1.0) / (2 * n_workers))}


def runs_at_once(config: Run) -> int:
    """Runs that a worker has in memory: one is computed while the others, far slower on a GPU, are written."""
    return GPU_RUNS if config.cluster.gpus_per_worker or _gpus() else CPU_RUNS


def _gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0))


def use_device(n_workers: int) -> str:
    """Called in a worker: the device to compute on, with CPU threads shared fairly between the node's workers."""
    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(max(1, cpu_count() // n_workers))
    return "cpu"


def contexts_at_once(given: int | None, context_length: int) -> int:
    """Contexts in one forward pass of the subject: as the config says, or enough to keep a worker busy."""
    if given is not None:
        return given
    return max(1, _GPU_TOKENS // context_length) if torch.cuda.is_available() else _CPU_CONTEXTS


def worth_compiling(tokens: int) -> bool:
    """Whether a subject that is to see so many tokens saves more time by being compiled than that takes."""
    return torch.cuda.is_available() and tokens >= COMPILE_FROM_TOKENS


def cause(error: BaseException) -> BaseException:
    """The SaeError that a remote task raised, or the error itself."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, SaeError):
            # Ray's wrapper of the same class carries a traceback as its message.
            original = getattr(inner, "cause", None)
            return type(original)(*original.args) if isinstance(original, SaeError) else inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of Ray's many."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
