"""Format openai: the JSON files that the reference viewer reads, one for each atom."""

import re
from collections.abc import Iterator
from typing import Final

from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports.folder import File, Format, Writer
from sae.jobs.lake import Range
from sae.jobs.pages import Pages
from sae.schemas.viewer import Manifest

BIN_WIDTH: Final = 0.2  # of the reference viewer's histograms


def _writer(tables: AtomTables, manifest: Manifest) -> Writer:
    pages = Pages(tables, manifest.decimals)

    def files(atoms: Range) -> Iterator[File]:
        for atom, plain, ablated in pages.of(atoms):
            yield f"atoms/{atom}.json", plain
            if ablated is not None:
                yield f"atoms/{atom}-ablated.json", ablated

    return files


def _names(atoms: Range) -> Iterator[str]:
    return (f"atoms/{atom}.json" for atom in range(atoms[0], atoms[1] + 1))


def _ablated(atoms: Range) -> Iterator[str]:
    return (f"atoms/{atom}-ablated.json" for atom in range(atoms[0], atoms[1] + 1))


FORMAT: Final = Format(
    name="openai",
    title="atoms",
    manifest=Manifest,
    at_once=256,
    writer=_writer,
    names=_names,
    maybe=_ablated,
    owned=re.compile(r"atoms/[0-9]+(-ablated)?\.json"),
)
