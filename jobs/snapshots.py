"""What a lake holds at one version."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sae.jobs.views import Range
from sae.schemas.errors import LakeError


@dataclass(frozen=True, slots=True)
class DataFile:
    """One immutable file. Ranges are inclusive; `tokens` counts the tokens that its rows speak of."""

    path: str
    table: str
    rows: int
    bytes: int
    sha256: str
    corpus: str | None = None
    autoencoder: str | None = None
    subject: str | None = None
    run: int | None = None
    tokens: int = 0
    atoms: Range | None = None
    contexts: Range | None = None

    def to_json(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataFile":
        unknown = sorted(value.keys() - {each.name for each in dataclasses.fields(cls)})
        if unknown:
            raise LakeError(
                f"{value.get('path')}: the lake's log has {', '.join(unknown)} for it, which this sae does not know, "
                "so a newer one wrote it; upgrade sae"
            )
        ranges = {key: tuple(value[key]) if value[key] else None for key in ("atoms", "contexts")}
        return cls(**{**value, **ranges})


@dataclass(frozen=True)
class Snapshot:
    """What the lake holds at one version; version -1 is a lake with nothing in it.

    `entry` is the sha256 of the last log entry, by which two lakes that lay at one path are told apart.
    """

    version: int = -1
    files: Mapping[str, DataFile] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    units: frozenset[str] = frozenset()
    entry: str | None = field(default=None, compare=False)

    def select(
        self,
        table: str,
        corpus: str | None = None,
        autoencoder: str | None = None,
        subject: str | None = None,
    ) -> list[DataFile]:
        """The table's files in order of run and path; None stands for any."""
        chosen = (
            file
            for file in self.files.values()
            if file.table == table
            and corpus in (None, file.corpus)
            and autoencoder in (None, file.autoencoder)
            and subject in (None, file.subject)
        )
        return sorted(chosen, key=lambda file: (-1 if file.run is None else file.run, file.path))

    def apply(self, entries: Iterable[dict[str, Any]]) -> "Snapshot":
        """The snapshot after further log entries."""
        version, files, properties, units, last = (
            self.version,
            dict(self.files),
            dict(self.properties),
            set(self.units),
            self.entry,
        )
        for entry in entries:
            version, last = entry["version"], entry.get("sha256")
            for path in entry["remove"]:
                files.pop(path, None)
            files.update((value["path"], DataFile.from_json(value)) for value in entry["add"])
            properties.update(entry["set"])
            units.difference_update(entry["forget"])
            units.update([entry["unit"]] if entry["unit"] else [])
        kept = {key: value for key, value in properties.items() if value is not None}
        return Snapshot(version, files, kept, frozenset(units), last)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "files": [file.to_json() for file in self.files.values()],
            "properties": dict(self.properties),
            "units": sorted(self.units),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Snapshot":
        files = {each["path"]: DataFile.from_json(each) for each in value["files"]}
        return cls(value["version"], files, value["properties"], frozenset(value["units"]), value.get("entry"))
