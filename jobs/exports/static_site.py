"""Format site: the viewer and its Parquet files, a folder that any file host serves."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
from pydantic import ValidationError

from sae.jobs import bundled, site, storage
from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports.folder import File, Format, Writer
from sae.jobs.lake import Range, Snapshot
from sae.jobs.origin import origin, votes
from sae.schemas.errors import ConfigError
from sae.schemas.site import ATOMS_PER_GROUP, Dictionary, Entry, Site

SITE: Final = "site.json"


def _pages(made: site.SiteTables, number: int, atoms: Range) -> bytes:
    return site.parquet(made.pages(atoms))


def _sequences(made: site.SiteTables, number: int, atoms: Range) -> bytes:
    return site.parquet_of_atoms(made.sequences(atoms), number)


def _effects(made: site.SiteTables, number: int, atoms: Range) -> bytes:
    return site.parquet_of_atoms(made.effects(atoms), number)


def _atoms(made: site.SiteTables, atoms: Range) -> bytes:
    first, last = atoms
    starts = range(first, last + 1, ATOMS_PER_GROUP)
    parts = [made.atoms((start, min(start + ATOMS_PER_GROUP - 1, last))) for start in starts]
    return site.parquet(pa.concat_tables(parts))


def _metrics(made: site.SiteTables, atoms: Range) -> bytes:
    return site.parquet(made.metrics())


# Files of a block, by folder: the atoms are those of the block that the site has.
OF_BLOCK: Final[dict[str, Callable[[site.SiteTables, int, Range], bytes]]] = {
    "pages": _pages,
    "sequences": _sequences,
    "effects": _effects,
}
# Files of all atoms.
WHOLE: Final[dict[str, Callable[[site.SiteTables, Range], bytes]]] = {
    "atoms.parquet": _atoms,
    "metrics.parquet": _metrics,
}


def dictionary(snapshot: Snapshot, name: str, atoms: Range | None, **more: Any) -> Dictionary:
    """The manifest of a site's autoencoder; raises as `origin` does."""
    metrics = sorted(file.sha256 for file in snapshot.select("metrics", autoencoder=name))
    return Dictionary(**origin(snapshot, name, atoms, metrics=metrics), votes=votes(snapshot, name), **more)


def _writer(tables: AtomTables, manifest: Dictionary) -> Writer:
    made = site.SiteTables(tables)

    def files(atoms: Range) -> Iterator[File]:
        for number in site.blocks(atoms):
            for folder, of_block in OF_BLOCK.items():
                yield f"{folder}/{number}.parquet", of_block(made, number, site.block(number, atoms))

    return files


def _names(atoms: Range) -> Iterator[str]:
    return (f"{folder}/{number}.parquet" for number in site.blocks(atoms) for folder in OF_BLOCK)


def _rest(tables: AtomTables, manifest: Dictionary) -> Iterator[File]:
    made = site.SiteTables(tables)
    return ((name, whole(made, manifest.atoms)) for name, whole in WHOLE.items())


def finish(folder: str, entry: Entry, warning: str | None) -> None:
    """Brings the viewer to a site, the autoencoder's name into its list, and a warning where one is given."""
    path = storage.join(folder, SITE)
    data = storage.read_if_there(path)
    try:
        known = Site.model_validate_json(data) if data else Site(autoencoders=[])
    except ValidationError:
        raise ConfigError(
            f"export.folder: {path} is not a site of this version; give another folder or delete this one"
        ) from None
    others = [one for one in known.autoencoders if entry.name != one.name and entry.path != one.path]
    entries = sorted([*others, entry], key=lambda one: one.name)
    bundled.page()
    for name, content in bundled.files().items():
        storage.write_atomic(storage.join(folder, name), content)
    told = known.warning if warning is None else warning or None
    text = known.model_copy(update={"autoencoders": entries, "warning": told}).model_dump_json(indent=2) + "\n"
    storage.write_atomic(path, text.encode())


FORMAT: Final = Format(
    name="site",
    title="atoms",
    manifest=Dictionary,
    at_once=256,
    writer=_writer,
    names=_names,
    owned=re.compile(r"(pages|sequences|effects)/[0-9]+\.parquet"),
    rest=_rest,
)
