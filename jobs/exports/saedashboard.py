"""Format saedashboard: batch-N.json, as SAEDashboard writes and reads them."""

import re
from collections.abc import Iterator
from typing import Any, Final

from sae.jobs.atom_tables import AtomTables
from sae.jobs.exports.dashboards import PER_BATCH, Dashboards, layer, model_id
from sae.jobs.exports.folder import File, Format, Writer, cut
from sae.jobs.lake import Range
from sae.schemas.saedashboard import Batch, Feature
from sae.schemas.viewer import Manifest


def _writer(tables: AtomTables, manifest: Manifest) -> Writer:
    dashboards = Dashboards(tables, manifest.bin_width)
    corpora = dashboards.corpora(manifest)

    def feature(atom: int, **more: Any) -> Feature:
        return Feature(
            feature_index=atom,
            n_prompts_total=corpora.n_contexts,
            n_tokens_in_prompt=corpora.width,
            dataset=corpora.names,
            **more,
        )

    def files(atoms: Range) -> Iterator[File]:
        for part in cut(atoms, PER_BATCH):
            batch = Batch(
                model_id=model_id(manifest),
                layer=layer(manifest.hook),
                sae_set=manifest.autoencoder,
                sae_id_suffix=None,
                features=[
                    feature(told.page["atom"], activations=told.activations, **told.statistics)
                    for told in dashboards.told(part)
                ],
            )
            yield _name(part), batch.model_dump_json().encode()

    return files


def _name(atoms: Range) -> str:
    return f"batch-{atoms[0] // PER_BATCH}.json"


def _names(atoms: Range) -> Iterator[str]:
    return (_name(part) for part in cut(atoms, PER_BATCH))


FORMAT: Final = Format(
    name="saedashboard",
    title="batches of atoms",
    manifest=Manifest,
    at_once=PER_BATCH,
    writer=_writer,
    names=_names,
    owned=re.compile(r"batch-[0-9]+\.json"),
    path="{subject}_{autoencoder}_{hook}_{n_latents}",
)
