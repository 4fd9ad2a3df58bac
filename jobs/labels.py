"""Labels of documents: columns of the corpus that tokenizing left behind, read from its files again.

Documents are numbered in the order in which the files are read, so that a file that is still the same tells the label
of each; nothing of it is kept in the lake.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sae.evaluation.probing import LEAST_DOCUMENTS, classes
from sae.jobs.corpus import CorpusReader
from sae.jobs.lake import Lake, Snapshot
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, CorpusError
from sae.schemas.tables import CORPUS_SHIFT

Labels = dict[int, str]
"""By doc_id, ascending."""


def read(lake: Lake, snapshot: Snapshot, config: Run) -> dict[str, Labels]:
    """Of each column of evaluate.labels, up to evaluate.probe_documents labelled documents that are drawn at random.

    Raises:
        ConfigError: the files are not those that were tokenized.
        CorpusError: no document has the column, a label is a list or the like, or no class has enough documents.
    """
    columns = config.evaluate.labels
    if not columns:
        return {}
    reader = CorpusReader(config.corpus)
    state = snapshot.properties[f"corpus/{config.corpus.name}"]
    _check_unchanged(state, reader, config)
    external_ids = _external_ids(lake, snapshot, config.corpus.name)
    found: dict[str, Labels] = {column: {} for column in columns}
    for doc_id, (document, values) in enumerate(reader.labelled(columns), state["number"] << CORPUS_SHIFT):
        if external_ids.get(doc_id, document.external_id) != document.external_id:
            raise _changed(config, f"document {doc_id} is {external_ids[doc_id]}", document.external_id)
        if doc_id in external_ids:
            for column, value in values.items():
                if value is not None:
                    found[column][doc_id] = _label(value, column, reader, document.file_index, document.row)
    return {column: _sample(labels, column, config) for column, labels in found.items()}


def _check_unchanged(state: dict[str, Any], reader: CorpusReader, config: Run) -> None:
    given = {"corpus.paths": reader.identity, "corpus.on_bad_row": config.corpus.on_bad_row}
    for key, now in given.items():
        if state["made_with"][key] != now:
            raise _changed(config, f"{key} was {state['made_with'][key]}", now)


def _changed(config: Run, was: str, now: str) -> ConfigError:
    return ConfigError(
        f"evaluate.labels: labels are read from the files of corpus {config.corpus.name} again, and these have changed "
        f"since it was tokenized ({was}, now it is {now}); restore them, or leave out evaluate.labels"
    )


def _external_ids(lake: Lake, snapshot: Snapshot, corpus: str) -> dict[int, str]:
    """Of the documents that are in the lake, by doc_id."""
    rows = lake.read(snapshot.select("documents", corpus=corpus), ["doc_id", "external_id", "n_tokens"])
    rows = rows.filter(pc.greater(rows["n_tokens"], 0))
    return dict(zip(rows["doc_id"].to_pylist(), rows["external_id"].to_pylist(), strict=True))


def _label(value: object, column: str, reader: CorpusReader, file_index: int, row: int) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise CorpusError(
        f"{reader.files[file_index].path}:{row + 1}: column {column!r} of evaluate.labels is of type "
        f"{type(value).__name__}; expected a string, a number or a boolean"
    )


def _sample(labels: Labels, column: str, config: Run) -> Labels:
    name, most = config.corpus.name, config.evaluate.probe_documents
    if not labels:
        raise CorpusError(
            f"evaluate.labels: no document of corpus {name} has a value in a column {column!r}; give columns of its "
            ".jsonl or .parquet files"
        )
    ids = np.array(sorted(labels))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(ids)[:most]).tolist()
    sample = {doc_id: labels[doc_id] for doc_id in chosen}
    if not classes(list(sample.values())):
        raise CorpusError(
            f"evaluate.labels: too few labelled documents: of {len(sample)} with a value in column {column!r} of "
            f"corpus {name}, no value is that of at least {LEAST_DOCUMENTS} while as many have another; raise "
            f"evaluate.probe_documents, or give another column ({_most_frequent(sample.values())})"
        )
    return sample


def _most_frequent(values: Iterable[str]) -> str:
    """For people: the values that most have."""
    value, n = np.unique(np.array(list(values)), return_counts=True)
    first = np.argsort(-n, kind="stable")[:3].tolist()
    return ", ".join(f"{n[at]} have {str(value[at])[:40]!r}" for at in first)
