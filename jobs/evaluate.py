"""Step evaluate: the quality of a trained autoencoder on held-out text, beside PCA and an untrained autoencoder."""

from typing import Final

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from sae.initialise import initialise
from sae.jobs import checkpoints, cluster, contexts, progress
from sae.jobs.activations import Live
from sae.jobs.lake import Lake, write_views
from sae.jobs.stream import held_out
from sae.metrics import pca_fvu, reconstruction
from sae.model import Autoencoder
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, CorpusError
from sae.schemas.tables import METRICS
from sae.subject import Subject
from sae.transcoder import from_config

_SAMPLE_TOKENS: Final = 16_384


def run(config: Run) -> None:
    """Evaluates the autoencoder as it is now, once."""
    lake = Lake(config.lake)
    snapshot = lake.snapshot()
    name, corpus = config.autoencoder.name, config.corpus.name
    state = checkpoints.state_of(snapshot, name)
    contexts.state_of(snapshot, corpus, config.subject.model)
    checkpoints.check_made_with(state, config, _decides_figures)
    if config.training.validation == 0:
        raise ConfigError(
            "training.validation: got 0; evaluate needs held-out text, give the fraction used in training"
        )
    key = f"evaluate/{name}/{corpus}"
    weights = checkpoints.identity(snapshot, name, config.encode.weights, config.encode.checkpoint)
    settings = {"checkpoint": weights, "tokens": config.evaluate.tokens}
    if snapshot.properties.get(key) == settings:
        progress.say(f"evaluate: {name} is evaluated on {corpus}")
        return
    with cluster.connected(config):
        task = ray.remote(_evaluate).options(**cluster.worker_options(config, 1))
        try:
            metrics: dict[str, float] = ray.get(task.remote(config))
        except RayError as error:
            raise cluster.cause(error) from None
    evaluated = checkpoints.chosen(state, name, config.encode.checkpoint)
    at = ("evaluate", evaluated["step"], evaluated["tokens"])
    rows = [(*at, metric, value) for metric, value in sorted(metrics.items())]
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    with lake.transaction("evaluate") as transaction:
        transaction.remove(snapshot.select("metrics", corpus=corpus, autoencoder=name))
        transaction.write("metrics", pa.table(columns, schema=METRICS), autoencoder=name, corpus=corpus)
        transaction.set(key, settings)
    write_views(lake)
    for metric, value in metrics.items():
        progress.say(f"evaluate: {metric:<22} {value:.4f}")


def _decides_figures(key: str) -> bool:
    """Whether a key of the config decides what was held out and what the figures speak of."""
    fixed = ("seed", "corpus.name", "training.validation", "training.dead_tokens", "autoencoder.k")
    return checkpoints.is_of_subject(key) or key in fixed


def _evaluate(config: Run) -> dict[str, float]:
    device = cluster.use_device(1)
    lake = Lake(config.lake)
    corpus = contexts.load(lake, config.corpus.name)
    # The loss needs the layers behind the hook as well.
    subject = Subject.load(**{**config.subject.model_dump(), "layers": None}, device=device)
    autoencoder = checkpoints.load(lake, config.autoencoder.name, config.encode.weights, config.encode.checkpoint).to(
        device
    )
    checkpoints.check_fit(autoencoder, subject, config.autoencoder.name)
    validation = held_out(corpus.doc_id, config.training.validation, config.seed)
    kept = corpus.kept_tokens(config.subject.masked_positions)
    shuffle = np.random.default_rng(config.seed).permutation
    test = _first(shuffle(np.flatnonzero(validation)), kept, config.evaluate.tokens)
    train = _first(shuffle(np.flatnonzero(~validation)), kept, _SAMPLE_TOKENS)
    if not len(train) or not len(test):
        raise CorpusError(f"corpus {config.corpus.name}: too few documents to hold any out; add text")
    live = Live(subject, corpus, config.evaluate.batch_contexts)
    with torch.inference_mode():
        sample = live.vectors(train).float()
        x = live.vectors(test).float()
        metrics = {name: float(value) for name, value in reconstruction(autoencoder, x).items()}
        metrics |= _baselines(autoencoder, sample, x, config)
        metrics["dead_fraction"] = float((autoencoder.stats_last_nonzero > config.training.dead_tokens).float().mean())
        metrics |= _losses(subject, autoencoder, corpus, test, config.evaluate.batch_contexts)
    return metrics


def _first(rows: contexts.Array, kept: contexts.Array, n_tokens: int) -> contexts.Array:
    """The first rows that give n_tokens kept tokens together, or all."""
    return rows[: int(np.searchsorted(np.cumsum(kept[rows]), n_tokens)) + 1]


def _baselines(autoencoder: Autoencoder, sample: Tensor, x: Tensor, config: Run) -> dict[str, float]:
    """FVU, in the space that the autoencoder encodes, of what any autoencoder has to beat."""
    untrained = from_config(autoencoder.config()).to(x.device)
    initialise(untrained, sample, torch.Generator().manual_seed(config.seed))
    inner_sample, inner = autoencoder.seen(sample)[1], autoencoder.seen(x)[1]
    return {
        "fvu_pca": float(pca_fvu(inner_sample, inner, config.autoencoder.k)),
        "fvu_untrained": float(reconstruction(untrained, x)["fvu"]),
    }


def _losses(
    subject: Subject, autoencoder: Autoencoder, corpus: contexts.Contexts, rows: contexts.Array, batch: int
) -> dict[str, float]:
    """Mean next-token loss of the subject, in nats, with activations at kept positions left, replaced or zeroed."""
    totals = dict.fromkeys(("loss_clean", "loss_reconstructed", "loss_zero_ablated"), 0.0)
    n_predicted = 0
    for start in range(0, len(rows), batch):
        token_ids, lengths = corpus.padded(rows[start : start + batch])
        keep = subject.keep_mask(lengths, token_ids.shape[1]).to(subject.device)[..., None]

        def reconstructed(acts: Tensor, keep: Tensor = keep) -> Tensor:
            latents, info = autoencoder.encode(acts.float())
            return torch.where(keep, autoencoder.decode(latents, info), autoencoder.expected(acts.float()))

        def zeroed(acts: Tensor, keep: Tensor = keep) -> Tensor:
            return autoencoder.expected(acts).masked_fill(keep, 0)

        for name, replace in zip(totals, (None, reconstructed, zeroed), strict=True):
            totals[name] += float(subject.logits_loss(token_ids, replace, lengths).double().sum())
        n_predicted += int((lengths - 1).sum())
    losses = {name: total / n_predicted for name, total in totals.items()}
    gap = losses["loss_zero_ablated"] - losses["loss_clean"]
    return {**losses, "loss_recovered": (losses["loss_zero_ablated"] - losses["loss_reconstructed"]) / gap}


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("evaluate")
