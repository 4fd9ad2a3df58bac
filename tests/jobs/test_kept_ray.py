"""Ray is started once for all steps of a command."""

import subprocess
import sys

from tests.tiny_run import Lab

PROGRAM = """
import sys
import ray
from sae.jobs import cli, cluster

config = cli.load_config(sys.argv[1])
sessions = []


def use():
    with cluster.connected(config):
        sessions.append(ray.get_runtime_context().get_job_id())
        sessions.append(ray.get_runtime_context().gcs_address)


with cluster.kept():
    assert not ray.is_initialized()  # not before somebody needs it
    use()
    with cluster.kept():
        use()
    assert ray.is_initialized()
assert not ray.is_initialized()
use()
assert not ray.is_initialized()
print(sessions[0:2] == sessions[2:4], sessions[0:2] == sessions[4:6])
"""


def test_a_kept_ray_is_that_of_the_next_step_and_ends_with_the_command(lab: Lab) -> None:
    given = [sys.executable, "-c", PROGRAM, str(lab.config)]
    ended = subprocess.run(given, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["True", "False"]
