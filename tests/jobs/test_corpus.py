"""Documents come out as they went in; whatever is wrong with a file is said with its place."""

import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sae.jobs import corpus
from sae.jobs.corpus import CorpusReader, Document
from sae.schemas.config import Corpus
from sae.schemas.errors import CorpusError
from tests.object_stores import STORES, serve

Row = dict[str, Any]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
}
KINDS = [".parquet", *(f".jsonl{suffix}" for suffix in COMPRESS)]

# Every text that is a document: UTF-8 can hold it, and it is more than white space.
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=20)


def jsonl(rows: Sequence[Row], ascii_only: bool = False) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n" for row in rows)


def parquet(rows: Sequence[Row], row_group_size: int = 7, compression: str = "snappy") -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table, sink, row_group_size=row_group_size, compression=compression)
    return bytes(sink.getvalue())


def encode(kind: str, rows: Sequence[Row]) -> bytes:
    return parquet(rows) if kind == ".parquet" else COMPRESS[kind.removeprefix(".jsonl")](jsonl(rows))


def reader(*paths: object, **options: Any) -> CorpusReader:
    return CorpusReader(Corpus(name="test", paths=[str(path) for path in paths], **options))


def read(*paths: object, **options: Any) -> list[Document]:
    return list(reader(*paths, **options).documents())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write_file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write_file


Write = Callable[[str, bytes], Path]


# What goes in comes out


@pytest.mark.parametrize("kind", KINDS)
@given(texts=TEXTS)
def test_texts_round_trip(tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("corpus") / f"file{kind}"
    rows = [{"body": text, "key": f"k{n}", "from": "here"} for n, text in enumerate(texts)]
    path.write_bytes(encode(kind, rows))
    assert read(path, text="body", id="key", source="from") == [
        Document(text, f"k{n}", "here", 0, n) for n, text in enumerate(texts)
    ]


@given(texts=TEXTS)
def test_txt_round_trips(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for n, text in enumerate(texts):
        (folder / f"{n:03}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(folder / "*.txt") == [Document(text, f"{n:03}.txt", "test", n, 0) for n, text in enumerate(texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_place_can_be_resumed(write: Write, kind: str) -> None:
    for name, n in (("a", 23), ("b", 5), ("c", 1)):
        write(name + kind, encode(kind, [{"text": f"{name}{i}"} for i in range(n)]))
    everything = reader(write("a.txt", b"first").parent / "a.txt", write("x", b"").parent / f"*{kind}")
    documents = list(everything.documents())
    assert len(documents) == 30
    for at, document in enumerate(documents):
        assert list(everything.documents((document.file_index, document.row))) == documents[at:]
    assert list(everything.documents((1, 23))) == documents[24:]
    assert list(everything.documents((4, 0))) == []


def test_escapes_bom_line_ends_and_trailing_blank_lines(write: Write) -> None:
    data = b'\xef\xbb\xbf{"text": "\\u00e9\\ud83d\\ude00\\n"}\r\n{"text": "b\xc2\x85c"}\n\n \r\n'
    assert [document.text for document in read(write("a.jsonl", data))] == ["é😀\n", "b\x85c"]


def test_streams_joined_end_to_end_are_read_whole(write: Write) -> None:
    halves = jsonl([{"text": "a"}]), jsonl([{"text": "b"}])
    for suffix in (".gz", ".zst", ".xz"):
        path = write(f"a.jsonl{suffix}", b"".join(map(COMPRESS[suffix], halves)))
        assert [document.text for document in read(path)] == ["a", "b"]


def test_ids_and_sources(write: Write) -> None:
    path = write("a.jsonl", jsonl([{"text": "a", "id": 2**60}, {"text": "b", "id": "x"}]))
    assert [document.external_id for document in read(path, id="id")] == [str(2**60), "x"]
    assert [(document.external_id, document.source) for document in read(path)] == [
        ("0", "a.jsonl"),
        ("1", "a.jsonl"),
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_arrow_string_is_a_string(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.string()).cast(kind)}), path)
    assert [document.text for document in read(path)] == ["a", "b"]


@pytest.mark.parametrize("kind", [".jsonl.zst", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    for name, n_rows in (("small", 2_000), ("large", 10_000)):  # 20 MB and 100 MB of text
        rows = [{"text": f"{n:05}" * 2000} for n in range(n_rows)]
        # One row group, which no encoding or compression shrinks.
        data = parquet(rows, n_rows, "none") if kind == ".parquet" else COMPRESS[".zst"](jsonl(rows))
        (tmp_path / name).with_suffix(kind).write_bytes(data)
    script = (
        "import re, sys\n"
        "from sae.jobs.corpus import CorpusReader\n"
        "from sae.schemas.config import Corpus\n"
        # getrusage would give the peak of the parent process if that is higher
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "count = lambda path: sum(1 for _ in CorpusReader(Corpus(name='t', paths=[path])).documents())\n"
        "count(sys.argv[1]); before = peak(); print(count(sys.argv[2]), peak() - before)\n"
    )
    paths = [str(tmp_path / name) + kind for name in ("small", "large")]
    run = subprocess.run([sys.executable, "-c", script, *paths], check=True, capture_output=True, text=True)
    count, grown = run.stdout.split()
    assert int(count) == 10_000
    assert float(grown) < 60, "MiB; the texts are 80 MB more"


# Which files


def test_files_are_in_the_order_given_and_read_once(write: Write) -> None:
    paths = [write(f"{name}.txt", b"text") for name in ("b", "a", "c")]
    folder = paths[0].parent
    files = reader(folder / "c.txt", folder / "*.txt", f"{folder}/./a.txt").files
    assert [file.path for file in files] == [f"{folder}/{name}.txt" for name in ("c", "a", "b")]
    assert [file.size for file in files] == [4, 4, 4]


def test_the_fingerprint_follows_what_is_read(write: Write) -> None:
    path = write("a.jsonl", jsonl([{"text": "a", "id": "1"}]))
    first = reader(path).fingerprint
    assert reader(path, on_bad_row="skip", context_length=8).fingerprint == first
    assert reader(path, id="id").fingerprint != first
    write("a.jsonl", jsonl([{"text": "ab", "id": "1"}]))
    assert reader(path).fingerprint != first


def test_files_that_are_not_there_or_not_read(write: Write) -> None:
    folder = write("a.json", b"{}").parent
    with pytest.raises(CorpusError, match=r"no file matches .*/\*\.txt; check the path"):
        reader(folder / "*.txt")
    with pytest.raises(CorpusError, match="it is a folder: add"):
        reader(folder)
    with pytest.raises(CorpusError, match=r"a\.json: not a kind of file .*\.jsonl\.zst"):
        reader(folder / "*")


# Bad rows

GOOD = b'{"text": "good", "id": "1"}\n'
BAD_LINES = {
    b'{"text": "a"': "invalid JSON",
    b"[" * 100_000: "invalid JSON",
    b'{"text": "a", "id": ' + b"1" * 5000 + b"}": "invalid JSON",
    b'["text"]': "not a JSON object",
    b"": "blank line",
    b'{"id": "1"}': "no column 'text'",
    b'{"text": "a"}': "no column 'id'",
    b'{"text": null, "id": "1"}': "column 'text' is null",
    b'{"text": 3, "id": "1"}': "column 'text' is of type int",
    b'{"text": "a", "id": 1.5}': "column 'id' is of type float",
    b'{"text": "a", "id": true}': "column 'id' is of type bool",
    b'{"text": "a\xff", "id": "1"}': "invalid UTF-8",
    b'{"text": " \\n\\t", "id": "1"}': "empty text",
    b'{"text": "", "id": "1"}': "empty text",
    b'{"text": "a\\ud800", "id": "1"}': "half of a surrogate pair in column 'text'",
    b'{"text": "a", "id": "\\udfff"}': "half of a surrogate pair in column 'id'",
}


@pytest.mark.parametrize(("line", "cause"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_or_is_counted(write: Write, line: bytes, cause: str) -> None:
    path = write("a.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(CorpusError) as stopped:
        read(path, id="id")
    message = str(stopped.value)
    assert message.startswith(f"{path}:2: {cause}; expected ")
    assert "set corpus.on_bad_row: skip" in message
    assert "\n" not in message

    skipping = reader(path, id="id", on_bad_row="skip")
    assert [document.row for document in skipping.documents()] == [0, 2]
    assert skipping.bad_rows.counts == {cause: 1}
    assert str(skipping.bad_rows) == f"bad rows skipped: 1 {cause} ({path}:2)"


def test_bad_rows_are_summed_up_by_cause(write: Write) -> None:
    path = write("a.jsonl", b"{}\n" * 10 + b"?\n" + GOOD)
    skipping = reader(path, on_bad_row="skip")
    assert str(skipping.bad_rows) == "no bad rows"
    assert len(list(skipping.documents())) == 1
    assert skipping.bad_rows.total == 11
    places = ", ".join(f"{path}:{n}" for n in (1, 2, 3))
    assert str(skipping.bad_rows) == (f"bad rows skipped: 10 no column 'text' ({places}); 1 invalid JSON ({path}:11)")


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfea\x00"])
def test_a_bad_txt(write: Write, data: bytes) -> None:
    path = write("a.txt", data)
    with pytest.raises(CorpusError, match=r"a\.txt:1: (empty text|invalid UTF-8); expected"):
        read(path)
    assert read(path, on_bad_row="skip") == []


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array([b"a", b"\xff", None, b" ", b"e"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(CorpusError, match=r"a\.parquet:2: invalid UTF-8; expected"):
        read(path)
    skipping = reader(path, on_bad_row="skip")
    assert [(document.row, document.text) for document in skipping.documents()] == [(0, "a"), (4, "e")]
    assert skipping.bad_rows.counts == {"invalid UTF-8": 1, "column 'text' is null": 1, "empty text": 1}


@pytest.mark.parametrize("column", [{"other": ["a", "b"]}, {"text": [1, 2]}, {"text": [b"a", b"b"]}])
def test_parquet_without_a_column_of_text(tmp_path: Path, column: Row) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(column), path)
    with pytest.raises(CorpusError, match=r"a\.parquet:1: (no )?column 'text'"):
        read(path)
    skipping = reader(path, on_bad_row="skip")
    assert list(skipping.documents()) == []
    assert skipping.bad_rows.total == 2


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet"])
@given(data=st.data())
def test_a_file_cut_off_anywhere_always_stops(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    whole = encode(kind, [{"text": f"text {n}"} for n in range(100)])
    path = tmp_path_factory.mktemp("cut") / f"a{kind}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(CorpusError, match=r"a\..*: damaged or cut off, .*; copy or make it again"):
            read(path, on_bad_row=on_bad_row)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet"])
def test_a_file_of_another_kind_stops(write: Write, kind: str) -> None:
    with pytest.raises(CorpusError, match="damaged or cut off"):
        read(write(f"a{kind}", GOOD * 100), on_bad_row="skip")


def test_a_line_without_end_stops(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    path = write("a.jsonl", GOOD + b"[" + b"1," * (1 << 20))
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: line longer than 1 MiB"):
        read(path, on_bad_row="skip")


# Object stores


@pytest.fixture(scope="module", params=STORES)
def put(request: pytest.FixtureRequest) -> Iterator[Callable[[str, bytes], str]]:
    with serve(request.param) as put_remote:
        yield put_remote


def test_a_corpus_in_an_object_store(put: Callable[[str, bytes], str]) -> None:
    rows = [{"text": f"text {n}"} for n in range(20)]
    base = put("corpus/0.txt", b"text").removesuffix("0.txt")
    for kind in KINDS:
        put(f"corpus/more/1{kind}", encode(kind, rows))
    documents = read(f"{base}*.txt", f"{base}**/1.*")
    assert len(documents) == 1 + 20 * len(KINDS)
    assert [document.text for document in documents[1:]] == [row["text"] for row in rows] * len(KINDS)


def test_a_parquet_cut_off_in_an_object_store(put: Callable[[str, bytes], str]) -> None:
    path = put("cut/a.parquet", parquet([{"text": "a"}])[:-9])
    with pytest.raises(CorpusError, match=r"cut/a\.parquet: damaged or cut off"):
        read(path)
