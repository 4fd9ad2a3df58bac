"""The README's SQL runs, its commands parse, its config is valid, its links and make targets exist."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from sae.jobs import cli, views
from sae.schemas import config
from tests.pages import Page

ROOT = Path(__file__).resolve().parent.parent
README = Page(ROOT / "README.md")


@pytest.fixture
def empty_lake() -> Iterator[duckdb.DuckDBPyConnection]:
    """Every table and macro, no row: names and types are checked all the same."""
    with duckdb.connect() as connection:
        connection.execute(views.statements("/nowhere", [], {}))
        yield connection


@pytest.mark.parametrize("query", README.of("sql"))
def test_sql_runs(empty_lake: duckdb.DuckDBPyConnection, query: str) -> None:
    assert empty_lake.execute(query).fetchall() == []


@pytest.mark.parametrize("words", README.words("sae"), ids=" ".join)
def test_sae_command_parses(words: list[str]) -> None:
    given, overrides = cli._parser().parse_known_args(words)
    (run_yaml,) = README.of("yaml")
    assert hasattr(given, "command")
    config.parse(run_yaml, cli._pairs(overrides))


@pytest.mark.parametrize("query", [words[2] for words in README.words("sae") if words[0] == "sql"])
def test_sql_of_a_sae_command_runs(empty_lake: duckdb.DuckDBPyConnection, query: str) -> None:
    assert empty_lake.execute(query).fetchall() == [(0,)]


def test_jobs_name_modules_that_exist() -> None:
    (words,) = (words for words in README.words("ray") if words[0] == "job")
    assert words[words.index("--") + 1 :][:2] == ["python", "-m"]
    assert importlib.util.find_spec(words[-2]) is not None


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {words[0] for words in README.words("make")}
    assert named >= {"demo", "test"}
    assert named <= targets


@pytest.mark.parametrize("link", README.links())
def test_link_leads_somewhere(link: str) -> None:
    assert README.leads(link)


def test_what_is_shown_covers_the_demand() -> None:
    assert len(README.of("sql")) >= 5
    assert len(README.words("sae")) >= 5
