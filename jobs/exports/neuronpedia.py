"""Format neuronpedia: the files of a source as Neuronpedia's importer takes them, each line a row of its database."""

import gzip
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports.dashboards import PER_BATCH, Dashboards, Told, identifier, layer, model_id
from sae.jobs.exports.folder import File, Format, Writer, cut
from sae.jobs.lake import Range
from sae.schemas import neuronpedia as rows
from sae.schemas.origin import Origin, Strict
from sae.schemas.viewer import Manifest

CREATOR: Final = "clkht01d40000jv08hvalcvly"  # the user that Neuronpedia's own tools import as
_NUL: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
_SIGN: Final = "\N{SYMBOL FOR NULL}".encode()
_BATCH: Final = "batch-{}.jsonl.gz"


def source_id(origin: Origin) -> str:
    """Of an autoencoder: its layer and name."""
    return f"{layer(origin.hook)}-{identifier(origin.autoencoder)}"


def _writer(tables: AtomTables, manifest: Manifest) -> Writer:
    dashboards = Dashboards(tables, manifest.bin_width)
    of_source: dict[str, Any] = {"modelId": model_id(manifest), "layer": source_id(manifest), "creatorId": CREATOR}

    def files(atoms: Range) -> Iterator[File]:
        for part in cut(atoms, PER_BATCH):
            told = list(dashboards.told(part))
            yield f"features/{_name(part)}", _zipped(_feature(each, manifest, of_source) for each in told)
            activations = [row for each in told for row in _activations(each, manifest, of_source)]
            if activations:  # the importer fails on a file without lines
                yield f"activations/{_name(part)}", _zipped(activations)

    return files


def _feature(told: Told, manifest: Manifest, of_source: dict[str, Any]) -> rows.Feature:
    return rows.Feature(
        index=str(told.page["atom"]),
        sourceSetName=identifier(manifest.autoencoder),
        maxActApprox=told.page["max_act"],
        hasVector=bool(told.statistics["vector"]),
        hookName=manifest.hook,
        **of_source,
        **told.statistics,
    )


def _activations(told: Told, manifest: Manifest, of_source: dict[str, Any]) -> Iterator[rows.Activation]:
    for number, activation in enumerate(told.activations):
        place = f"{manifest.source} {told.page['atom']} {number}"
        values = activation.values
        yield rows.Activation(
            id="c" + hashlib.sha256(place.encode()).hexdigest()[:24],
            index=str(told.page["atom"]),
            tokens=activation.tokens,
            values=values,
            maxValue=max(values),
            maxValueTokenIndex=values.index(max(values)),
            minValue=min(values),
            binMin=activation.bin_min,
            binMax=activation.bin_max,
            binContains=activation.bin_contains,
            qualifyingTokenIndex=activation.qualifying_token_index,
            **of_source,
        )


def _zipped(found: Iterable[Strict]) -> bytes:
    # Without a name or time inside, so that the same atoms give the same bytes.
    return gzip.compress(_lines(found), compresslevel=6, mtime=0)


def _lines(found: Iterable[Strict]) -> bytes:
    """JSON lines without NUL, which its database cannot hold: a sign stands for it."""
    lines = b"".join(row.model_dump_json().encode() + b"\n" for row in found)
    if b"u0000" not in lines:
        return lines
    # The importer blanks \u0000 wherever these letters stand, also behind a backslash that is a token's own.
    return _NUL.sub(rb"\1" + _SIGN, lines).replace(rb"\\u0000", rb"\u005cu0000")


def _rest(tables: AtomTables, manifest: Manifest) -> Iterator[File]:
    corpora = Dashboards(tables, manifest.bin_width).corpora(manifest)
    model, set_ = model_id(manifest), identifier(manifest.autoencoder)
    described = f"{manifest.n_latents} latents, k {manifest.k}, of {manifest.model} at {manifest.hook}"
    whose: dict[str, Any] = {"creatorName": "", "creatorId": CREATOR, "urls": []}
    width = tables.snapshot.properties[f"autoencoder/{manifest.autoencoder}"]["d_model"]
    found: dict[str, Strict] = {
        "release.jsonl": rows.Release(name=set_, description=described, **whose),
        "model.jsonl": rows.Model(
            id=model,
            displayName=model,
            displayNameShort=model,
            creatorId=CREATOR,
            layers=layer(manifest.hook) + 1,
            neuronsPerLayer=width,
            owner="",
        ),
        "sourceset.jsonl": rows.SourceSet(
            modelId=model, name=set_, description=described, type="", releaseName=set_, **whose
        ),
        "source.jsonl": rows.Source(
            id=source_id(manifest),
            modelId=model,
            setName=set_,
            creatorId=CREATOR,
            dataset=corpora.names,
            num_prompts=corpora.n_contexts,
            num_tokens_in_prompt=corpora.width,
            notes=described,
        ),
    }
    return ((name, _lines([row])) for name, row in found.items())


def _name(atoms: Range) -> str:
    return _BATCH.format(atoms[0] // PER_BATCH)


def _features(atoms: Range) -> Iterator[str]:
    return (f"features/{_name(part)}" for part in cut(atoms, PER_BATCH))


def _activation_files(atoms: Range) -> Iterator[str]:
    return (f"activations/{_name(part)}" for part in cut(atoms, PER_BATCH))


FORMAT: Final = Format(
    name="neuronpedia",
    title="features and activations",
    manifest=Manifest,
    at_once=PER_BATCH,
    writer=_writer,
    names=_features,
    maybe=_activation_files,
    owned=re.compile(r"(features|activations)/batch-[0-9]+\.jsonl\.gz"),
    path="{model_id}/{source_id}",
    rest=_rest,
)
