"""Step evaluate: the quality of a trained autoencoder on held-out text, beside PCA and an untrained autoencoder.

Figures go into the tables `metrics` and `distributions`, onto the terminal and into a report.
"""

from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from sae.jobs import checkpoints, cluster, contexts, evaluations, figures, labels, progress, storage
from sae.jobs.lake import Lake, Snapshot, write_views
from sae.jobs.measure import Measured, measure
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError
from sae.schemas.tables import DISTRIBUTIONS, METRICS

_EXPLAINED = "n2g_"


def run(config: Run) -> None:
    """Evaluates the autoencoder as it is now, once; what became of its explanations since is added."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    name, corpus = config.autoencoder.name, config.corpus.name
    path, known = evaluations.report_path(lake, config), snapshot.properties.get(_key(config))
    wanted = _settings(snapshot, config)
    files, explained = evaluations.explained(lake, snapshot, name)
    if known == {**wanted, "explanations": files} and storage.exists(path):
        progress.say(f"evaluate: {name} is evaluated on {corpus}")
        return
    if known is None or {**known, "explanations": files} != {**wanted, "explanations": files}:
        measured = _measured(config, labels.read(lake, snapshot, config))
        _commit(lake, snapshot, config, {**measured.metrics, **explained}, measured, {**wanted, "explanations": files})
    elif known["explanations"] != files:
        metrics = evaluations.metrics_of(lake, snapshot, corpus)[name]
        kept = {metric: value for metric, value in metrics.items() if not metric.startswith(_EXPLAINED)}
        _commit(lake, snapshot, config, {**kept, **explained}, None, {**wanted, "explanations": files})
    write_views(lake)
    figures.show(evaluations.write_report(path, lake, lake.snapshot(), corpus, [name]), on_stderr=True)
    progress.say(f"evaluate: the report is {path}")


def _key(config: Run) -> str:
    return f"evaluate/{config.autoencoder.name}/{config.corpus.name}"


def _settings(snapshot: Snapshot, config: Run) -> dict[str, Any]:
    """All that the figures follow from, but for the explanations.

    Raises IncompleteError where an earlier step has not finished, and ConfigError where the config is not the one that
    the autoencoder was trained with.
    """
    name = config.autoencoder.name
    state = checkpoints.state_of(snapshot, name)
    contexts.state_of(snapshot, config.corpus.name, config.subject.model)
    checkpoints.check_made_with(state, config, _decides_figures)
    if config.training.validation == 0:
        raise ConfigError(
            "training.validation: got 0; evaluate needs held-out text, give the fraction used in training"
        )
    asked = config.evaluate.model_dump(mode="json", exclude={"batch_contexts", "report"})
    if not asked["labels"]:  # of nothing
        del asked["probe_latents"], asked["probe_documents"]
    weights = checkpoints.identity(snapshot, name, config.encode.weights, config.encode.checkpoint)
    return {"checkpoint": weights, **asked}


def _decides_figures(key: str) -> bool:
    """Whether a key of the config decides what was held out and what the figures speak of."""
    fixed = ("seed", "corpus.name", "training.validation", "training.dead_tokens", "autoencoder.k")
    return checkpoints.is_of_subject(key) or key in fixed


def _measured(config: Run, of_documents: dict[str, labels.Labels]) -> Measured:
    """In a worker, which may have a GPU."""
    with cluster.connected(config):
        task = ray.remote(measure).options(**cluster.worker_options(config, 1))
        try:
            measured: Measured = ray.get(task.remote(config, of_documents))
        except RayError as error:
            raise cluster.cause(error) from None
    return measured


def _commit(
    lake: Lake,
    snapshot: Snapshot,
    config: Run,
    metrics: dict[str, float],
    measured: Measured | None,
    settings: dict[str, Any],
) -> None:
    """Puts figures in the place of those before; where nothing was measured anew, the distributions stay."""
    name, corpus = config.autoencoder.name, config.corpus.name
    evaluated = checkpoints.chosen(checkpoints.state_of(snapshot, name), name, config.encode.checkpoint)
    at = ("evaluate", evaluated["step"], evaluated["tokens"])
    with lake.transaction("evaluate") as transaction:
        transaction.remove(snapshot.select("metrics", corpus=corpus, autoencoder=name))
        rows = [(*at, metric, value) for metric, value in sorted(metrics.items())]
        transaction.write("metrics", _table(rows, METRICS), autoencoder=name, corpus=corpus)
        if measured is not None:
            transaction.remove(snapshot.select("distributions", corpus=corpus, autoencoder=name))
            bins = _table(sorted(measured.bins), DISTRIBUTIONS)
            transaction.write("distributions", bins, autoencoder=name, corpus=corpus)
        transaction.set(_key(config), settings)


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(column, of.type) for column, of in zip(columns, schema, strict=True)], schema=schema)


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("evaluate")
