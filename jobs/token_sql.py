"""Examples with their tokens in SQL from mapped arrays: of fifty contexts, Parquet has to unpack as many row groups."""

import atexit
import weakref
from collections.abc import Mapping
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from duckdb.func import PythonUDFType

from sae.jobs import views
from sae.jobs.lake import Lake, Snapshot
from sae.jobs.token_cache import Tokens, find_tokens
from sae.schemas.tables import CORPUS_SHIFT

Array = npt.NDArray[Any]
Corpora = Mapping[int, tuple[str, Tokens]]

_CONTEXT: Final = "STRUCT(corpus VARCHAR, doc_id BIGINT, token_ids INTEGER[])"
EXAMPLES: Final = "example_contexts_mapped"
_FIELDS: Final = ("corpus", "doc_id", "token_ids")
_open: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()


def mapped_corpora(lake: Lake, snapshot: Snapshot) -> Corpora:
    """The arrays of the corpora that were encoded, if all of them have some; makes none."""
    corpora: dict[int, tuple[str, Tokens]] = {}
    for corpus in sorted({str(file.corpus) for file in snapshot.select("moments")}):
        tokens = find_tokens(lake, snapshot, corpus)
        if tokens is None:
            return {}
        corpora[tokens.first_context >> CORPUS_SHIFT] = corpus, tokens
    return corpora


def use_arrays(connection: duckdb.DuckDBPyConnection, corpora: Corpora) -> None:
    """Has a database read the contexts of examples from arrays."""

    def context_of(context_id: pa.ChunkedArray) -> pa.Array:
        return contexts_of(corpora, context_id.to_numpy())

    connection.create_function("context_of", context_of, ["BIGINT"], _CONTEXT, type=PythonUDFType.ARROW)
    connection.execute(views.query(EXAMPLES))
    _open.add(connection)


def contexts_of(corpora: Corpora, context_id: Array) -> pa.Array:
    """Corpus, document and token ids of each context [m], null where there is no such context.

    `corpora` are known by their numbers.
    """
    number = context_id >> CORPUS_SHIFT
    order = np.argsort(number, kind="stable")
    numbers, first = np.unique(number[order], return_index=True)
    ids = np.split(context_id[order], first[1:])
    parts = [_of_corpus(*corpora[each], mine) for each, mine in zip(numbers.tolist(), ids, strict=True)]
    return parts[0] if len(parts) == 1 else pa.concat_arrays(parts).take(pa.array(np.argsort(order)))


def _of_corpus(name: str, tokens: Tokens, context_id: Array) -> pa.Array:
    token_ids, offsets, doc_id = tokens.of_each(context_id)
    lists = pa.ListArray.from_arrays(offsets.astype(np.int32), token_ids.astype(np.int32))
    columns = [pa.array([name] * len(doc_id)), pa.array(doc_id), lists]
    return pa.StructArray.from_arrays(columns, _FIELDS, mask=pa.array(np.diff(offsets) == 0))


@atexit.register
def _close() -> None:
    """DuckDB's bindings list what a connection with a function leaves behind at the end of Python."""
    for connection in list(_open):
        connection.close()
