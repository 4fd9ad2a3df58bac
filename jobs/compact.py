"""Step compact: merges the sorted runs of an autoencoder into files of atom ranges, each sorted as the runs are.

What was compacted before is merged again only where it is not much larger than what is new, so that a row is written
a number of times that grows with the logarithm of the lake's size. Where it is asked for, runs are first copied in the
order of tokens, and tokens laid out for SQL.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayError

from sae.jobs import by_token, cluster, merge, progress
from sae.jobs.lake import DataFile, Lake, Range, Snapshot, write_views
from sae.jobs.token_cache import open_tokens
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError

_MB: Final = 10**6
_GROWTH: Final = 8  # rows of a compacted set for each new one, from which on it is left alone


Makes = Callable[[functools.partial[list[DataFile]], list[Range]], Iterator[list[DataFile]]]


@dataclass(frozen=True)
class Sorted:
    """Files of disjoint atoms: a run, or what a compaction wrote."""

    files: tuple[DataFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


def run(config: Run) -> None:
    """Merges until no two sorted sets of files are worth it."""
    lake = Lake(config.lake)
    name = config.autoencoder.name
    snapshot = lake.snapshot()
    if f"encode/{name}" not in snapshot.properties:
        raise IncompleteError(f"compact: {name} has no latents in {config.lake}; run sae encode first")
    by_tasks = functools.partial(_by_tasks, config)
    if config.compact.by_token:
        n_copied = by_token.refresh(lake, name, config.compact.memory_mb * _MB, by_tasks)
        progress.say(f"compact: copied {n_copied} runs of {name} by token")
        for corpus in sorted({str(file.corpus) for file in snapshot.select("moments", autoencoder=name)}):
            open_tokens(lake, snapshot, corpus)
    before = snapshot.select("latents", autoencoder=name)
    _remove_empty(lake, before)
    while chosen := _worth_merging(lake.snapshot(), config):
        merge_sets(lake, name, chosen, config.compact.file_rows, by_tasks)
    files = lake.snapshot().select("latents", autoencoder=name)
    if files == before:
        progress.say(f"compact: the latents of {name} are compact")
        return
    write_views(lake)
    progress.say(f"compact: {len(before)} files of {name} became {len(files)}")


def _remove_empty(lake: Lake, files: list[DataFile]) -> None:
    """Takes out files without a row: what is known of their runs stays in the moments."""
    empty = [file for file in files if not file.rows]
    if empty:
        with lake.transaction("compact") as transaction:
            transaction.remove(empty)


def _worth_merging(snapshot: Snapshot, config: Run) -> list[Sorted]:
    """The smallest sorted sets, as many as the memory allows, up to one that is much larger than those together."""
    files = snapshot.select("latents", autoencoder=config.autoencoder.name)
    smallest = sorted(sorted_sets(files), key=lambda each: each.rows)[: sets_at_once(config)]
    return smallest[: worth_merging([each.rows for each in smallest])]


def sets_at_once(config: Run) -> int:
    """Sorted sets that the memory allows to merge together."""
    return max(2, config.compact.memory_mb * _MB // merge.CHAIN_BYTES)


def worth_merging(rows: Sequence[int]) -> int:
    """How many sets to merge together, given how many rows each has, the smallest first; 0 where none are worth it."""
    chosen = together = 0
    for each in rows:
        if chosen and each > _GROWTH * together:
            break
        chosen, together = chosen + 1, together + each
    return chosen if chosen > 1 else 0


def sorted_sets(files: Sequence[DataFile]) -> list[Sorted]:
    """Each run by itself, and range files in as few sets of disjoint atoms as there can be."""
    runs = [Sorted((file,)) for file in files if file.run is not None]
    ranges = [file for file in files if file.run is None and file.atoms is not None]
    chains: list[list[DataFile]] = []
    for file in sorted(ranges, key=lambda file: file.atoms or (0, 0)):
        fitting = (chain for chain in chains if _last_atom(chain) < _first_atom(file))
        chain = next(fitting, None)
        if chain is None:
            chains.append([file])
        else:
            chain.append(file)
    return [*runs, *(Sorted(tuple(chain)) for chain in chains)]


def _first_atom(file: DataFile) -> int:
    assert file.atoms is not None
    return file.atoms[0]


def _last_atom(chain: Sequence[DataFile]) -> int:
    assert chain[-1].atoms is not None
    return chain[-1].atoms[1]


def merge_sets(lake: Lake, name: str, chosen: list[Sorted], file_rows: int, made: Makes | None = None) -> None:
    """Replaces sorted sets by files of atom ranges, made one after the other unless told otherwise."""
    chains: list[merge.Chain] = [lake.verified(each.files) for each in chosen]
    lake.check_room(sum(file.bytes for each in chosen for file in each.files))
    ranges = _ranges(chains, file_rows)
    write = functools.partial(_written, lake.path, name, chains)
    with lake.transaction("compact") as transaction, progress.bar("compact", len(ranges), "files") as bar:
        transaction.remove(file for each in chosen for file in each.files)
        for files in made(write, ranges) if made is not None else map(write, ranges):
            transaction.adopt(files)
            bar.advance(1)


def _by_tasks(config: Run, work: functools.partial[Any], parts: Sequence[Any]) -> Iterator[Any]:
    """What the work gives of each part; of several, done in as many processes as there are processors."""
    if len(parts) < 2:
        yield from map(work, parts)
        return
    with cluster.connected(config):
        # A node with less memory than asked for still runs one at a time.
        largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
        task = ray.remote(num_cpus=1, memory=min(config.compact.memory_mb * _MB, int(largest)))(work.func)
        pending = [task.remote(*work.args, each) for each in parts]
        try:
            while pending:
                (done,), pending = ray.wait(pending)
                yield ray.get(done)
        except RayError as error:
            raise cluster.cause(error) from None


def _written(path: str, name: str, chains: list[merge.Chain], atoms: Range) -> list[DataFile]:
    """One file of the latents of an atom range, for a transaction elsewhere to adopt."""
    transaction = Lake(path).transaction("compact")
    try:
        transaction.write("latents", merge.merged(chains, atoms), autoencoder=name)
    except BaseException:
        transaction.discard()
        raise
    return transaction.hand_over()


def _ranges(chains: list[merge.Chain], file_rows: int) -> list[Range]:
    """Inclusive atom ranges of about file_rows rows each; an atom is never split."""
    groups = [group for chain in chains for group in merge.row_groups(chain)]
    ranges: list[Range] = []
    first, rows = 0, 0
    for group in sorted(groups, key=lambda group: group.atoms):
        low = group.atoms[0]
        if rows + group.rows > file_rows and low > first:
            ranges.append((first, low - 1))
            first, rows = low, 0
        rows += group.rows
    return [*ranges, (first, max(group.atoms[1] for group in groups))]


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("compact")
