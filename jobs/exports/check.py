"""Command validate: reads exported files as their readers would, and says which file and field is wrong."""

import gzip
import io
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from sae.jobs import storage
from sae.jobs.exports import html_page, neuronpedia, saedashboard, static_site, viewer_json
from sae.jobs.exports.folder import MANIFEST
from sae.jobs.site import block, blocks
from sae.schemas import neuronpedia as rows
from sae.schemas.errors import ConfigError, LakeError
from sae.schemas.origin import Exported
from sae.schemas.saedashboard import Batch
from sae.schemas.site import ATOMS_PER_BLOCK, FILES, Dictionary, Site
from sae.schemas.viewer import AtomFile, Manifest

_MOST_LINES: Final = 100
_PER_ATOM: Final = ("sequences", "effects")

Read = Callable[[str], bytes | None]
"""The content of a file of the export by its path; None where it is missing."""


class Export(NamedTuple):
    """What was exported: its format, how its files are read, and where each autoencoder's are."""

    format: str
    read: Read
    paths: list[str]


class _Told(BaseModel):
    """Of any manifest."""

    format: str = "openai"


def validate(given: Namespace) -> None:
    """Prints a line for each of the first faults; raises LakeError where there is one."""
    export = found(given.folder)
    n_faults = 0
    for n_faults, line in enumerate(faults(export), 1):
        if n_faults <= _MOST_LINES:
            print(line, flush=True)
    if n_faults:
        raise LakeError(f"validate: {n_faults:,} faults in {given.folder}; run sae export again, into another folder")
    print(f"{given.folder} is as format {export.format} wants it")


def found(folder: str) -> Export:
    """What a folder or file holds; raises ConfigError where no export is there."""
    if folder.endswith(".html"):
        try:
            files = html_page.embedded(storage.read_bytes(folder))
        except ValueError as error:
            raise ConfigError(f"{folder}: not a page that sae export wrote ({error})") from None
        return Export("html", files.get, [])
    read: Read = lambda path: storage.read_if_there(storage.join(folder, path))  # noqa: E731
    if read(static_site.SITE) is not None:
        return Export("site", read, [])
    paths = [path for path in storage.list_files(folder) if path.rpartition("/")[2] == MANIFEST]
    if not paths:
        raise ConfigError(
            f"{folder}: holds nothing that sae export wrote (no {static_site.SITE}, no {MANIFEST}); give its "
            "export.folder, or an .html file"
        )
    return Export(_format(read(paths[0])), read, [path.rpartition("/")[0] for path in paths])


def _format(manifest: bytes | None) -> str:
    """What a manifest tells, which may be damaged: what is wrong with it is told later."""
    try:
        return _Told.model_validate_json(manifest or b"").format
    except ValidationError:
        return _Told().format


def faults(export: Export) -> Iterator[str]:
    """A line for each fault: the file, the field, and what is wrong with it."""
    if export.format in ("site", "html"):
        yield from _of_site(export.read)
        return
    for path in export.paths:
        name = storage.join(path, MANIFEST)
        manifest, lines = _model(Manifest, name, export.read(name))
        yield from lines
        if isinstance(manifest, Manifest):
            yield from _of_manifest(name, manifest)
            read: Read = lambda file, path=path: export.read(storage.join(path, file))  # type: ignore[misc]  # noqa: E731
            for line in _CHECKS[manifest.format](read, manifest):
                yield storage.join(path, line)


def _of_manifest(name: str, manifest: Exported) -> Iterator[str]:
    if not manifest.complete:
        yield f"{name}: complete: is false; the export was interrupted"


def _of_viewer(read: Read, manifest: Manifest) -> Iterator[str]:
    for name in viewer_json.FORMAT.names(manifest.atoms):
        for path in (name, name.replace(".json", "-ablated.json")):
            data = read(path)
            if data is not None or path == name:
                yield from _model(AtomFile, path, data)[1]


def _of_saedashboard(read: Read, manifest: Manifest) -> Iterator[str]:
    atoms: list[int] = []
    for name in saedashboard.FORMAT.names(manifest.atoms):
        batch, lines = _model(Batch, name, read(name))
        yield from lines
        atoms += [feature.feature_index for feature in batch.features] if isinstance(batch, Batch) else []
    yield from _of_atoms("batch-*.json: features.feature_index", atoms, manifest)


def _of_neuronpedia(read: Read, manifest: Manifest) -> Iterator[str]:
    for name in ("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl"):
        yield from _of_lines(name, rows.FILES[name], read(name))[1]
    atoms: list[int] = []
    for name in neuronpedia.FORMAT.names(manifest.atoms):
        features, lines = _of_lines(name, rows.Feature, read(name))
        yield from lines
        atoms += [int(feature.index) for feature in features if isinstance(feature, rows.Feature)]
        name = name.replace("features", "activations")
        data = read(name)
        if data is not None:
            yield from _of_lines(name, rows.Activation, data)[1]
    yield from _of_atoms("features/batch-*.jsonl.gz: index", atoms, manifest)


_CHECKS: Final[dict[str, Callable[[Read, Manifest], Iterator[str]]]] = {
    "openai": _of_viewer,
    "saedashboard": _of_saedashboard,
    "neuronpedia": _of_neuronpedia,
}


def _of_atoms(field: str, atoms: list[int], manifest: Manifest) -> Iterator[str]:
    first, last = manifest.atoms
    missing = sorted(set(range(first, last + 1)) - set(atoms))
    if missing:
        yield f"{field}: atom {missing[0]} is missing, and {len(missing) - 1:,} others"


def _of_lines(name: str, model: type[BaseModel], data: bytes | None) -> tuple[list[BaseModel], list[str]]:
    """The rows of a file of JSON lines, zipped or not, and its faults."""
    if data is not None and name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            return [], [f"{name}: not gzip ({error})"]
    if not data:
        return [], [f"{name}: is {'missing' if data is None else 'empty'}"]
    made: list[BaseModel] = []
    for number, line in enumerate(data.splitlines(), 1):
        row, lines = _model(model, f"{name}: line {number}", line)
        if row is None:
            return made, lines
        made.append(row)
    return made, []


def _of_site(read: Read) -> Iterator[str]:
    listed, lines = _model(Site, static_site.SITE, read(static_site.SITE))
    yield from lines
    for entry in listed.autoencoders if isinstance(listed, Site) else []:
        name = f"{entry.path}/{MANIFEST}"
        manifest, lines = _model(Dictionary, name, read(name))
        yield from lines
        if isinstance(manifest, Dictionary):
            yield from _of_manifest(name, manifest)
            yield from _of_dictionary(read, entry.path, manifest)


def _of_dictionary(read: Read, path: str, manifest: Dictionary) -> Iterator[str]:
    for table in ("atoms", "metrics"):
        yield from _of_parquet(f"{path}/{table}.parquet", table, read, None)
    data = read(f"{path}/atoms.parquet")
    try:
        atoms = pq.read_table(io.BytesIO(data or b""), columns=["atom"])["atom"].to_numpy()
    except (pa.ArrowException, OSError, KeyError):
        return  # told already
    first, last = manifest.atoms
    for number in blocks(manifest.atoms):
        held = block(number, (first, last))
        mine = atoms[(atoms >= held[0]) & (atoms <= held[1])]
        for table in ("pages", *_PER_ATOM) if len(mine) else ():
            yield from _of_parquet(f"{path}/{table}/{number}.parquet", table, read, (number, mine))


def _of_parquet(name: str, table: str, read: Read, of_block: tuple[int, Any] | None) -> Iterator[str]:
    """The faults of a file, which holds a block's atoms where one is given."""
    data = read(name)
    if data is None:
        yield f"{name}: is missing"
        return
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        content = file.read()
    except (pa.ArrowException, OSError) as error:
        yield f"{name}: damaged ({' '.join(str(error).split())[:120]})"
        return
    wrong = [field.name for field in FILES[table] if not _is_like(content.schema, field)]
    if wrong:
        yield f"{name}: {', '.join(wrong)}: missing, or not of the type that the viewer reads"
        return
    yield from (f"{name}: {line}" for line in _of_content(table, content))
    if of_block is None:
        return
    number, atoms = of_block
    if table in _PER_ATOM:
        yield from (f"{name}: {line}" for line in _of_row_groups(file, number))
    elif content["atom"].to_pylist() != atoms.tolist():
        yield f"{name}: atom: has other atoms than atoms.parquet"


def _is_like(schema: pa.Schema, field: pa.Field) -> bool:
    at = schema.get_field_index(field.name)
    if at < 0:
        return False
    kinds = [kind.value_type if pa.types.is_list(kind) else kind for kind in (schema.field(at).type, field.type)]
    return bool(kinds[0] == kinds[1] and pa.types.is_list(schema.field(at).type) == pa.types.is_list(field.type))


def _of_row_groups(file: pq.ParquetFile, number: int) -> Iterator[str]:
    if file.num_row_groups != ATOMS_PER_BLOCK:
        yield f"has {file.num_row_groups} row groups, expected {ATOMS_PER_BLOCK}, one for each atom"
        return
    for place in range(ATOMS_PER_BLOCK):
        others = set(file.read_row_group(place, ["atom"])["atom"].to_pylist()) - {number * ATOMS_PER_BLOCK + place}
        if others:
            yield f"atom: row group {place} holds atom {min(others)}, expected {number * ATOMS_PER_BLOCK + place}"


# Lists that are of one length, in every row.
_TOGETHER: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "pages": (
        ("hist_bin", "hist_n"),
        ("up_tokens", "up_logits"),
        ("down_tokens", "down_logits"),
        ("near", "near_cosine"),
        ("coactive", "coactive_correlation"),
        ("source", "source_share"),
    ),
    "sequences": (("pos", "acts"),),
    "effects": (
        ("loss_diff", "kl"),
        ("up_tokens_by_logits", "up_by_logits"),
        ("down_tokens_by_logits", "down_by_logits"),
        ("up_tokens_by_probs", "up_by_probs"),
        ("down_tokens_by_probs", "down_by_probs"),
    ),
}


def _of_content(table: str, content: pa.Table) -> Iterator[str]:
    for field in FILES[table]:
        if content[field.name].null_count and not field.nullable:
            yield f"{field.name}: is null in {content[field.name].null_count:,} rows"
        flat = content[field.name].combine_chunks()
        values = flat.flatten() if pa.types.is_list(field.type) else flat.drop_null()
        if pa.types.is_floating(values.type) and not np.isfinite(values.to_numpy(zero_copy_only=False)).all():
            yield f"{field.name}: is not finite"
    for one, other in _TOGETHER.get(table, ()):
        lengths = [pc.list_value_length(content[name]).to_numpy() for name in (one, other)]
        differ = np.flatnonzero(lengths[0] != lengths[1])
        if len(differ):
            yield f"{one}: row {differ[0]} has {lengths[0][differ[0]]} entries, {other} has {lengths[1][differ[0]]}"
    if table == "sequences" and len(content):
        n_tokens = pc.list_value_length(content["tokens"]).to_numpy()
        outside = np.flatnonzero(content["idx"].to_numpy() >= n_tokens)
        if len(outside):
            yield f"idx: is {content['idx'][outside[0]]} in row {outside[0]}, which has {n_tokens[outside[0]]} tokens"


def _model(model: type[BaseModel], name: str, data: bytes | None) -> tuple[BaseModel | None, list[str]]:
    if data is None:
        return None, [f"{name}: is missing"]
    try:
        return model.model_validate_json(data), []
    except ValidationError as error:
        return None, [_told(name, fault) for fault in error.errors(include_url=False)[:3]]


def _told(name: str, fault: Any) -> str:
    field = ".".join(map(str, fault["loc"]))
    return f"{name}: {field + ': ' if field else ''}{fault['msg']}"
