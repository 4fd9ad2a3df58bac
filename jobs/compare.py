"""`sae evaluate run.yaml --compare A B`: autoencoders that are evaluated, side by side."""

from collections.abc import Sequence

from sae.jobs import contexts, evaluations, figures, progress
from sae.jobs.lake import Lake
from sae.schemas.config import Run
from sae.schemas.errors import IncompleteError


def compare(config: Run, names: Sequence[str]) -> None:
    """Prints their figures on the config's corpus, and writes the report that has their charts.

    Raises IncompleteError where one of them is not in the lake, or not evaluated.
    """
    lake, corpus = Lake(config.lake), config.corpus.name
    snapshot, names = lake.snapshot(), list(dict.fromkeys(names))
    contexts.state_of(snapshot, corpus)
    evaluated = {str(file.autoencoder) for file in snapshot.select("metrics", corpus=corpus)}
    for name in names:
        if f"autoencoder/{name}" not in snapshot.properties:
            known = sorted(key.partition("/")[2] for key in snapshot.properties if key.startswith("autoencoder/"))
            raise IncompleteError(
                f"--compare: autoencoder {name} is not in this lake (it has: {', '.join(known) or 'none'})"
            )
        if name not in evaluated:
            raise IncompleteError(
                f"--compare: autoencoder {name} is not evaluated on corpus {corpus} (evaluated are: "
                f"{', '.join(sorted(evaluated)) or 'none'}); run sae evaluate with the config that it was trained with"
            )
    path = evaluations.comparison_path(lake, config)
    figures.show(evaluations.write_report(path, lake, snapshot, corpus, names), on_stderr=False)
    progress.say(f"evaluate: the report is {path}")
