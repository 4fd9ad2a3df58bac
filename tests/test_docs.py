"""The pages under docs/ say what the programs print: their commands run, their figures are those of today."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from sae.jobs import cli
from sae.schemas import config
from tests.pages import Page
from tests.tiny_run import sae

PAGE = Page(Path(__file__).resolve().parent.parent / "docs" / "cluster.md")


def shown() -> list[tuple[str, list[str]]]:
    """Each `sae plan` command with the output that is shown behind it."""
    pairs, command = [], ""
    for block in PAGE.blocks():
        if block.language == "bash" and block.lines[0].startswith("sae plan"):
            (command,) = block.lines
        elif block.language == "text":
            pairs.append((command, block.lines))
    return pairs


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's run, in the working directory."""
    (of_page,) = PAGE.of("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(of_page)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize(("command", "expected"), shown(), ids=[f"{at}" for at in range(len(shown()))])
def test_figures_are_those_that_the_command_prints(run_yaml: Path, command: str, expected: list[str]) -> None:
    # The last of them belongs to the first command, which the page need not repeat.
    command = "sae plan run.yaml" if expected[0].startswith("checkpoints") else command
    result = sae(*shlex.split(command)[1:])
    assert result.code == 0, result.stderr
    assert "\n".join(expected) in result.stdout


def test_there_are_figures_for_1_8_and_64_gpus() -> None:
    assert len(shown()) >= 8
    (rows,) = (lines for command, lines in shown()[:1])
    assert [line.split()[0] for line in rows[2:]] == ["1", "8", "64"]


@pytest.mark.parametrize("given", PAGE.words("sae"), ids=" ".join)
def test_commands_parse(run_yaml: Path, given: list[str]) -> None:
    parsed, overrides = cli._parser().parse_known_args(given)
    assert hasattr(parsed, "command")
    config.parse(run_yaml.read_text(), cli._pairs(overrides))


def test_jobs_name_modules_that_exist(run_yaml: Path) -> None:
    (job,) = (given for given in PAGE.words("ray") if given[:2] == ["job", "submit"])
    python, flag, module, path, *overrides = job[job.index("--") + 1 :]
    assert (python, flag, path) == ("python", "-m", run_yaml.name)
    assert importlib.util.find_spec(module) is not None
    config.parse(run_yaml.read_text(), cli._pairs(overrides))


@pytest.mark.parametrize("link", PAGE.links())
def test_link_leads_somewhere(link: str) -> None:
    assert PAGE.leads(link)


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`((?:cluster|training)\.(?!yaml)[a-z_]+)`", PAGE.text))))
def test_keys_are_those_of_the_config(key: str) -> None:
    section, name = key.split(".")
    known = config.Cluster.model_fields if section == "cluster" else config.Training.model_fields
    assert name in known
