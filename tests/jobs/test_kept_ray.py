"""Ray is started once for all steps of a command."""

import subprocess
import sys

from tests.tiny_run import Lab

# Every step of `sae run` is one that needs Ray; the last but one of a second command fails.
PROGRAM = """
import argparse, importlib, sys
import ray
from sae.jobs import cli, cluster
from sae.schemas.errors import ConfigError

sessions = []


def use(config):
    with cluster.connected(config):
        sessions.append((ray.get_runtime_context().get_job_id(), ray.get_runtime_context().gcs_address))


def fail(config):
    use(config)
    raise ConfigError("no")


for step in cli.STEPS:
    importlib.import_module(f"sae.jobs.{step}").run = use
given = argparse.Namespace(config=sys.argv[1], overrides=["--lake", sys.argv[2]])
cli._run_all(given)
assert not ray.is_initialized()
first = len(sessions), len(set(sessions))
importlib.import_module("sae.jobs.evaluate").run = fail
try:
    cli._run_all(given)
except ConfigError:
    assert not ray.is_initialized()
print(*first, len(set(sessions)))
"""


def test_steps_of_a_command_have_one_ray_that_ends_with_it(tokenized: Lab) -> None:
    given = [sys.executable, "-c", PROGRAM, str(tokenized.config), str(tokenized.lake)]
    ended = subprocess.run(given, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["9", "1", "2"]
