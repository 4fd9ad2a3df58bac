"""Step train: Ray actors train the autoencoder from batches of activations and commit checkpoints to the lake."""

import time
from typing import Any

from sae.jobs import checkpoints, claims, cluster, contexts, progress, ranks
from sae.jobs.lake import Lake, write_views
from sae.jobs.trainee import held_out_figures, known_state, n_steps
from sae.jobs.trainer import Trainer
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, IncompleteError, WorkerError


def run(config: Run) -> None:
    """Trains to training.tokens, from the last checkpoint if there is one."""
    lake = Lake(config.lake)
    contexts.state_of(lake.snapshot(), config.corpus.name, config.subject.model)
    several = config.each()
    if len(several) > 1 and config.cluster.tp > 1:
        raise ConfigError(
            f"cluster.tp: got {config.cluster.tp}, but several autoencoders are trained whole, each on one worker; set "
            "cluster.tp: 1, and cluster.dp to the number of workers"
        )
    if _imported(lake, several):
        return
    total = n_steps(config) * config.training.batch_tokens
    for one in several:
        _complete(lake, one, total)
    names = ", ".join(one.autoencoder.name for one in several)
    done = _tokens(lake, several)
    if done >= total:
        progress.say(f"train: {names} is trained on {done:,} tokens")
        return
    with cluster.connected(config), progress.bar("train", total, "tokens", done) as bar:
        _trained(config, bar, lake)
    write_views(lake)
    if _tokens(lake, several) < total:
        raise IncompleteError(f"train: {names} stopped before {total:,} tokens; run sae train again to go on")
    for one in several:
        figures = held_out_figures(lake, one.autoencoder.name)
        progress.say(f"train: {one.autoencoder.name}, {total:,} tokens; held out: {figures or 'nothing'}")


def _imported(lake: Lake, several: list[Run]) -> bool:
    """Whether all were imported, so that there is nothing to train; raises ConfigError where only some were."""
    snapshot = lake.snapshot()
    names = [one.autoencoder.name for one in several]
    sources = {name: source for name in names if (source := checkpoints.imported(snapshot, name)) is not None}
    if sources and len(sources) < len(names):
        raise ConfigError(
            f"autoencoders: {', '.join(sources)} of {lake.path} was imported and is not trained; leave it out here and "
            "give the steps behind train a file of its own"
        )
    for name, source in sources.items():
        progress.say(f"train: {name} was imported from {source}, nothing is trained")
    return bool(sources)


def _complete(lake: Lake, config: Run, total: int) -> None:
    """Says so of an autoencoder whose training was interrupted, where training.tokens was lowered since."""
    name, state = config.autoencoder.name, known_state(lake.snapshot(), config)
    if state is not None and state["tokens"] >= total and not state["complete"]:
        with lake.transaction("train") as transaction:
            transaction.set(f"autoencoder/{name}", {**state, "complete": True})


def _tokens(lake: Lake, several: list[Run]) -> int:
    """On how many tokens all of them are trained."""
    properties = lake.snapshot().properties
    return min(int(properties.get(f"autoencoder/{one.autoencoder.name}", {"tokens": 0})["tokens"]) for one in several)


def _trained(config: Run, bar: progress.Bar, lake: Lake) -> None:
    """Trains, anew from the last checkpoint as often as training.max_failures allows without a further one."""
    ranks.check_gpus(config)
    lost_at: float | None = None
    replacing = ranks.on_gpus(config)
    failures, reached, allowed = 0, _tokens(lake, config.each()), config.training.max_failures
    names, claim = [one.autoencoder.name for one in config.each()], 0
    while True:
        # Larger than that of a start before, too, whose ranks may be slow, and not yet have taken theirs.
        claim = 1 + max(claim, claims.latest(lake.snapshot(), names))
        try:
            with ranks.placed(config, Trainer, claim, again=lost_at is not None) as actors:
                _follow(actors, bar, lost_at)
            return
        except ranks.Lost as lost:
            lost_at, reason = lost.at, str(lost)
            config = replacing
        saved = _tokens(lake, config.each())
        failures, reached = (failures + 1 if saved == reached else 1), saved
        if failures > allowed:
            raise WorkerError(
                f"train: a worker was lost ({reason}), more than training.max_failures, {allowed}, times; look after "
                "the nodes, then run sae train again to go on from the last checkpoint"
            )
        progress.say(
            f"train: a worker was lost ({reason}); going on from the last checkpoint, {failures} of {allowed} times "
            "(training.max_failures)"
        )


def _follow(actors: list[Any], bar: progress.Bar, lost_at: float | None) -> None:
    """Shows the reports of the actors; an interrupt lets them save a checkpoint first."""
    reports = ranks.Reports(actors)
    try:
        for tokens, note in reports:
            if lost_at is not None:
                progress.say(f"train: the next step was done {time.monotonic() - lost_at:.1f} s after the loss")
                lost_at = None
            bar.advance(tokens - bar.done, note)
    except KeyboardInterrupt:
        progress.say("train: interrupted, saving a checkpoint")
        reports.stop()
        raise


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("train")
