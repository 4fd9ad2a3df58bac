"""What the steps of a run really wrote and took: from the lake's log, and from the manifest of an export."""

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from sae.jobs import export
from sae.jobs.lake import DataFile, Lake, Snapshot
from sae.jobs.lake_costs import Table
from sae.schemas.config import Run
from sae.schemas.errors import SubjectError

_READERS: Final = 32  # of entries, which in an object store are waited for
_STEPS: Final = {  # by the operation of an entry
    "tokenize": "tokenize",
    "harvest": "harvest",
    "encode": "encode",
    "by_token": "compact",
    "compact": "compact",
    "aggregate": "aggregate",
    "decoders": "aggregate",
    "effects": "effects",
    "logits": "effects",
    "neighbours": "effects",
    "explain": "explain",
}

Entry = dict[str, Any]
Span = tuple[float, float]


class Spent(NamedTuple):
    """seconds: None where it was not noted."""

    tables: dict[str, Table]
    seconds: float | None


def spent(lake: Lake, snapshot: Snapshot, config: Run) -> dict[str, Spent]:
    """By step, those that have written something for the run's corpus and autoencoder.

    Compacted files hold all corpora of an autoencoder.
    """
    corpus, name = config.corpus.name, config.autoencoder.name
    subject = _subject(snapshot, config)
    entries = _entries(lake, snapshot, config, subject)
    encoded = [DataFile.from_json(file) for entry in entries.get("encode", []) for file in entry["add"]]
    files = {
        "tokenize": snapshot.select("contexts", corpus=corpus),
        "harvest": snapshot.select("activations", corpus=corpus, subject=subject) if subject else [],
        "encode": encoded,
        "compact": [
            *(file for file in snapshot.select("latents", autoencoder=name) if file.run is None),
            *snapshot.select("latents_by_token", corpus=corpus, autoencoder=name),
        ],
        "aggregate": [
            file for table in ("atoms", "examples", "decoders") for file in snapshot.select(table, autoencoder=name)
        ],
        "effects": [
            file for table in ("effects", "logits", "neighbours") for file in snapshot.select(table, autoencoder=name)
        ],
        "explain": snapshot.select("explanations", autoencoder=name),
    }
    found = {step: Spent(_tables(those), _seconds(entries.get(step, []))) for step, those in files.items() if those}
    written = export.written(snapshot, config)
    if written is not None:
        manifest, sizes = written
        found["export"] = Spent({"json": Table(len(sizes), sum(sizes), len(sizes))}, manifest.seconds)
    return found


def _subject(snapshot: Snapshot, config: Run) -> str | None:
    """Whose cached activations are the run's; None where there are none, or the subject's config is not at hand."""
    if not snapshot.select("activations", corpus=config.corpus.name):
        return None
    from sae.subject import fingerprint  # with transformer_lens, which takes seconds to import

    with contextlib.suppress(SubjectError):
        return fingerprint(**config.subject.model_dump())[:12]
    return None


def _entries(lake: Lake, snapshot: Snapshot, config: Run, subject: str | None) -> dict[str, list[Entry]]:
    """The log's entries about the run, by step, without those of what was dropped or done anew."""
    units: dict[str, Entry] = {}
    others: list[Entry] = []
    for entry in _read(lake, snapshot):
        for unit in entry["forget"]:
            units.pop(unit, None)
        if not _is_about(entry, config, subject):
            continue
        if entry["unit"]:
            units[entry["unit"]] = entry
        else:
            others.append(entry)
    first = min((entry["version"] for unit, entry in units.items() if unit.startswith("encode/")), default=0)
    found: dict[str, list[Entry]] = {}
    for entry in (*units.values(), *(entry for entry in others if entry["version"] > first)):
        found.setdefault(_STEPS[entry["operation"]], []).append(entry)
    return found


def _read(lake: Lake, snapshot: Snapshot) -> Iterator[Entry]:
    with ThreadPoolExecutor(_READERS) as pool:
        yield from filter(None, pool.map(lake.log.entry, range(snapshot.version + 1)))


def _is_about(entry: Entry, config: Run, subject: str | None) -> bool:
    """Whether it added something to the run's corpus, of its subject or for its autoencoder."""
    if entry.get("operation") not in _STEPS:
        return False
    keys = ("corpus", "autoencoder", "subject")
    corpora, autoencoders, subjects = ({file[key] for file in entry["add"]} - {None} for key in keys)
    if not corpora | autoencoders:
        return False
    own = corpora <= {config.corpus.name} and autoencoders <= {config.autoencoder.name}
    return own and subjects <= {subject}


def _tables(files: Iterable[DataFile]) -> dict[str, Table]:
    found: dict[str, Table] = {}
    for file in files:
        rows, size, n = found.get(file.table, Table(0, 0, 0))
        found[file.table] = Table(rows + file.rows, size + file.bytes, n + 1)
    return found


def _seconds(entries: Iterable[Entry]) -> float | None:
    """In which something was worked on: runs that overlap count once, and pauses between commands not at all."""
    spans = [(began, ended) for began, ended in (entry.get("span", (None, None)) for entry in entries)]
    if not spans or any(began is None for began, _ in spans):
        return None
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
