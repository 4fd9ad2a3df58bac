"""The commands on a lake: what they print, what they take out, and how they fail."""

import csv
import io
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sae.jobs import aggregate, cli, lake_commands
from sae.jobs.lake import connect
from sae.schemas.errors import ConfigError, LakeError
from sae.schemas.tables import SCHEMAS
from tests.lakes import CORPUS, N_LATENTS, NAME, Small, encode, small_config, small_lake, train
from tests.tiny_run import sae

LATENT_TABLES = {"latents", "moments", "histograms", "top", "samples", "atoms", "examples", "decoders"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("pristine") / "lake")


@pytest.fixture
def small(pristine: Small, tmp_path: Path) -> Small:
    return pristine.copy(tmp_path / "lake")


@pytest.fixture
def ask(small: Small, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Asks a query, returns what is printed."""

    def asked(query: str, format_: str = "csv", **given: Any) -> str:
        sql(small, query, format_, **given)
        return capsys.readouterr().out

    return asked


def sql(small: Small, query: str, format_: str = "csv", **given: Any) -> None:
    given = {"version": None, "atoms": None, "contexts": None, **given}
    lake_commands.sql(Namespace(lake=small.config.lake, query=query, format=format_, **given))


def status(small: Small) -> None:
    lake_commands.status(Namespace(lake=small.config.lake))


def verify(small: Small) -> None:
    lake_commands.verify(Namespace(lake=small.config.lake))


def drop(small: Small, **what: str) -> None:
    lake_commands.drop(Namespace(lake=small.config.lake, **{"latents": None, "autoencoder": None, **what}))


def collect(small: Small, hours: float = 0.0) -> None:
    lake_commands.gc(Namespace(lake=small.config.lake, older_than=hours))


def tables(small: Small) -> set[str]:
    return {file.table for file in small.lake.snapshot().files.values()}


def test_status_tells_what_there_is_and_that_nothing_is_unfinished(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    status(small)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for table in tables(small):
        files = small.lake.snapshot().select(table)
        numbers = (len(files), sum(file.rows for file in files), sum(file.bytes for file in files))
        assert [table, *(f"{number:,}" for number in numbers)] in lines
    assert [CORPUS, "20", "20", str(sum(map(len, small.contexts))), "yes"] in lines
    assert [NAME, "models/tiny", "blocks.1.hook_resid_pre", str(N_LATENTS), "3", "64", "yes", "1", "-", "-"] in lines
    assert lines[-1] == ["unfinished:", "nothing"]


def test_status_tells_the_last_checkpoint_and_the_best_one(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = [{"tokens": 64 * step, "fvu": fvu} for step, fvu in enumerate((0.5, 0.25, None, 0.3), start=1)]
    with small.lake.transaction("train") as transaction:
        known = transaction.base.properties[f"autoencoder/{NAME}"]
        transaction.set(f"autoencoder/{NAME}", {**known, "checkpoints": checkpoints})
    status(small)
    (line,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(NAME))
    assert line[-6:] == ["4", "0.3000", "0.2500", "at", "128", "tokens"]


def test_status_names_the_unfinished_steps(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    with small.lake.transaction("drop") as transaction:
        transaction.forget([f"encode/{NAME}/{CORPUS}/1"])
        transaction.remove(file for file in small.lake.snapshot().files.values() if file.run == 1)
        corpus = small.lake.snapshot().properties[f"corpus/{CORPUS}"]
        transaction.set(f"corpus/{CORPUS}", {**corpus, "complete": False})
    status(small)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"unfinished: tokenize of corpus {CORPUS}; encode of {CORPUS} with {NAME} (1 of 3 runs are missing); "
        f"aggregate of {NAME}"
    )


def test_verify_finds_a_changed_and_a_missing_file(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    verify(small)
    assert capsys.readouterr().out.startswith("all ")
    changed, missing = (small.lake.snapshot().select(table)[0].path for table in ("latents", "atoms"))
    data = bytearray(Path(small.config.lake, changed).read_bytes())
    data[len(data) // 2] ^= 1
    Path(small.config.lake, changed).write_bytes(data)
    Path(small.config.lake, missing).unlink()
    with pytest.raises(LakeError, match=r"^verify: 2 files of .* are not as they were written$"):
        verify(small)
    lines = sorted(line.removeprefix(small.config.lake + "/") for line in capsys.readouterr().out.splitlines())
    remedy = "restore the file from a copy of the lake"
    found = [f"{changed}: has another sha256 than the log says; {remedy}", f"{missing}: is missing; {remedy}"]
    assert lines == sorted(found)


def test_csv_is_a_header_and_the_rows(ask: Callable[..., str], small: Small) -> None:
    out = list(csv.reader(io.StringIO(ask("select context_id, token_ids from contexts order by 1"))))
    assert out[0] == ["context_id", "token_ids"]
    assert [json.loads(ids) for _, ids in out[1:]] == small.contexts


def test_json_holds_null_for_what_is_no_number(ask: Callable[..., str]) -> None:
    numbers = "'nan'::double as a, ['inf'::float, 1] as b, {'x': '-inf'::double} as c, 1.5 as d"
    query = f"select {numbers}, '\"é\n' as e, null as f"
    record = {"a": None, "b": [None, 1.0], "c": {"x": None}, "d": 1.5, "e": '"é\n', "f": None}
    assert json.loads(ask(query, "json")) == [record]
    assert json.loads(ask(f"{query} where false", "json")) == []


def test_json_goes_on_over_many_batches(ask: Callable[..., str]) -> None:
    assert json.loads(ask("select range as i from range(25000)", "json")) == [{"i": i} for i in range(25000)]


def test_parquet_is_a_file_on_standard_output(small: Small, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    query = "select context_id, sum(act) as total from latents group by context_id order by context_id"
    sql(small, query, "parquet")
    table = pq.read_table(io.BytesIO(capfdbinary.readouterr().out))
    assert table.to_pylist() == connect(small.config.lake).sql(query).to_arrow_table().to_pylist()


def test_the_table_is_for_reading(ask: Callable[..., str]) -> None:
    out = ask(f"select atom, 'it''s' as word from atoms where autoencoder = '{NAME}' order by atom", "table")
    assert "word" in out
    assert out.count("it's") == N_LATENTS


def test_a_query_comes_from_standard_input(ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("select 40 + 2 as answer"))
    assert ask("-") == "answer\n42\n"


def test_a_query_sees_the_version_that_is_asked_for(ask: Callable[..., str]) -> None:
    # Versions 0 and 1 are tokenize and train, 2 is the first run.
    assert ask("select count(distinct run) as runs from moments", version=1) == "runs\n0\n"
    assert ask("select count(distinct run) as runs from moments", version=3) == "runs\n2\n"


@pytest.mark.parametrize("format_", ["table", "csv", "json", "parquet"])
@pytest.mark.parametrize(
    ("query", "error", "problem"),
    [
        ("select * from latent", LakeError, "sql: .*latent does not exist"),
        ("select wrong from latents", LakeError, 'sql: .*"wrong" not found'),
        ("selec 1", LakeError, "sql: .*syntax error"),
        ("select error('boom')", LakeError, "sql: .*boom"),
        (" ", ConfigError, "sql: the text asks for nothing"),
    ],
)
def test_a_faulty_query_is_told_in_one_line(
    ask: Callable[..., str], query: str, error: type[Exception], problem: str, format_: str
) -> None:
    with pytest.raises(error, match=problem) as caught:
        ask(query, format_)
    assert "\n" not in str(caught.value)


def test_the_command_line_ends_with_1_on_a_faulty_query(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sql", small.config.lake, "select * from nothing"])
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: sql: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{lake}/latents/x.parquet' (format parquet)",
        "copy (select 1 as a) to '{file}' (format parquet)",
        "select 1; copy (select 1) to '{file}'",
        "explain analyze copy (select 1) to '{file}'",
        "/* */ explain (analyze, format json) copy (select 1) to '{file}'",
        "EXPLAIN\nANALYZE COPY (select 1) TO '{file}'",
        "export database '{lake}/latents'",
        "attach '{lake}/latents/x.db' as x; create table x.t as select 1; select 1",
        "set profiling_output = '{file}'; pragma enable_profiling = 'json'; select 1",
        "pragma profiling_output = '{file}'; select 1",
        "set lock_configuration = false; set profiling_output = '{file}'; select 1",
    ],
)
def test_no_query_writes_into_the_lake(small: Small, query: str) -> None:
    lake = Path(small.config.lake)
    before = {path: path.read_bytes() for path in lake.rglob("*") if path.is_file()}
    result = sae(
        "sql", lake, query.format(lake=lake, file=small.lake.absolute(small.lake.snapshot().select("atoms")[0]))
    )
    assert result.code == 1
    assert result.stdout == ""
    assert len(result.lines) == 1
    assert result.lines[0].startswith("error: sql: ")
    assert {path: path.read_bytes() for path in lake.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "query",
    [
        "explain select count(*) from latents",
        "explain analyze select count(*) from latents",
        "EXPLAIN (FORMAT json) from atoms",
        "set variable wanted = 3; select * from atoms where atom = getvariable('wanted')",
        "create macro twice(x) as 2 * x; select twice(atom) from atoms",
        "pivot (from latents) on pos using count(*) group by atom",
        "describe latents",
        "show tables",
        "summarize atoms",
    ],
)
def test_whatever_only_reads_is_answered(ask: Callable[..., str], query: str) -> None:
    assert ask(query)


def test_only_the_atoms_and_contexts_that_are_asked_for_are_shown(ask: Callable[..., str], small: Small) -> None:
    rows = "select atom, context_id, pos from latents order by all"
    given = {"atoms": (2, 4), "contexts": (3, 9)}
    context, pos, atom = np.nonzero(small.acts)
    expected = sorted((a, c, p) for a, c, p in zip(atom, context, pos, strict=True) if 2 <= a <= 4 and 3 <= c <= 9)
    assert ask(rows, **given) == "atom,context_id,pos\n" + "".join(f"{a},{c},{p}\n" for a, c, p in expected)
    assert ask("select atom from atoms order by atom", **given) == "atom\n2\n3\n4\n"
    assert ask("select count(*) as n from contexts", **given) == "n\n7\n"
    # What has neither key is whole, the runs and their tokens too.
    assert ask("select count(*) as n, (select sum(n_tokens) from runs) as tokens from documents", **given) == (
        f"n,tokens\n20,{small.n_tokens}\n"
    )


def test_atoms_and_contexts_are_given_on_the_command_line(small: Small) -> None:
    query = "select distinct atom, context_id from latents order by all"
    result = sae("sql", small.config.lake, query, "--format", "csv", "--atoms", "4", "4", "--contexts", "0", "7")
    contexts = np.flatnonzero(small.acts[:8, :, 4].any(axis=1))
    assert result.stdout.splitlines()[1:] == [f"4,{context}" for context in contexts]
    wrong = sae("sql", small.config.lake, query, "--atoms", "5", "3")
    assert (wrong.code, wrong.lines) == (
        1, ["error: atom: got 5 to 3; give the first and the last that you want, in this order"],
    )  # fmt: skip


def test_files_that_hold_none_of_the_atoms_are_not_opened(small: Small, ask: Callable[..., str]) -> None:
    rows = connect(small.config.lake).sql("select atom, context_id, pos, act from latents order by all")
    table = rows.to_arrow_table().cast(SCHEMAS["latents"])
    with small.lake.transaction("split") as transaction:
        transaction.remove(small.lake.snapshot().select("latents"))
        atoms = table["atom"].to_numpy()
        files = [transaction.write("latents", table.filter(atoms == a), autoencoder=NAME) for a in np.unique(atoms)]
    for file in files[1:]:
        Path(small.lake.absolute(file)).write_bytes(b"damaged")
    first, last = files[0].atoms or (0, 0)
    n = int((small.acts[:, :, first : last + 1] > 0).sum())
    assert ask("select count(*) as n from latents", atoms=(first, last)) == f"n\n{n}\n"
    assert connect(small.config.lake, atoms=(first, last)).sql("select count(*) from latents").fetchall() == [(n,)]
    with pytest.raises(LakeError, match="has 7 bytes"):
        ask("select count(*) from latents", atoms=(first, N_LATENTS))


def test_a_version_tells_what_was_answered_then(small: Small, ask: Callable[..., str]) -> None:
    queries = [
        "select * from atoms order by atom",
        "select atom, context_id, pos, act from latents order by all",
        "select * from runs order by all",
        f"from atom_histogram('{NAME}', 3)",
        f"from atom_examples('{NAME}', 3, 'top')",
        "select * from autoencoders",
    ]
    then = [ask(query) for query in queries]
    version = small.lake.snapshot().version
    drop(small, latents=NAME)
    assert ask("select * from latents").count("\n") == 1
    assert [ask(query, version=version) for query in queries] == then
    assert ask("select count(*) as n from latents", version=0) == "n\n0\n"


@pytest.mark.parametrize("version", ["-1", "99"])
def test_a_version_that_never_was_is_one_line(small: Small, version: str) -> None:
    result = sae("sql", small.config.lake, "select 1", "--version", version)
    newest = small.lake.snapshot().version
    message = f"error: {small.config.lake}: no version {version}; versions go from 0 to {newest}"
    assert (result.code, result.stdout, result.lines) == (1, "", [message])


def test_a_version_whose_files_were_collected_is_one_line(small: Small) -> None:
    version = small.lake.snapshot().version
    drop(small, latents=NAME)
    collect(small)
    result = sae("sql", small.config.lake, "select count(*) from latents", "--version", str(version))
    assert result.code == 1
    (line,) = result.lines
    assert f"version {version} can no longer be read" in line
    assert f"deleted by sae gc (latents/{NAME}/" in line
    assert line.endswith(f"ask for a newer version, the newest is {version + 1}")


@pytest.mark.parametrize("command", ["status", "sql", "gc", "drop"])
def test_a_folder_without_a_lake_is_refused(tmp_path: Path, command: str) -> None:
    given: dict[str, Any] = {"query": "select 1", "format": "csv", "version": None, "older_than": 0.0}
    given |= {"atoms": None, "contexts": None}
    given |= {"latents": NAME, "autoencoder": None, "lake": str(tmp_path)}
    with pytest.raises(LakeError, match="no lake here"):
        getattr(lake_commands, command)(Namespace(**given))
    assert list(tmp_path.iterdir()) == []


def test_dropped_latents_are_gone_and_can_be_encoded_again(small: Small) -> None:
    rows = "select atom, context_id, pos, act from latents order by all"
    before = connect(small.config.lake).execute(rows).fetchall()
    drop(small, latents=NAME)
    assert tables(small) == {"documents", "contexts", "vocabulary", "checkpoints", "training_states"}
    properties = small.lake.snapshot().properties
    assert {f"encode/{NAME}", f"aggregate/{NAME}"}.isdisjoint(properties)
    assert f"autoencoder/{NAME}" in properties
    assert connect(small.config.lake).execute(rows).fetchall() == []
    for run in range(3):
        encode(small, run)
    aggregate.run(small.config)
    assert tables(small) >= LATENT_TABLES
    assert connect(small.config.lake).execute(rows).fetchall() == before


def test_a_dropped_autoencoder_leaves_the_corpus_only(small: Small) -> None:
    with small.lake.transaction("evaluate", f"evaluate/{NAME}/c0ffee/{CORPUS}/8"):
        pass
    drop(small, autoencoder=NAME)
    snapshot = small.lake.snapshot()
    assert tables(small) == {"documents", "contexts", "vocabulary"}
    assert snapshot.units == {f"tokenize/{CORPUS}/1"}
    assert set(snapshot.properties) == {f"corpus/{CORPUS}"}


def test_dropping_one_autoencoder_leaves_another_whose_name_begins_alike(small: Small) -> None:
    other = Small(small_config(Path(small.config.lake), NAME + "er"), small.contexts, small.acts)
    train(small.lake, other.config)
    encode(other, 0)
    drop(small, latents=NAME)
    snapshot = small.lake.snapshot()
    assert f"encode/{NAME}er/{CORPUS}/0" in snapshot.units
    assert snapshot.select("latents", autoencoder=NAME + "er")
    assert not snapshot.select("latents", autoencoder=NAME)


@pytest.mark.parametrize("what", ["latents", "autoencoder"])
def test_dropping_an_unknown_name_tells_the_known_ones(small: Small, what: str) -> None:
    version = small.lake.snapshot().version
    with pytest.raises(LakeError, match=rf"--{what}: no .*wrong in this lake; it has: {NAME}$"):
        drop(small, **{what: "wrong"})
    assert small.lake.snapshot().version == version


def test_gc_frees_what_was_dropped_and_nothing_else(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    lake = Path(small.config.lake)
    dropped = {file.path for file in small.lake.snapshot().files.values() if file.table in LATENT_TABLES}
    drop(small, latents=NAME)
    kept = {str(path.relative_to(lake)) for path in lake.rglob("*") if path.is_file()} - dropped
    capsys.readouterr()
    collect(small, hours=1.0)
    assert capsys.readouterr().out == ""
    collect(small)
    assert set(capsys.readouterr().out.splitlines()) == dropped
    assert {str(path.relative_to(lake)) for path in lake.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("hours", [-1.0, float("nan"), float("inf")])
def test_gc_takes_no_negative_age(small: Small, hours: float) -> None:
    with pytest.raises(ConfigError, match="--older-than"):
        collect(small, hours)
