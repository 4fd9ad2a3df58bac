"""Time travel: what a version of the lake answers never changes."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sae.jobs import aggregate, lake_commands, views
from sae.jobs.lake import connect
from tests.lakes import NAME, encode, small_lake


def test_every_version_tells_what_was_answered_then(tmp_path: Path) -> None:
    small = small_lake(tmp_path / "lake")
    queries = [
        *(f"select * from {table} order by all" for table in sorted(views.TABLES)),
        "select * from runs order by all",
        "select * from autoencoders order by all",
        f"from atom_histogram('{NAME}', 3)",
        f"from atom_examples('{NAME}', 3, 'top')",
        f"from coactive_atoms('{NAME}', 3)",
    ]

    def answers(version: int | None = None) -> list[Any]:
        with connect(small.config.lake, version) as connection:
            return [connection.execute(query).fetchall() for query in queries]

    def drop(latents: str | None = None, autoencoder: str | None = None) -> None:
        lake_commands.drop(Namespace(lake=small.config.lake, latents=latents, autoencoder=autoencoder))

    then = {small.lake.snapshot().version: answers()}
    steps: list[Callable[[], None]] = [
        lambda: drop(latents=NAME),
        *(partial(encode, small, run) for run in (1, 0, 2)),
        lambda: aggregate.run(small.config),
        lambda: drop(autoencoder=NAME),
    ]
    for step in steps:
        step()
        then[small.lake.snapshot().version] = answers()
    assert len({repr(answer) for answer in then.values()}) == len(steps)  # encoded again, the rows are the same
    assert {version: answers(version) for version in then} == then
