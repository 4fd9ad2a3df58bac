"""Training metrics reach tensorboard, with their step."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae.jobs.lake import Lake
from sae.jobs.loggers import Logger
from sae.schemas import config

_CONFIG = """
lake: {lake}
subject: {{model: any, hook: blocks.0.hook_resid_pre}}
corpus: {{name: texts, paths: [none.txt]}}
autoencoder: {{name: small, n_latents: 8, k: 2}}
training: {{log_to: [tensorboard]}}
"""


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    run = config.parse(_CONFIG.format(lake=tmp_path / "lake"))
    with Logger(run, Lake(run.lake, create=True)) as logger:
        logger.log([("train", 1, 64, "fvu", 0.5), ("train", 2, 128, "fvu", 0.25), ("validation", 2, 128, "l0", 2.0)])
    events = EventAccumulator(str(tmp_path / "lake" / "tensorboard" / "small"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/fvu")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("validation/l0")] == [(2, 2.0)]
