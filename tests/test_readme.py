"""The README's SQL runs, its commands parse, its config is valid, its links and make targets exist."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from sae.jobs import cli, views
from sae.schemas import config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Every line of a bash block that runs the program, as words after its name."""
    lines = (shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines())
    return [words[1:] for words in lines if words[:1] == [program]]


@pytest.fixture
def empty_lake() -> Iterator[duckdb.DuckDBPyConnection]:
    """Every table and macro, no row: names and types are checked all the same."""
    with duckdb.connect() as connection:
        connection.execute(views.statements("/nowhere", [], {}))
        yield connection


@pytest.mark.parametrize("query", blocks("sql"))
def test_sql_runs(empty_lake: duckdb.DuckDBPyConnection, query: str) -> None:
    assert empty_lake.execute(query).fetchall() == []


@pytest.mark.parametrize("words", commands("sae"), ids=" ".join)
def test_sae_command_parses(words: list[str]) -> None:
    given, overrides = cli._parser().parse_known_args(words)
    (run_yaml,) = blocks("yaml")
    assert hasattr(given, "command")
    config.parse(run_yaml, cli._pairs(overrides))


@pytest.mark.parametrize("query", [words[2] for words in commands("sae") if words[0] == "sql"])
def test_sql_of_a_sae_command_runs(empty_lake: duckdb.DuckDBPyConnection, query: str) -> None:
    assert empty_lake.execute(query).fetchall() == [(0,)]


def test_jobs_name_modules_that_exist() -> None:
    (words,) = (words for words in commands("ray") if words[0] == "job")
    assert words[words.index("--") + 1 :][:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[-2]) is not None


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {words[0] for words in commands("make")}
    assert named >= {"demo", "test"}
    assert named <= targets


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_what_is_shown_covers_the_demand() -> None:
    assert len(blocks("sql")) >= 5
    assert len(commands("sae")) >= 5
