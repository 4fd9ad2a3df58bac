"""Connections of a process share what is slow to make, and nothing that one of them does shows in another."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from sae.jobs import drop, lake_commands
from sae.jobs.lake import Lake, connect
from sae.jobs.recent import Recent
from tests.lakes import CORPUS, Small, small_lake

COUNT = "select count(*) from latents"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_lake(tmp_path / "lake")


def test_what_a_connection_creates_is_its_own(small: Small) -> None:
    one, two = connect(small.config.lake), connect(small.config.lake)
    for connection, value in ((one, 1), (two, 2)):
        connection.execute(f"create table mine as select {value} as value")
        assert connection.sql("from mine").fetchall() == [(value,)]
    n = two.sql(COUNT).fetchall()
    one.execute("create view latents as select 7 as atom")
    assert one.sql("from latents").fetchall() == [(7,)]
    assert two.sql(COUNT).fetchall() == connect(small.config.lake).sql(COUNT).fetchall() == n


def test_a_connection_stays_open_when_others_are_closed(small: Small) -> None:
    one, two = connect(small.config.lake), connect(small.config.lake, atoms=(1, 2))
    n = two.sql(COUNT).fetchall()
    one.close()
    del one
    assert two.sql(COUNT).fetchall() == n
    assert connect(small.config.lake, atoms=(1, 2)).sql(COUNT).fetchall() == n


def test_a_connection_keeps_its_version_and_the_next_one_has_the_newest(small: Small) -> None:
    before = connect(small.config.lake)
    n = before.sql(COUNT).fetchall()
    drop.text(small.lake, CORPUS, (3, 4))
    (after,) = connect(small.config.lake).sql(COUNT).fetchall()
    assert after < n[0]
    assert before.sql(COUNT).fetchall() == n


def test_a_lake_made_anew_at_the_same_path_is_another(tmp_path: Path) -> None:
    path = tmp_path / "lake"
    first = small_lake(path, n_contexts=12)
    version, n = first.lake.snapshot().version, connect(str(path)).sql("select count(*) from contexts").fetchall()
    shutil.rmtree(path)
    second = small_lake(path, n_contexts=13)
    assert Lake(str(path)).snapshot().version == second.lake.snapshot().version == version
    assert (n, connect(str(path)).sql("select count(*) from contexts").fetchall()) == ([(12,)], [(13,)])


def test_settings_that_sae_sql_locks_are_not_locked_for_others(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Namespace(lake=small.config.lake, version=None, atoms=None, contexts=None, query=COUNT, format="csv")
    connect(small.config.lake)
    lake_commands.sql(given)
    assert capsys.readouterr().out
    connect(small.config.lake).execute("set threads = 1")


def test_what_does_not_fit_into_memory_is_not_written_to_the_current_folder(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    asking, watching = connect(small.config.lake), connect(small.config.lake)
    asking.execute("set memory_limit = '60MB'; set threads = 1")
    asking.execute("select hash(range) as x, range from range(4_000_000) order by x")
    spilled = watching.sql("select sum(size) from duckdb_temporary_files()").fetchall()
    assert spilled[0][0] > 0
    assert list(current.iterdir()) == []


def test_the_oldest_is_forgotten_and_what_is_asked_for_is_new_again() -> None:
    recent = Recent[str, int](2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]
