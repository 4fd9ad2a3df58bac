"""Submits a step as a job of a Ray cluster, through Ray's job API, and follows it to its end."""

import asyncio
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from sae.jobs import cluster
from sae.jobs.progress import say
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError

# Two of them set their own level; what they tell is not for users.
for _name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# Where `ray dashboard cluster.yaml` forwards a cluster's job API.
DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"


def submit(step: str, path: str, overrides: Sequence[str], config: Run, address: str = DEFAULT_ADDRESS) -> None:
    """Runs `sae STEP PATH OVERRIDES` on the cluster, with a copy of the working directory, and shows its log.

    `config` is what path and overrides say. What .gitignore and .rayignore name stays out of the copy.
    Raises ConfigError where the job could not find its files or no job API takes it, IncompleteError where it
    does not succeed.
    """
    cluster.require_shared(config, step)
    command = ["python", "-m", "sae.jobs.cli", step, _relative(path), *overrides]
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": "."})
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = cluster.first_line(error).rstrip(".")
        raise ConfigError(
            f"--address {address}: {reason}; start the cluster, forward its job API with ray dashboard "
            "cluster.yaml, and export RAY_AUTH_MODE=token where it asks for a token"
        ) from None
    say(f"submit: {step} runs as job {job}")
    _require_success(_status_at_end(client, job), step, job)


def _relative(path: str) -> str:
    """The config's path as seen from the working directory, which is what the job gets."""
    here = Path.cwd().resolve()
    absolute = Path(path).resolve()
    if not absolute.is_relative_to(here):
        raise ConfigError(f"{path}: not under {here}, which is all a job gets; submit from a folder above it")
    return str(absolute.relative_to(here))


def _status_at_end(client: JobSubmissionClient, job: str) -> JobStatus:
    try:
        asyncio.run(_follow(client, job))
        return client.get_job_status(job)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
        raise IncompleteError(
            f"job {job}: lost sight of it ({cluster.first_line(error)}); it may still run: ray job status {job}"
        ) from None


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines.rstrip("\n"))


def _require_success(status: JobStatus, step: str, job: str) -> None:
    if status != JobStatus.SUCCEEDED:
        raise IncompleteError(
            f"job {job}: {step} {status.value.lower()}, its log above says why; mend it and submit again"
        )
