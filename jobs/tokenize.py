"""Step tokenize: reads the corpus, cuts each document into contexts, writes `documents`, `contexts`, `vocabulary`."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from sae.jobs import progress
from sae.jobs.contexts import SHARD_TOKENS
from sae.jobs.corpus import CorpusReader, Document
from sae.jobs.lake import Lake, Transaction, write_views
from sae.schemas.config import Run
from sae.schemas.errors import ConfigError, ConflictError, CorpusError, SubjectError
from sae.schemas.tables import CONTEXTS, CORPUS_SHIFT, DOCUMENTS, MAX_CORPORA, VOCABULARY
from sae.subject import load_tokenizer, model_context_limit, token_strings

_BATCH_DOCUMENTS: Final = 64


class Tokenizer(Protocol):
    bos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...


@dataclass
class Shard:
    """Rows of documents and contexts that are committed together; ids go on from the numbers given."""

    first_document: int
    first_context: int
    documents: list[tuple[int, str, str, int]] = field(default_factory=list)
    contexts: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    n_tokens: int = 0

    def add(self, document: Document, tokens: list[int], window: int, bos: list[int]) -> None:
        """Cuts one document's tokens into windows, the last one shorter; `bos` stands before each window."""
        doc_id = self.first_document + len(self.documents)
        self.documents.append((doc_id, document.source, document.external_id, len(tokens)))
        for start in range(0, len(tokens), window):
            ids = bos + tokens[start : start + window]
            self.contexts.append((self.first_context + len(self.contexts), doc_id, start, ids))
            self.n_tokens += len(ids)

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        yield "documents", _table(self.documents, DOCUMENTS)
        yield "contexts", _table(self.contexts, CONTEXTS)


def run(config: Run) -> None:
    """Tokenizes what of the corpus is not yet in the lake."""
    lake = Lake(config.lake, create=True)
    reader = CorpusReader(config.corpus)
    state = _state(lake, config, reader)
    if state["complete"]:
        progress.say(f"tokenize: corpus {config.corpus.name} is in the lake ({_summary(state)})")
        return
    tokenizer = load_tokenizer(config.subject.model)
    _check_length(config)
    total, earlier = sum(file.size for file in reader.files), state["bad_rows"]
    began = time.time()
    with progress.bar("tokenize", total, "bytes", _bytes_before(reader, state["next"][0])) as bar:
        for shard, following in _shards(config, reader, tokenizer, state):
            state = _after(state, shard, following, reader, earlier)
            unit = f"tokenize/{config.corpus.name}/{state['n_shards']}"
            with lake.transaction("tokenize", unit, began) as transaction:
                _write(transaction, config.corpus.name, shard, state, tokenizer)
            began = time.time()
            bar.advance(_bytes_before(reader, following[0]) - bar.done)
    write_views(lake)
    progress.say(f"tokenize: {_summary(state)}; {reader.bad_rows}")


def _state(lake: Lake, config: Run, reader: CorpusReader) -> dict[str, Any]:
    """The corpus' property in the lake, checked against the config, or a new one."""
    snapshot = lake.snapshot()
    made_with = {
        "subject.model": config.subject.model,
        "corpus.context_length": config.corpus.context_length,
        "corpus.prepend_bos": config.corpus.prepend_bos,
        "corpus.on_bad_row": config.corpus.on_bad_row,
        "corpus.paths": reader.identity,
    }
    known: dict[str, Any] | None = snapshot.properties.get(f"corpus/{config.corpus.name}")
    if known is None:
        return _new_state(snapshot.properties.get("corpora", 0), config, made_with)
    differing = [key for key, value in made_with.items() if known["made_with"][key] != value]
    if not differing:
        return known
    if known["complete"]:
        key = differing[0]
        raise ConfigError(
            f"{key}: corpus {config.corpus.name} of {config.lake} was tokenized with "
            f"{known['made_with'][key]}, now it is {made_with[key]}; give the corpus another corpus.name"
        )
    if differing == ["corpus.on_bad_row"]:
        return {**known, "made_with": made_with}
    progress.say(
        f"tokenize: {differing[0]} has changed since corpus {config.corpus.name} was begun; starting it afresh"
    )
    return _new_state(known["number"], config, made_with)


def _new_state(number: int, config: Run, made_with: dict[str, Any]) -> dict[str, Any]:
    if number >= MAX_CORPORA:
        raise ConfigError(f"lake: {config.lake} already holds {number} corpora, the most there can be")
    counts = dict.fromkeys(("n_documents", "n_contexts", "n_tokens", "n_shards"), 0)
    fixed = {"number": number, "context_length": config.corpus.context_length, "made_with": made_with}
    return {**fixed, **counts, "next": [0, 0], "complete": False, "bad_rows": {}}


def _check_length(config: Run) -> None:
    limit = model_context_limit(config.subject.model)
    if config.corpus.context_length > limit:
        raise SubjectError(
            f"corpus.context_length: got {config.corpus.context_length}, but {config.subject.model} takes at most "
            f"{limit} tokens; lower it"
        )


def _shards(
    config: Run, reader: CorpusReader, tokenizer: Tokenizer, state: dict[str, Any]
) -> Iterator[tuple[Shard, list[int]]]:
    """Shards of whole documents, each with the place (file, row) that reading goes on from."""
    bos = _bos(config, tokenizer)
    window = config.corpus.context_length - len(bos)
    base = state["number"] << CORPUS_SHIFT
    shard = Shard(base + state["n_documents"], base + state["n_contexts"])
    following = state["next"]
    documents = reader.documents((following[0], following[1]))
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        encoded = tokenizer([document.text for document in batch], add_special_tokens=False)["input_ids"]
        for document, tokens in zip(batch, encoded, strict=True):
            shard.add(document, tokens, window, bos)
        following = [batch[-1].file_index, batch[-1].row + 1]
        if shard.n_tokens >= SHARD_TOKENS:
            yield shard, following
            next_document = shard.first_document + len(shard.documents)
            shard = Shard(next_document, shard.first_context + len(shard.contexts))
    if not shard.contexts and shard.first_context == base:
        raise CorpusError(f"corpus.paths: {len(reader.files)} files hold no document with text; {reader.bad_rows}")
    yield shard, [len(reader.files), 0]


def _bos(config: Run, tokenizer: Tokenizer) -> list[int]:
    if not config.corpus.prepend_bos:
        return []
    if tokenizer.bos_token_id is None:
        raise SubjectError(
            f"corpus.prepend_bos: the tokenizer of {config.subject.model} has no beginning-of-text token; "
            "set it to false"
        )
    return [tokenizer.bos_token_id]


def _after(
    state: dict[str, Any], shard: Shard, following: list[int], reader: CorpusReader, earlier: dict[str, int]
) -> dict[str, Any]:
    """The corpus' property once the shard is committed; `earlier` are the bad rows of commands before this one."""
    return {
        **state,
        "n_documents": state["n_documents"] + len(shard.documents),
        "n_contexts": state["n_contexts"] + len(shard.contexts),
        "n_tokens": state["n_tokens"] + shard.n_tokens,
        "n_shards": state["n_shards"] + 1,
        "next": following,
        "complete": following == [len(reader.files), 0],
        "bad_rows": dict(reader.bad_rows.counts + Counter(earlier)),
    }


def _write(transaction: Transaction, name: str, shard: Shard, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    for table, rows in shard.tables():
        if rows.num_rows:
            transaction.write(table, rows, corpus=name, run=state["n_shards"], tokens=shard.n_tokens)
    if state["n_shards"] == 1:
        _begin_corpus(transaction, name, state["number"])
        strings = token_strings(tokenizer)
        vocabulary = {"token_id": np.arange(len(strings), dtype=np.int32), "token": strings}
        transaction.write("vocabulary", pa.table(vocabulary, schema=VOCABULARY), corpus=name)
    transaction.set(f"corpus/{name}", state)


def _begin_corpus(transaction: Transaction, name: str, number: int) -> None:
    """Takes the corpus' number, or takes out what an unfinished corpus of the same name had."""
    base = transaction.base
    if f"corpus/{name}" not in base.properties:
        if base.properties.get("corpora", 0) != number:
            raise ConflictError(f"corpus {name}: another corpus was added meanwhile; run sae tokenize again")
        transaction.set("corpora", number + 1)
    for table in ("documents", "contexts", "vocabulary"):
        transaction.remove(base.select(table, corpus=name))
    transaction.forget(unit for unit in base.units if unit.startswith(f"tokenize/{name}/"))


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _bytes_before(reader: CorpusReader, file_index: int) -> int:
    return sum(file.size for file in reader.files[:file_index])


def _summary(state: dict[str, Any]) -> str:
    skipped = sum(state["bad_rows"].values())
    return f"{state['n_documents']:,} documents, {state['n_contexts']:,} contexts, {state['n_tokens']:,} tokens" + (
        f", {skipped:,} bad rows skipped" if skipped else ""
    )


if __name__ == "__main__":
    from sae.jobs.cli import program

    program("tokenize")
