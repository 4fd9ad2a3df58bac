"""One Ray for the tests of steps that need it, and the tiny run at each of its stages."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae.jobs import cli, cluster
from tests.no_ray import without_ray
from tests.tiny_run import Lab, make_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run with no lake yet."""
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def one_ray(lab: Lab) -> Iterator[None]:
    """One Ray for all steps: starting it costs more than the tiny steps do."""
    with cluster.connected(cli.load_config(str(lab.config))):
        yield


@pytest.fixture(scope="session")
def tokenized(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run after `tokenize`; not to be changed."""
    there = lab.without_lake(tmp_path_factory.mktemp("tokenized"))
    there.done("tokenize")
    return there


@pytest.fixture
def no_ray() -> Iterator[None]:
    """Steps do their work in this process, for tests of what is the same whoever does it."""
    with without_ray():
        yield


@pytest.fixture(scope="session")
def trained(tokenized: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run after `train`; not to be changed."""
    there = tokenized.copy(tmp_path_factory.mktemp("trained"))
    with without_ray():
        there.done("train")
    return there


@pytest.fixture(scope="session")
def finished(trained: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run after `encode` and `aggregate`, not compacted; not to be changed."""
    there = trained.copy(tmp_path_factory.mktemp("finished"))
    with without_ray():
        there.done("encode")
        there.done("aggregate")
    return there


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
