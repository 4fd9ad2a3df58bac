"""Format html: one file that shows a handful of atoms in any browser, by itself."""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final

import pyarrow as pa

from sae.jobs import bundled, progress, site, storage
from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports import static_site
from sae.jobs.exports.folder import File
from sae.jobs.lake import Lake, Range, Snapshot
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from sae.schemas.site import ATOMS_PER_BLOCK, EMBEDDED, Dictionary, Entry, Site

MOST_ATOMS: Final = 20
_SCRIPT: Final = re.compile(r'<script type="module"[^>]* src="\./([^"]+)"></script>')
_STYLE: Final = re.compile(r'<link rel="stylesheet"[^>]* href="\./([^"]+)">')
_ICON: Final = re.compile(r'\s*<link rel="icon"[^>]*/?>')
_MARK: Final = f'id="{EMBEDDED}"'


def write(lake: Lake, snapshot: Snapshot, config: Run) -> None:
    """Writes `export.folder`/AUTOENCODER.html with the atoms of `export.pick` or `export.atoms`."""
    name = config.autoencoder.name
    dictionary = static_site.dictionary(snapshot, name, config.export.atoms)
    atoms = _atoms(config, dictionary)
    path = storage.join(config.export.folder, f"{name}.html")
    known = storage.read_if_there(path)
    if known is not None and _MARK.encode() not in known:
        raise ConfigError(f"export.folder: {path} is there and no export; give another folder or delete this file")
    picked = atoms if len(atoms) <= atoms[-1] - atoms[0] else []
    dictionary = dictionary.model_copy(update={"atoms": (atoms[0], atoms[-1]), "picked": picked})
    made = site.SiteTables(AtomTables(lake, snapshot, name))
    data = page(_files(made, dictionary, atoms, config.export.warning or None))
    storage.write_atomic(path, data)
    progress.say(f"export: {len(atoms)} atoms of {name} in {path}, {len(data):,} bytes")


def page(files: Iterable[File]) -> bytes:
    """The viewer's page with itself and the files of a site inside."""
    encoded = {path: base64.b64encode(data).decode() for path, data in files}
    # Base64 and paths hold nothing that ends a script.
    data = json.dumps(encoded).replace("<", "\\u003c")
    embedded = f'<script type="application/json" {_MARK}>{data}</script>'
    text = _ICON.sub("", bundled.page().decode())
    text = _STYLE.sub(lambda found: f"<style>{_inlined(found[1], 'style')}</style>", text)
    scripts = [_inlined(path, "script") for path in _SCRIPT.findall(text)]
    text = _SCRIPT.sub("", text)
    # Behind the elements that it draws into.
    script = "".join(f'<script type="module">{each}</script>' for each in scripts)
    head, end, tail = text.rpartition("</body>")
    return f"{head}{embedded}\n{script}\n{end}{tail}".encode()


def embedded(data: bytes) -> dict[str, bytes]:
    """The files in a page; raises ValueError where there are none."""
    found = re.search(rf"<script[^>]*{_MARK}>(.*?)</script>".encode(), data, re.DOTALL)
    if found is None:
        raise ValueError("no data is in it")
    return {path: base64.b64decode(text, validate=True) for path, text in json.loads(found[1]).items()}


def _inlined(path: str, element: str) -> str:
    """A file's text, in which nothing ends the element."""
    return bundled.files()[path].decode().replace(f"</{element}", f"<\\/{element}")


def _atoms(config: Run, dictionary: Dictionary) -> list[int]:
    """The atoms that are asked for; raises ConfigError where they are too many or not there."""
    first, last = dictionary.atoms
    chosen = sorted(set(config.export.pick))
    if not chosen:
        if last + 1 - first > MOST_ATOMS:
            raise ConfigError(
                f"export.pick: html holds at most {MOST_ATOMS} atoms, {last + 1 - first:,} are asked for; give "
                f"--export.pick '[452, 2285]' or a shorter export.atoms, or --export.format site for all"
            )
        return list(range(first, last + 1))
    if chosen[-1] >= dictionary.n_latents:
        raise ConfigError(
            f"export.pick: got {chosen[-1]}; autoencoder {dictionary.autoencoder} has atoms 0 to "
            f"{dictionary.n_latents - 1}"
        )
    return chosen


def _files(made: site.SiteTables, dictionary: Dictionary, atoms: list[int], warning: str | None) -> Iterator[File]:
    name = dictionary.autoencoder
    yield (
        static_site.SITE,
        Site(autoencoders=[Entry(name=name, path=name)], warning=warning).model_dump_json().encode(),
    )
    yield f"{name}/manifest.json", dictionary.model_dump_json().encode()
    yield f"{name}/atoms.parquet", site.parquet(pa.concat_tables([made.atoms((atom, atom)) for atom in atoms]))
    yield f"{name}/metrics.parquet", site.parquet(made.metrics())
    for number in sorted({atom // ATOMS_PER_BLOCK for atom in atoms}):
        ranges: list[Range] = [(atom, atom) for atom in atoms if atom // ATOMS_PER_BLOCK == number]
        pages, sequences, effects = (
            pa.concat_tables([make(each) for each in ranges]) for make in (made.pages, made.sequences, made.effects)
        )
        yield f"{name}/pages/{number}.parquet", site.parquet(pages)
        yield f"{name}/sequences/{number}.parquet", site.parquet_of_atoms(sequences, number)
        yield f"{name}/effects/{number}.parquet", site.parquet_of_atoms(effects, number)
