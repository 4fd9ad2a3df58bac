"""Steps as jobs of a Ray cluster: a real head with token authentication, a real upload of the working tree."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from sae.jobs.lake import connect
from tests.models import TEXT, tiny_gpt2

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# The project itself is about one; a virtual environment, a type checker's cache or a demo are hundreds.
MOST_UPLOADED_MB = 20


@dataclass(frozen=True)
class Head:
    """A running Ray head, and the environment of somebody who may talk to it."""

    address: str
    environment: dict[str, str]


def free_ports(n: int) -> list[int]:
    """Different free ports, above those that Ray keeps for its workers."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def command(environment: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the environment; standard error is part of the output."""
    words = (str(BIN / words[0]), *words[1:])
    return subprocess.run(
        words,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray's sockets lie in this folder, and a socket's path may have 107 characters: pytest's own is too deep.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    dashboard, client, agent = free_ports(3)
    # With --block all of Ray stays in the process group of `ray start`, jobs and workers included.
    start = [str(BIN / "ray"), "start", "--head", "--block", "--port=0", f"--dashboard-port={dashboard}"]
    start += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    start += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}/ray", "--num-cpus=2"]
    start += ["--object-store-memory=100000000", "--disable-usage-stats"]
    unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "OMP_NUM_THREADS": "1",
    }
    (folder / "token").write_text("0123456789abcdef" * 4)
    log = (folder / "head.log").open("w+")
    process = subprocess.Popen(start, env=environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(address, process, folder / "head.log")
        yield Head(address, environment)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the job API answers, if only to refuse somebody without a token."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return
            raise
        except OSError:
            time.sleep(0.2)
        else:
            pytest.fail("the job API answers without a token")
    pytest.fail(f"ray start did not come up:\n{log.read_text()}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, head: Head) -> Path:
    """A copy of the working tree with a run.yaml, of a lake that has everything but latents."""
    folder = tmp_path_factory.mktemp("project")
    data = tmp_path_factory.mktemp("data")
    for name in ("sae", "schemas", "kernels", "jobs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    texts = data / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXT):
        (texts / f"{number}.txt").write_text(f"{text}\n" * 10)
    run = {
        "lake": str(data / "lake"),
        "subject": {"model": str(tiny_gpt2(data / "subject")), "hook": "blocks.1.hook_resid_post"},
        "corpus": {"name": "tiny", "paths": [str(texts / "*.txt")], "context_length": 32},
        "autoencoder": {"name": "demo", "n_latents": 64, "k": 4, "auxk": 0},
        "training": {"tokens": 512, "batch_tokens": 256, "buffer_tokens": 512, "validation_tokens": 64},
        "encode": {"run_tokens": 1024},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    for step in ("tokenize", "train"):
        done = command(dict(os.environ), folder, "sae", step, "run.yaml")
        assert done.returncode == 0, done.stdout
    return folder


def submitted(head: Head, project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    submit = ("ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", *words)
    return command(head.environment, project, *submit)


def n_latents(project: Path) -> int:
    lake = yaml.safe_load((project / "run.yaml").read_text())["lake"]
    (rows,) = connect(lake).sql("select count(*) from latents").fetchall()[0]
    return int(rows)


def test_encode_runs_as_a_job_and_a_fault_fails_the_job(head: Head, project: Path) -> None:
    faulty = submitted(
        head, project, "python", "-m", "sae.jobs.encode", "run.yaml", "--subject.hook", "blocks.1.hook_nothing"
    )
    assert faulty.returncode != 0
    assert any(line.startswith("error: ") and "hook_nothing" in line for line in faulty.stdout.splitlines())
    assert "Traceback" not in faulty.stdout
    assert n_latents(project) == 0
    done = submitted(head, project, "python", "-m", "sae.jobs.encode", "run.yaml")
    assert done.returncode == 0, done.stdout
    assert n_latents(project) > 0


def test_sae_submit_follows_the_job_to_its_exit_status(head: Head, project: Path) -> None:
    submit = ("sae", "submit", "aggregate", "run.yaml", "--address", head.address)
    done = command(head.environment, project, *submit)
    assert done.returncode == 0, done.stdout
    assert "aggregate: " in done.stdout
    unknown = command(head.environment, project, *submit, "--autoencoder.name", "unknown")
    assert unknown.returncode == 1
    *log, last = unknown.stdout.splitlines()
    assert any(line.startswith("error: ") and "unknown" in line for line in log)
    assert "aggregate failed" in last


def test_without_the_token_nothing_is_submitted(head: Head, project: Path) -> None:
    environment = head.environment | {"RAY_AUTH_MODE": "disabled"}
    refused = command(environment, project, "sae", "submit", "encode", "run.yaml", "--address", head.address)
    assert refused.returncode == 1
    (line,) = refused.stdout.splitlines()
    assert line.startswith(f"error: --address {head.address}: Authentication required")


def test_the_upload_leaves_out_what_git_ignores(head: Head, project: Path) -> None:
    ignored = ("demo", ".mypy_cache", "lake")
    for name in ignored:
        (project / name).mkdir()
        (project / name / "large").write_bytes(b"\0" * (MOST_UPLOADED_MB * 2**20))
    script = "import os; print('HOLDS', *sorted(os.listdir('.')), sorted(os.listdir('sae/jobs')))"
    listed = submitted(head, project, "python", "-c", script)
    (line,) = (line for line in listed.stdout.splitlines() if line.startswith("HOLDS"))
    assert "encode.py" in line
    assert not set(ignored) & set(line.split())


def test_a_lake_in_the_working_directory_is_refused_before_and_in_the_job(head: Head, project: Path) -> None:
    overrides = ("--lake", "./lake-of-job")
    before = command(head.environment, project, "sae", "submit", "tokenize", "run.yaml", *overrides)
    within = submitted(head, project, "python", "-m", "sae.jobs.tokenize", "run.yaml", *overrides)
    assert before.returncode == 1
    assert within.returncode == 1
    for answer in (before, within):
        assert "lake: ./lake-of-job is a relative path" in answer.stdout


def test_a_config_out_of_reach_of_the_job_is_refused(head: Head, project: Path, tmp_path: Path) -> None:
    refused = command(head.environment, tmp_path, "sae", "submit", "encode", str(project / "run.yaml"))
    assert refused.returncode == 1
    assert "submit from a folder above it" in refused.stdout
