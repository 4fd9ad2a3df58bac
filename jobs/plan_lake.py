"""`sae plan` for the steps that fill the lake: sizes from the config and the lake, and what was really spent."""

from collections.abc import Mapping
from typing import Any, Final

from sae.jobs import compact, runs
from sae.jobs.cluster import COMPILE_FROM_TOKENS
from sae.jobs.contexts import SHARD_TOKENS
from sae.jobs.lake import Lake, Snapshot
from sae.jobs.lake_costs import Hosts, Sizes, Step, Table, steps
from sae.jobs.spent import Spent, spent
from sae.schemas.config import Run

_UNKNOWN: Final = 1_000_000
_OF_CORPUS: Final = frozenset({"tokenize", "harvest"})


def report_of(config: Run, subject: Mapping[str, int], hosts: Hosts, tokens: int | None) -> dict[str, Any]:
    """What each step writes and takes as plain JSON, in bytes and seconds, and what it really did where it is done.

    subject: d_model, bytes of weights and operations of a token; tokens: of a corpus that the lake does not hold.
    """
    lake = Lake(config.lake, create=True)
    snapshot = lake.snapshot()
    found: list[dict[str, Any]] = []
    for one in config.each():
        sizes = sizes_of(one, snapshot, subject, tokens)
        really = spent(lake, snapshot, one)
        found += [
            _described(step, one.autoencoder.name, really.get(step.name))
            for step in steps(sizes, hosts)
            if not (found and step.name in _OF_CORPUS)
        ]
    return {
        "corpus_known": _corpus(snapshot, config) is not None,
        "tokens": sizes.tokens,
        "cores": hosts.cores,
        "gpus": hosts.gpus,
        "subject_counted": subject["subject_flops"] > 0,
        "steps": found,
    }


def _corpus(snapshot: Snapshot, config: Run) -> dict[str, Any] | None:
    """What the lake knows of the run's corpus, if it is tokenized."""
    corpus: dict[str, Any] | None = snapshot.properties.get(f"corpus/{config.corpus.name}")
    return corpus if corpus is not None and corpus["complete"] else None


def sizes_of(config: Run, snapshot: Snapshot, subject: Mapping[str, int], tokens: int | None) -> Sizes:
    """Of a run's autoencoder; exact once the corpus is tokenized, but for the ends of documents at masked positions."""
    corpus, width, shape = _corpus(snapshot, config), config.corpus.context_length, config.autoencoder
    run_tokens = config.encode.run_tokens
    n_runs, documents = None, 0
    if corpus is not None:
        tokens, contexts, documents = corpus["n_tokens"], corpus["n_contexts"], corpus["n_documents"]
        plan, _ = runs.outstanding(snapshot, "encode", shape.name, config.corpus.name, run_tokens)
        n_runs = sum(bool(plan.left(run)) for run in range(plan.n_runs))
    else:
        tokens = tokens or _UNKNOWN
        contexts = -(-tokens // width)
    masked = {position for position in config.subject.masked_positions if position < width}
    # The last context of a document is as likely to end before any position as before another.
    hidden = sum(contexts - documents * position // width for position in masked)
    exported = config.export.atoms or (0, shape.n_latents - 1)
    ablated = config.effects.atoms or (0, shape.n_latents - 1)
    explained = config.explain.atoms or (0, shape.n_latents - 1)
    of_atom, of_explained = (
        len(set(given.kinds)) * min(given.ranks, config.encode.examples) for given in (config.effects, config.explain)
    )
    return Sizes(
        tokens=tokens,
        contexts=contexts,
        width=width,
        kept=tokens - hidden,
        shards=-(-tokens // SHARD_TOKENS),
        runs=n_runs or -(-contexts // max(1, run_tokens // width)),
        run_tokens=run_tokens,
        cached=config.training.source == "cached",
        by_token=config.compact.by_token,
        n_latents=shape.n_latents,
        k=shape.k,
        examples=config.encode.examples,
        exported=exported[1] + 1 - exported[0],
        ablated=(ablated[1] + 1 - ablated[0]) * of_atom,
        **config.effects.model_dump(include={"votes", "logits", "neighbours", "unit_examples"}),
        explained=explained[1] + 1 - explained[0],
        probed=(explained[1] + 1 - explained[0]) * of_explained,
        scored=config.explain.contexts,
        unit_atoms=config.explain.unit_atoms,
        file_rows=config.compact.file_rows,
        merged_at_once=compact.sets_at_once(config),
        task=config.compact.memory_mb * 10**6,
        compiled=contexts * width >= COMPILE_FROM_TOKENS,
        **subject,
    )


def _described(step: Step, autoencoder: str, really: Spent | None) -> dict[str, Any]:
    return {
        "step": step.name,
        "autoencoder": None if step.name in _OF_CORPUS else autoencoder,
        "tables": _tables(step.tables),
        "memory": step.memory,
        "gpu_memory": step.gpu_memory,
        "core_seconds": step.core_seconds,
        "gpu_seconds": step.gpu_seconds,
        "seconds": step.seconds,
        "really": None if really is None else {"tables": _tables(really.tables), "seconds": really.seconds},
    }


def _tables(tables: Mapping[str, Table]) -> dict[str, dict[str, int]]:
    return {name: table._asdict() for name, table in tables.items()}
