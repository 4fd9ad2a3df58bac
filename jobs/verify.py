"""Whether every file of a lake is as it was written."""

from collections.abc import Iterator

from sae.jobs import storage
from sae.jobs.lake import DataFile, Lake, Snapshot
from sae.jobs.log import DamagedError, Entry
from sae.jobs.progress import bar

_RESTORE = "restore the file from a copy of the lake"


def damages(lake: Lake) -> Iterator[str]:
    """One line for each file of the log, or of the newest version's data, that is not as it was written.

    All of them are read. Raises LakeError where a newer sae wrote the lake.
    """
    versions, checkpoints = lake.log.versions(), lake.log.checkpoints()
    with bar("verify the log", len(versions) + len(checkpoints), "files") as progress:
        entries: list[Entry] = []
        for version in range(max(versions, default=-1) + 1):
            try:
                entry = lake.log.entry(version)
            except DamagedError as error:
                yield str(error)
            else:
                if entry is None:
                    yield f"{lake.log.path(version)}: is missing; {_RESTORE}"
                else:
                    entries.append(entry)
            progress.advance(1)
        for version in checkpoints:
            if lake.log.read_checkpoint(version) is None:
                yield f"{lake.log.checkpoint_path(version)}: is damaged; delete it, it only saves time"
            progress.advance(1)
    yield from _of_data(lake, list(_known(lake, entries).files.values()))


def _known(lake: Lake, entries: list[Entry]) -> Snapshot:
    """The newest version, of a damaged log as far as it can be told."""
    try:
        return lake.snapshot()
    except DamagedError:
        return Snapshot().apply(entries)


def _of_data(lake: Lake, files: list[DataFile]) -> Iterator[str]:
    with bar("verify", len(files), "files") as progress:
        for file in files:
            path = lake.absolute(file)
            size = storage.size_if_there(path)
            if size is None:
                yield f"{path}: is missing; {_RESTORE}"
            elif size != file.bytes:
                yield f"{path}: has {size} bytes, the log says {file.bytes}; {_RESTORE}"
            elif storage.sha256(path) != file.sha256:
                yield f"{path}: has another sha256 than the log says; {_RESTORE}"
            progress.advance(1)
