"""What of the statistics holds while others write: one table of atoms, of runs that are there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.jobs import aggregate, drop, partials
from sae.jobs.lake import connect
from sae.schemas.errors import ConflictError
from tests.lakes import CORPUS, N_LATENTS, NAME, Small, small_lake


@pytest.fixture
def small(tmp_path: Path) -> Small:
    """With nothing aggregated yet."""
    small = small_lake(tmp_path / "lake")
    lake = small.lake
    with lake.transaction("test") as transaction:
        transaction.remove(file for table in ("atoms", "examples") for file in lake.snapshot().select(table))
        transaction.set(f"aggregate/{NAME}", None)
    return small


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Lets something be done in the midst of the next merge."""

    def arranged(act: Callable[[], Any]) -> None:
        merged = partials.atoms

        def first(*given: Any) -> Any:
            monkeypatch.setattr(partials, "atoms", merged)
            found = list(merged(*given))
            act()
            return found

        monkeypatch.setattr(partials, "atoms", first)

    return arranged


def test_of_two_that_merge_at_the_same_time_one_writes(
    small: Small, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    meanwhile(lambda: aggregate.merge(small.lake, NAME))
    with pytest.raises(ConflictError, match=f"aggregate/{NAME}: changed by another writer"):
        aggregate.merge(small.lake, NAME)
    assert connect(small.config.lake).sql("select count(*) from atoms").fetchall() == [(N_LATENTS,)]


def test_runs_that_are_dropped_meanwhile_are_not_merged(
    small: Small, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    meanwhile(lambda: drop.latents(small.lake, CORPUS, [NAME], 1))
    with pytest.raises(ConflictError, match=f"runs of {NAME}: dropped by another writer"):
        aggregate.merge(small.lake, NAME)
    aggregate.merge(small.lake, NAME)
    ((held, counted),) = (
        connect(small.config.lake)
        .sql("select (select count(*) from latents), (select sum(n_active) from atoms)")
        .fetchall()
    )
    assert held == counted
