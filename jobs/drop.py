"""Takes parts out of the newest version of a lake: what is left is what a lake would be that never held them.

Rows of latents are removed by writing the files that hold some anew, in one pass and bounded memory. The views could
hide them until the next compaction instead, but a text that must not be kept would then still be there, every query
would pay for it, and a run could not be encoded again before.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae.jobs import contexts, encode, formats, merge, progress, ranges, runs, token_cache
from sae.jobs.lake import DataFile, Lake, Range, Snapshot, Transaction
from sae.schemas.errors import LakeError
from sae.schemas.tables import CORPUS_SHIFT, LATENTS
from sae.statistics import SortedRun

# Of an autoencoder's files, those that are not made from its latents.
_OF_TRAINING: Final = frozenset({"checkpoints", "training_states", "metrics", "distributions"})
# Kinds of properties and units, KIND/NAME..., that go with them.
_OF_LATENTS: Final = ("encode", "aggregate", "decoders", "effects", "logits", "neighbours", "explain", "dropped")
# Tables and properties that are made from all latents of an autoencoder together.
_MERGED: Final = ("atoms", "examples", "effects", "neighbours", "explanations")
# Steps whose units are made from examples, STEP/NAME/FIRST:LAST.
_OF_EXAMPLES: Final = ("effects", "explain")
_OF_AUTOENCODER: Final = (*_OF_LATENTS, "evaluate", "training", "autoencoder")
_EVERY_ID: Final = (0, 2**63 - 1)


def autoencoder(lake: Lake, name: str, *, whole: bool) -> list[DataFile]:
    """Takes out an autoencoder, or only its latents and what was made of them; returns the files."""
    with lake.transaction("drop") as transaction:
        snapshot = transaction.base
        files = [
            file
            for file in snapshot.files.values()
            if file.autoencoder == name and (whole or file.table not in _OF_TRAINING)
        ]
        transaction.remove(files)
        kinds = _OF_AUTOENCODER if whole else _OF_LATENTS
        prefixes = tuple(f"{kind}/{name}/" for kind in kinds)
        transaction.forget(sorted(unit for unit in snapshot.units if unit.startswith(prefixes)))
        exact = {f"{kind}/{name}" for kind in kinds}
        _unset(transaction, lambda key: key in exact or key.startswith(prefixes))
        _require_nothing_new(transaction, f"latents of {name}", lambda file: file.autoencoder == name)
    return files


def by_token(lake: Lake, name: str) -> list[DataFile]:
    """Takes out the copies of an autoencoder's latents in the order of tokens; returns the files.

    Raises LakeError where there are none.
    """
    with lake.transaction("drop") as transaction:
        files = transaction.base.select("latents_by_token", autoencoder=name)
        if not files:
            raise LakeError(
                f"--by-token: {name} has no copy by token; sae compact makes one where compact.by_token is true"
            )
        transaction.remove(files)
    return files


def latents(lake: Lake, corpus: str, names: Collection[str], number: int | None = None) -> int:
    """Takes out the rows of a corpus, or of one of its runs, by some autoencoders; returns how many.

    Encode can make them again, and until then they are not missing. Raises LakeError where there are none.
    """
    with lake.transaction("drop") as transaction:
        found = [_Encoded(transaction, name, corpus) for name in names]
        chosen = {each: each.runs if number is None else each.runs & {number} for each in found}
        if not any(chosen.values()):
            what = corpus if number is None else f"run {corpus}/{number}"
            raise LakeError(f"{what}: no latents of it by {' or '.join(names) or 'any autoencoder'} in this lake")
        for each, numbers in chosen.items():
            if numbers:
                each.take(ranges.united(each.plan.bounds(run) for run in numbers))
                for run in sorted(numbers):
                    transaction.set(runs.drop_mark(each.name, corpus, run), True)
        _require_nothing_new(
            transaction, f"latents of {corpus}", lambda file: file.corpus == corpus and file.autoencoder in names
        )
    return _rows_taken(transaction)


def text(lake: Lake, corpus: str, gone: Range) -> tuple[int, int]:
    """Takes out a range of a corpus' contexts for good, and all that was made from them; returns contexts and rows.

    Documents of which no context is left go with them. No step brings them back.
    """
    with lake.transaction("drop") as transaction:
        base = transaction.base
        state, new = base.properties[f"corpus/{corpus}"], [gone]
        for name in encoders(base, corpus):
            _Encoded(transaction, name, corpus).take(new)
        n_documents, n_contexts, n_tokens = _take_text(transaction, corpus, new)
        _take_activations(transaction, corpus, new)
        counts = {"n_documents": n_documents, "n_contexts": n_contexts, "n_tokens": n_tokens}
        dropped = ranges.united([*runs.dropped_contexts(base, corpus), gone])
        left = {key: state[key] - taken for key, taken in counts.items()}
        transaction.set(f"corpus/{corpus}", {**state, **left, "dropped": [list(each) for each in dropped]})
        _require_nothing_new(
            transaction, f"corpus {corpus}", lambda file: file.corpus == corpus and _meets(file.contexts, new)
        )
    token_cache.remove_stale(lake, temporary=True)
    return n_contexts, _rows_taken(transaction)


def whole_corpus(lake: Lake, corpus: str) -> int:
    """Takes out a corpus and all that was made from it; returns the rows of latents.

    To the lake it is then one that it never held, and tokenize takes it in again.
    """
    with lake.transaction("drop") as transaction:
        base = transaction.base
        first = base.properties[f"corpus/{corpus}"]["number"] << CORPUS_SHIFT
        every = [(first, first + (1 << CORPUS_SHIFT) - 1)]
        for name in encoders(base, corpus):
            _Encoded(transaction, name, corpus).take(every)
        transaction.remove(file for file in _left(transaction) if file.corpus == corpus)
        transaction.forget(sorted(unit for unit in base.units if _is_of(unit, corpus)))
        _unset(transaction, lambda key: key == f"corpus/{corpus}" or _is_of(key, corpus))
        _require_nothing_new(transaction, f"corpus {corpus}", lambda file: file.corpus == corpus)
    token_cache.remove_stale(lake, temporary=True)
    return _rows_taken(transaction)


def encoders(snapshot: Snapshot, corpus: str) -> list[str]:
    """The autoencoders that have latents of a corpus."""
    return sorted({file.autoencoder for file in snapshot.select("moments", corpus=corpus) if file.autoencoder})


def _is_of(key: str, corpus: str) -> bool:
    """Whether KIND/OWNER/CORPUS... or tokenize/CORPUS... speaks of a corpus."""
    kind, *rest = key.split("/")
    return rest[:1] == [corpus] if kind == "tokenize" else rest[1:2] == [corpus]


def _unset(transaction: Transaction, chosen: Callable[[str], bool]) -> None:
    for key in sorted(filter(chosen, transaction.base.properties)):
        transaction.set(key, None)


def _left(transaction: Transaction) -> list[DataFile]:
    """What of the version before is not yet taken out."""
    removed = transaction.removed
    return [file for path, file in transaction.base.files.items() if path not in removed]


def _rows_taken(transaction: Transaction) -> int:
    """Rows of latents."""
    gone = (transaction.base.files[path] for path in transaction.removed)
    before, after = (sum(file.rows for file in files if file.table == "latents") for files in (gone, transaction.added))
    return before - after


def _require_nothing_new(transaction: Transaction, what: str, concerned: Callable[[DataFile], bool]) -> None:
    """What comes while this goes would stay."""
    known = transaction.base.files
    transaction.require(
        lambda now: not any(path not in known and concerned(file) for path, file in now.files.items()),
        f"{what}: added to",
    )


def _meets(held: Range | None, gone: Sequence[Range]) -> bool:
    """Whether a file can hold any of the contexts, of which nothing is known where its range is None."""
    return held is None or bool(ranges.within(gone, held))


class _Encoded:
    """What is made from a corpus' latents by one autoencoder."""

    def __init__(self, transaction: Transaction, name: str, corpus: str) -> None:
        self.name, self.corpus, self._transaction = name, corpus, transaction
        self._base = transaction.base
        self._encoding: dict[str, Any] = self._base.properties[f"encode/{name}"]
        self.plan, _ = runs.outstanding(self._base, "encode", name, corpus, self._encoding["run_tokens"])
        units = ((run, runs.unit("encode", name, corpus, run)) for run in range(self.plan.n_runs))
        self.runs = {run for run, unit in units if unit in self._base.units}

    def take(self, gone: list[Range]) -> None:
        """Takes out what was made from some contexts, in ranges that are united; runs that are cut get new partials."""
        touched = {run for run in self.runs if _meets(self.plan.bounds(run), gone)}
        left = {run: ranges.without(self.plan.bounds(run), [*self.plan.dropped, *gone]) for run in touched}
        cut = {run: bounds for run, bounds in left.items() if bounds}
        own = [
            file
            for file in self._base.select("latents", autoencoder=self.name, corpus=self.corpus)
            if file.run in touched
        ]
        alone = {file.run for file in own}
        rest = _Rest(self._transaction.lake, ranges.without(_EVERY_ID, gone), cut)
        for file in own:
            if file.run in cut:
                rest.note(file)
        self._rewrite_merged(gone, touched - alone, rest)
        self._remove_made_from(touched, set(cut))
        for run, bounds in cut.items():
            tables = encode.run_tables(rest.run(run), self._encoding)
            if run not in alone:
                del tables["latents"]
            tokens = self._tokens(bounds)
            encode.write_tables(self._transaction, self.name, self.corpus, self.plan, run, tables, tokens)

    def _rewrite_merged(self, gone: list[Range], merged: set[int], rest: "_Rest") -> None:
        """Writes the files anew that hold rows of several runs, the given ones among them."""
        bounds = [self.plan.bounds(run) for run in merged]
        going = [part for each in bounds for part in ranges.within(gone, each)]
        files = [
            file
            for file in self._base.select("latents", autoencoder=self.name)
            if file.run is None and file.rows and _meets(file.contexts, bounds)
        ]
        self._transaction.lake.check_room(sum(file.bytes for file in files))
        with progress.bar(f"drop from {self.name}", len(files), "files") as bar:
            for file in files:
                if _meets(file.contexts, going):
                    self._transaction.remove([file])
                    tables = rest.rows(file)
                    if (first := next(tables, None)) is not None:
                        self._transaction.write("latents", itertools.chain([first], tables), autoencoder=self.name)
                else:
                    rest.note(file)
                bar.advance(1)

    def _remove_made_from(self, touched: set[int], cut: set[int]) -> None:
        """Files of the runs, and what was merged from all; of runs that are cut, encode has nothing to do again."""
        transaction, name = self._transaction, self.name
        transaction.remove(
            file
            for file in _left(transaction)
            if file.autoencoder == name
            and ((file.corpus == self.corpus and file.run in touched) or file.table in _MERGED)
        )
        owned = {f"{name}/{self.corpus}/{run}" for run in touched}
        done = {runs.unit("encode", name, self.corpus, run) for run in cut}
        units = {unit for unit in self._base.units if unit.partition("/")[2] in owned}
        of_examples = tuple(f"{step}/{name}/" for step in _OF_EXAMPLES)
        units |= {unit for unit in self._base.units if unit.startswith(of_examples)}
        transaction.forget(sorted(units - done))
        kinds = ("aggregate", *_OF_EXAMPLES, "neighbours")
        _unset(transaction, lambda key: key in {f"{kind}/{name}" for kind in kinds})

    def _tokens(self, left: list[Range]) -> int:
        """Tokens of contexts that are at kept positions."""
        masked = tuple(self._base.properties[f"autoencoder/{self.name}"]["masked_positions"])
        found = contexts.load(self._transaction.lake, self.corpus, (left[0][0], left[-1][1]))
        return int(found.kept_tokens(masked)[ranges.contains(left, found.context_id)].sum())


class _Rest:
    """Rows of some contexts, read from files of latents; those of some runs, given by their contexts, are kept."""

    def __init__(self, lake: Lake, contexts_: list[Range], runs_: dict[int, list[Range]]) -> None:
        self._lake, self._contexts, self._runs = lake, contexts_, runs_
        self._found: dict[int, list[pa.Table]] = {run: [] for run in runs_}

    def rows(self, file: DataFile) -> Iterator[pa.Table]:
        """The rows of a file in order, row group by row group."""
        if file.atoms is None:
            return
        for table in merge.merged([self._lake.verified([file])], file.atoms, self._contexts):
            ids = table["context_id"].to_numpy()
            for run, bounds in self._runs.items():
                self._found[run].append(table.filter(pa.array(ranges.contains(bounds, ids))))
            yield table

    def note(self, file: DataFile) -> None:
        """Reads a file for its rows of the runs only."""
        for _ in self.rows(file):
            pass

    def run(self, number: int) -> SortedRun:
        """What of a run was in the files that were read."""
        together = pa.concat_tables([LATENTS.empty_table(), *self._found[number]])
        return SortedRun.from_rows(*(together[name].to_numpy() for name in LATENTS.names))


def _take_text(transaction: Transaction, corpus: str, gone: list[Range]) -> tuple[int, int, int]:
    """Writes `contexts` and `documents` anew; returns documents, contexts and tokens that are gone."""
    lake, base = transaction.lake, transaction.base
    doc_ids, n_tokens = [np.empty(0, np.int64)], 0
    for file in base.select("contexts", corpus=corpus):
        if _meets(file.contexts, gone):
            rows = lake.read([file])
            inside = ranges.contains(gone, rows["context_id"].to_numpy())
            lengths = pc.list_value_length(rows["token_ids"]).to_numpy()
            doc_ids.append(rows["doc_id"].to_numpy()[inside])
            n_tokens += int(lengths[inside].sum())
            _write_left(transaction, file, rows, ~inside, int(lengths[~inside].sum()))
    concerned = np.unique(np.concatenate(doc_ids))
    alive = lake.read(
        base.select("contexts", corpus=corpus), ["context_id", "doc_id"], pc.field("doc_id").isin(concerned)
    )
    alive = alive["doc_id"].to_numpy()[~ranges.contains(gone, alive["context_id"].to_numpy())]
    n_documents = 0
    for file in base.select("documents", corpus=corpus):
        rows = lake.read([file])
        inside = np.isin(rows["doc_id"].to_numpy(), np.setdiff1d(concerned, alive))
        if inside.any():
            n_documents += int(inside.sum())
            left = int(rows["n_tokens"].to_numpy()[~inside].sum())
            _write_left(transaction, file, rows, ~inside, left)
    return n_documents, sum(map(len, doc_ids)), n_tokens


def _write_left(transaction: Transaction, file: DataFile, rows: pa.Table, kept: Any, tokens: int) -> None:
    transaction.remove([file])
    if kept.any():
        left = rows.filter(pa.array(kept))
        transaction.write(file.table, left, corpus=file.corpus, run=file.run, tokens=tokens)


def _take_activations(transaction: Transaction, corpus: str, gone: list[Range]) -> None:
    for file in transaction.base.select("activations", corpus=corpus):
        if _meets(file.contexts, gone):
            transaction.remove([file])
            with transaction.lake.local(file) as path:
                ids, vectors = formats.map_vectors(path)
                kept = ~ranges.contains(gone, ids)
                if kept.any():
                    _write_vectors(transaction, file, ids[kept], formats.map_positions(path)[kept], vectors[kept])


def _write_vectors(transaction: Transaction, file: DataFile, ids: Any, pos: Any, vectors: Any) -> None:
    transaction.write_with(
        "activations",
        "arrow",
        lambda path: formats.write_vectors(ids, pos, vectors, path),
        contexts=(int(ids[0]), int(ids[-1])),
        corpus=file.corpus,
        subject=file.subject,
        run=file.run,
        rows=len(ids),
        tokens=len(ids),
    )
