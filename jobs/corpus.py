"""Read documents from .txt, .jsonl and .parquet files as a stream, in a fixed order, from any place in it."""

import bisect
import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sae.jobs import storage
from sae.jobs.storage import FileInfo
from sae.schemas.config import Corpus
from sae.schemas.errors import CorpusError

ALLOWED = ".txt, .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.xz, .parquet"
MAX_LINE_BYTES = 256 << 20
_EXAMPLES = 3
_BATCH_ROWS = 256
_BUFFER = 1 << 20

# A value of this type is one row's column; absent columns are told apart from null ones.
_MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its place: `row` counts from 0 in the file `files[file_index]`.

    `external_id` is the id column, else the file's name (.txt) or the row number. `source` is the source
    column, else the corpus' name (.txt) or the file's name.
    """

    text: str
    external_id: str
    source: str
    file_index: int
    row: int


@dataclass(slots=True)
class BadRows:
    """Rows that were skipped: how many for each cause, and where the first ones are."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, cause: str, place: str) -> None:
        self.counts[cause] += 1
        examples = self.examples.setdefault(cause, [])
        if len(examples) < _EXAMPLES:
            examples.append(place)

    def __str__(self) -> str:
        """Describe them in one line."""
        causes = (f"{n} {cause} ({', '.join(self.examples[cause])})" for cause, n in self.counts.most_common())
        return f"bad rows skipped: {'; '.join(causes)}" if self.total else "no bad rows"


class _BadRowError(Exception):
    """A row that is no document: the cause, and what was expected."""

    def __init__(self, cause: str, expected: str) -> None:
        super().__init__(cause)
        self.cause, self.expected = cause, expected


# One row of a file before it is checked: its number and a function that gives its columns.
_Row = tuple[int, Callable[[], dict[str, Any]]]


class CorpusReader:
    """The documents of a corpus, streamed.

    Attributes:
        files: the files in reading order: each pattern's files sorted, a file found twice read once.
        bad_rows: what `documents` skipped so far (`on_bad_row: skip`).

    Raises:
        CorpusError: a pattern that matches nothing, or a file of a kind that is not read.
        StorageError: a store that cannot be listed.
    """

    def __init__(self, config: Corpus) -> None:
        self.files = _expand(config.paths)
        self.bad_rows = BadRows()
        self._config = config
        self._columns = list(dict.fromkeys(filter(None, (config.text, config.id, config.source))))

    @property
    def identity(self) -> str:
        """What tells for people, and to compare, that the documents are the same."""
        return f"{len(self.files)} files, {self.fingerprint[:12]}"

    @property
    def fingerprint(self) -> str:
        """A hash of the files' paths and sizes and of the columns: equal if the documents should be."""
        config = self._config
        seen = [[file.path, file.size] for file in self.files], config.text, config.id, config.source
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def documents(self, start: tuple[int, int] = (0, 0)) -> Iterator[Document]:
        """Yield the documents in order, from (file_index, row) on, in bounded memory.

        Memory holds one line of .jsonl, a batch of rows of .parquet or one .txt file.

        Raises:
            CorpusError: a damaged or cut off file; with `on_bad_row: stop` a bad row too.
            StorageError: a file that cannot be read.
        """
        return (document for document, _ in self._read(start, ()))

    def labelled(self, columns: Sequence[str]) -> Iterator[tuple[Document, dict[str, Any]]]:
        """The same from the beginning, each with the values of other columns, of which it may lack some.

        Raises as `documents`.
        """
        return self._read((0, 0), columns)

    def _read(self, start: tuple[int, int], more: Sequence[str]) -> Iterator[tuple[Document, dict[str, Any]]]:
        first_file, first_row = start
        wanted = list(dict.fromkeys([*self._columns, *more]))
        for index, file in enumerate(self.files[first_file:], first_file):
            read = _READERS[_suffix(file.path)]
            with storage.reading(file.path):
                for row, parse in read(file, first_row if index == first_file else 0, wanted):
                    found = self._document(parse, index, row)
                    if found is not None:
                        document, columns = found
                        yield document, {name: columns[name] for name in more if name in columns}

    def _document(
        self, parse: Callable[[], dict[str, Any]], index: int, row: int
    ) -> tuple[Document, dict[str, Any]] | None:
        path = self.files[index].path
        place = f"{path}:{row + 1}"
        is_text = path.lower().endswith(".txt")
        name = path.rsplit("/", 1)[-1]
        config = self._config
        try:
            columns = parse()
            text = _text(columns, config.text)
            external_id = name if is_text else str(row)
            if config.id is not None and not is_text:
                external_id = _label(columns, config.id)
            source = config.name if is_text else name
            if config.source is not None and not is_text:
                source = _label(columns, config.source)
        except _BadRowError as bad:
            if config.on_bad_row == "stop":
                raise CorpusError(
                    f"{place}: {bad.cause}; expected {bad.expected}; "
                    "mend it, or set corpus.on_bad_row: skip to count and skip such rows"
                ) from None
            self.bad_rows.add(bad.cause, place)
            return None
        return Document(text, external_id, source, index, row), columns


# Which files


def _expand(patterns: Iterable[str]) -> list[FileInfo]:
    files: dict[str, FileInfo] = {}
    for pattern in patterns:
        found = storage.find(pattern)
        if not found:
            hint = "it is a folder: add /*.jsonl or the like" if storage.exists(pattern) else "check the path"
            raise CorpusError(f"corpus.paths: no file matches {pattern}; {hint}")
        for file in found:
            _suffix(file.path)
            files.setdefault(os.path.abspath(file.path) if storage.is_local(file.path) else file.path, file)
    return list(files.values())


def _suffix(path: str) -> str:
    for suffix in _READERS:
        if path.lower().endswith(suffix):
            return suffix
    raise CorpusError(f"{path}: not a kind of file that is read; expected {ALLOWED}")


# What a row must be


def _text(columns: dict[str, Any], name: str) -> str:
    text = _column(columns, name)
    if not isinstance(text, str):
        raise _BadRowError(f"column {name!r} is {_kind(text)}", "a string")
    if not text or text.isspace():
        raise _BadRowError("empty text", "at least one character that is not white space")
    _require_unicode(text, name)
    return text


def _label(columns: dict[str, Any], name: str) -> str:
    value = _column(columns, name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _BadRowError(f"column {name!r} is {_kind(value)}", "a string or an integer")
    label = str(value)
    _require_unicode(label, name)
    return label


def _column(columns: dict[str, Any], name: str) -> Any:
    value = columns.get(name, _MISSING)
    if value is _MISSING:
        raise _BadRowError(f"no column {name!r}", "the columns that corpus.text, .id and .source name")
    if isinstance(value, UnicodeDecodeError):
        raise _invalid_utf8(value)
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _require_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"half of a surrogate pair in column {name!r}", "text that UTF-8 can hold") from None


def _invalid_utf8(error: UnicodeDecodeError) -> _BadRowError:
    return _BadRowError("invalid UTF-8", f"UTF-8 (byte {error.start} of the text is not)")


# The three kinds of file. A reader yields the rows from number `first` on.


def _read_txt(file: FileInfo, first: int, columns: Sequence[str]) -> Iterator[_Row]:
    if first == 0:
        data = storage.read_bytes(file.path)
        yield 0, lambda: {columns[0]: _decode(data.removeprefix(codecs.BOM_UTF8))}


def _read_jsonl(file: FileInfo, first: int, columns: Sequence[str]) -> Iterator[_Row]:
    row = 0
    blank: list[int] = []  # blank lines are bad rows unless only blank lines follow
    with _open_lines(file) as lines:
        while True:
            with _intact(f"{file.path}:{row + 1}"):
                line = lines.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise CorpusError(
                    f"{file.path}:{row + 1}: line longer than {MAX_LINE_BYTES >> 20} MiB; "
                    "expected one JSON object a line; write the file so"
                )
            if row == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if row >= first:
                if line.isspace() or not line:
                    blank.append(row)
                else:
                    yield from ((number, _blank_line) for number in blank)
                    blank.clear()
                    yield row, lambda line=line: _parse(line)  # type: ignore[misc]
            row += 1


def _read_parquet(file: FileInfo, first: int, columns: Sequence[str]) -> Iterator[_Row]:
    with storage.open_read(file.path) as raw, _intact(file.path):
        parquet = pq.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
        metadata = parquet.metadata
        ends = list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        group = bisect.bisect_right(ends, first)
        row = ends[group - 1] if group else 0
        present = [name for name in columns if name in parquet.schema_arrow.names]
        if not present:
            yield from ((number, dict) for number in range(first, metadata.num_rows))
            return
        batches = parquet.iter_batches(_BATCH_ROWS, row_groups=list(range(group, len(ends))), columns=present)
        for batch in batches:
            for values in zip(*(_values(batch.column(name)) for name in present), strict=True):
                if row >= first:
                    yield row, lambda values=values: dict(zip(present, values, strict=True))  # type: ignore[misc]
                row += 1


_READERS: dict[str, Callable[[FileInfo, int, Sequence[str]], Iterator[_Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".jsonl.xz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _parse(line: bytes) -> dict[str, Any]:
    text = _decode(line)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRowError("invalid JSON", f"one JSON object a line ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError):
        raise _BadRowError("invalid JSON", "one JSON object a line (too deep, or too long a number)") from None
    if not isinstance(row, dict):
        raise _BadRowError("not a JSON object", 'an object such as {"text": "..."}')
    return row


def _blank_line() -> dict[str, Any]:
    raise _BadRowError("blank line", "one JSON object a line")


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _invalid_utf8(error) from None


def _values(column: pa.Array) -> list[Any]:
    try:
        return cast(list[Any], column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """Arrow does not check UTF-8 when it reads: only the rows that are wrong should suffer for it."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


_DECODERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".jsonl": lambda raw: raw,
    ".jsonl.gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".jsonl.xz": lzma.LZMAFile,
    # Unlike the zstandard package's reader, Arrow's notices a stream that is cut off.
    ".jsonl.zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BUFFER),
}


@contextmanager
def _open_lines(file: FileInfo) -> Iterator[BinaryIO]:
    suffix = _suffix(file.path)
    if file.size == 0 and suffix != ".jsonl":  # gzip and Arrow take it for an empty text
        raise _damaged(file.path, "no bytes")
    with storage.open_read(file.path) as raw, _DECODERS[suffix](raw) as lines:
        yield lines


@contextmanager
def _intact(place: str) -> Iterator[None]:
    """Report contents that cannot be decoded; errors of the system or the store pass."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise _damaged(place, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(place, error) from error


def _damaged(place: str, cause: object) -> CorpusError:
    return CorpusError(
        f"{place}: damaged or cut off, the rest cannot be read ({' '.join(str(cause).split())}); "
        "expected a whole file; copy or make it again"
    )
