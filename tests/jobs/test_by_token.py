"""The copy of the latents by token: each run once and whole, asked where it is there, gone with what it is made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sae.jobs import by_token, compact, drop, formats
from sae.jobs.lake import DataFile, Lake, connect
from sae.schemas.errors import ConflictError, LakeError
from sae.schemas.tables import SCHEMAS
from tests import lakes, tiny_run
from tests.lakes import CONTEXTS_PER_RUN, CORPUS, NAME, TOKENS, Small, small_lake
from tests.object_stores import serve
from tests.tiny_run import Lab, sae

PLENTY = 10**6
QUESTIONS = (
    *(f"from document_atoms('{NAME}', {document})" for document in (0, 7, 19, 20)),
    *(f"from token_atoms('{NAME}', '{token}')" for token in (" a", " fox", "none")),
    *(f"from context_latents('{NAME}', {context})" for context in (0, 8, 19)),
    f"from token_latents('{NAME}', 9, 1)",
    f"from coactive_atoms('{NAME}', 3)",
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_lake(tmp_path_factory.mktemp("by_token") / "lake")


@pytest.fixture
def small(pristine: Small, tmp_path: Path) -> Small:
    return pristine.copy(tmp_path / "lake")


def copies(small: Small) -> list[DataFile]:
    return small.lake.snapshot().select(by_token.TABLE)


def runs(small: Small) -> list[int | None]:
    return [file.run for file in copies(small)]


def merge_runs(lake: Lake, file_rows: int = 40) -> None:
    compact.merge_sets(lake, NAME, compact.sorted_sets(lake.snapshot().select("latents")), file_rows)


def expected(small: Small, contexts: range) -> list[tuple[int, int, int, float]]:
    """(context_id, pos, atom, act) in order."""
    context, pos, atom = np.nonzero(small.acts[contexts.start : contexts.stop])
    act = small.acts[context + contexts.start, pos, atom]
    return list(zip((context + contexts.start).tolist(), pos.tolist(), atom.tolist(), act.tolist(), strict=True))


def held(lake: Lake, file: DataFile) -> list[tuple[int, int, int, float]]:
    columns = lake.read([file]).select(["context_id", "pos", "atom", "act"]).to_pydict().values()
    return list(zip(*columns, strict=True))


def shown(small: Small, table: str, version: int | None = None, **bounds: Any) -> list[tuple[Any, ...]]:
    return connect(small.config.lake, version, **bounds).sql(f"from {table} order by all").fetchall()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 20, 200, PLENTY])
def test_a_copy_holds_its_run_in_the_order_of_tokens(
    small: Small, merged: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats._ROW_GROUP, "latents", 8)
    if merged:
        merge_runs(small.lake)
    assert by_token.refresh(small.lake, NAME, rows_at_once * by_token._ROW_BYTES) == 3
    assert runs(small) == [0, 1, 2]
    for file in copies(small):
        first = (file.run or 0) * CONTEXTS_PER_RUN
        assert held(small.lake, file) == expected(small, range(first, min(first + CONTEXTS_PER_RUN, 20)))
    assert connect(small.config.lake).sql("from latents_by_token").columns == [
        "autoencoder",
        *SCHEMAS["latents"].names,
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_answers_are_the_same_with_copies_of_all_some_and_no_runs(small: Small, merged: bool) -> None:
    def answers() -> list[Any]:
        connection = connect(small.config.lake)
        return [connection.sql(question).fetchall() for question in QUESTIONS]

    if merged:
        merge_runs(small.lake)
    none, latents = answers(), shown(small, "latents")
    assert any(len(answer) > 3 for answer in none)
    by_token.refresh(small.lake, NAME, PLENTY)
    assert answers() == none
    with small.lake.transaction("test") as transaction:
        transaction.remove(copies(small)[1:2])
    assert runs(small) == [0, 2]
    assert answers() == none
    assert shown(small, "latents_by_token") == latents


def test_context_latents_are_those_of_the_context_with_their_tokens(small: Small) -> None:
    found = connect(small.config.lake).sql(f"from context_latents('{NAME}', 9)").fetchall()
    rows = [(pos, TOKENS[small.contexts[9][pos]], atom, act) for _, pos, atom, act in expected(small, range(9, 10))]
    assert found == sorted(rows, key=lambda row: (row[0], -row[3], row[2]))


def test_the_command_copies_what_has_no_copy_and_nothing_else(small: Small, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(small.config.model_dump(mode="json", exclude={"autoencoders"})))

    def said() -> str:
        result = sae("compact", config, "--compact.by_token", "true")
        assert result.code == 0, result.stderr
        return result.stderr

    drop.latents(small.lake, CORPUS, [NAME], 2)
    assert f"compact: copied 2 runs of {NAME} by token" in said()
    assert len(small.lake.snapshot().select("latents")) == 1
    before = copies(small)
    lakes.encode(small, 2)
    assert f"compact: copied 1 runs of {NAME} by token" in said()
    assert copies(small)[:2] == before
    version = small.lake.snapshot().version
    assert f"compact: copied 0 runs of {NAME} by token" in said()
    assert small.lake.snapshot().version == version
    assert shown(small, "latents_by_token") == shown(small, "latents")


def test_runs_that_do_not_fit_together_are_copied_side_by_side(
    finished: Lab, one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_token, "_ROW_BYTES", 10**6)
    lab = finished.copy(tmp_path)
    n_runs = len(Lake(str(lab.lake)).snapshot().select("moments"))
    assert n_runs > 1
    said = lab.done("compact", compact__by_token=True).stderr
    assert f"compact: copied {n_runs} runs of {tiny_run.NAME} by token" in said
    found, latents = (
        connect(str(lab.lake)).sql(f"from {table} order by all").fetchall() for table in ("latents_by_token", "latents")
    )
    assert found == latents
    assert len(Lake(str(lab.lake)).snapshot().select(by_token.TABLE)) == n_runs


def test_what_is_asked_opens_only_the_copies_that_can_hold_it(small: Small) -> None:
    by_token.refresh(small.lake, NAME, PLENTY)
    merge_runs(small.lake)
    wanted = [row for row in shown(small, "latents") if 2 <= row[2] <= 5]
    for file in copies(small)[1:]:
        Path(small.lake.absolute(file)).unlink()
    connection = connect(small.config.lake, contexts=(2, 5))
    for file in small.lake.snapshot().select("latents"):
        Path(small.lake.absolute(file)).unlink()
    assert connection.sql("from latents_by_token order by all").fetchall() == wanted


def test_files_of_copied_runs_are_not_opened_for_those_that_are_not(small: Small) -> None:
    by_token.refresh(small.lake, NAME, PLENTY)
    latents = shown(small, "latents")
    with small.lake.transaction("test") as transaction:
        transaction.remove(copies(small)[1:2])
    connection = connect(small.config.lake)
    for file in small.lake.snapshot().select("latents"):
        if file.run != 1:
            Path(small.lake.absolute(file)).unlink()
    assert connection.sql("from latents_by_token order by all").fetchall() == latents


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_dropped_is_in_no_copy(small: Small, merged: bool) -> None:
    by_token.refresh(small.lake, NAME, PLENTY)
    if merged:
        merge_runs(small.lake)
    before, version = shown(small, "latents"), small.lake.snapshot().version
    drop.text(small.lake, CORPUS, (6, 9))
    assert runs(small) == [2]
    left = [row for row in before if not 6 <= row[2] <= 9]
    assert shown(small, "latents_by_token") == left
    assert by_token.refresh(small.lake, NAME, PLENTY) == 2
    assert shown(small, "latents_by_token") == left
    assert not any(6 <= context <= 9 for file in copies(small) for context, *_ in held(small.lake, file))
    drop.latents(small.lake, CORPUS, [NAME], 2)
    assert runs(small) == [0, 1]
    assert shown(small, "latents_by_token") == [row for row in left if row[2] < 16]
    assert shown(small, "latents_by_token", version) == before
    drop.autoencoder(small.lake, NAME, whole=False)
    assert runs(small) == []
    small.lake.collect_garbage(0)
    assert list(Path(small.config.lake, by_token.TABLE).rglob("*.parquet")) == []


def test_a_copy_can_be_dropped_alone(small: Small) -> None:
    by_token.refresh(small.lake, NAME, PLENTY)
    n_bytes = sum(file.bytes for file in copies(small))
    before = shown(small, "latents_by_token")
    result = sae("drop", small.config.lake, "--latents", NAME, "--by-token")
    assert result.code == 0, result.stderr
    assert f"drop: the copy by token of {NAME} (3 files, {n_bytes:,} bytes)" in result.stderr
    assert "sae aggregate" not in result.stderr
    assert runs(small) == []
    assert shown(small, "latents_by_token") == before
    result = sae("drop", small.config.lake, "--latents", NAME, "--by-token")
    assert (result.code, len(result.lines)) == (1, 1)
    assert (
        f"--by-token: {NAME} has no copy by token; sae compact makes one where compact.by_token is true"
        in result.lines[0]
    )


def test_status_tells_which_runs_have_no_copy(small: Small) -> None:
    def unfinished() -> str:
        return sae("status", small.config.lake).stdout.splitlines()[-1]

    assert unfinished() == "unfinished: nothing"
    by_token.refresh(small.lake, NAME, PLENTY)
    assert unfinished() == "unfinished: nothing"
    with small.lake.transaction("test") as transaction:
        transaction.remove(copies(small)[1:])
    assert unfinished() == f"unfinished: copy by token of {NAME} (2 runs have none)"


@pytest.mark.parametrize("other", ["drops", "copies"])
def test_of_two_at_the_same_time_one_goes_first(small: Small, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped stays away, and what is copied is there once."""
    latents = shown(small, "latents")
    read = by_token._Block.read

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        block = read(*given)
        lake = Lake(small.config.lake)
        if other == "drops":
            drop.text(lake, CORPUS, (6, 9))
            latents[:] = [row for row in latents if not 6 <= row[2] <= 9]
        else:
            by_token.refresh(lake, NAME, PLENTY)
        return block

    monkeypatch.setattr(by_token._Block, "read", meanwhile)
    assert by_token.refresh(small.lake, NAME, PLENTY) == (1 if other == "drops" else 0)
    assert runs(small) == ([2] if other == "drops" else [0, 1, 2])
    assert shown(small, "latents_by_token") == latents
    kept = {small.lake.absolute(file) for file in copies(small)}
    assert set(map(str, Path(small.config.lake, by_token.TABLE).rglob("*.parquet"))) == kept


def test_a_copy_that_comes_while_its_contexts_go_is_a_conflict(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = drop._take_text

    def meanwhile(*given: Any) -> Any:
        by_token.refresh(Lake(small.config.lake), NAME, PLENTY)
        return taken(*given)

    monkeypatch.setattr(drop, "_take_text", meanwhile)
    with pytest.raises(
        ConflictError, match=f"corpus {CORPUS}: added to by another writer meanwhile; run the step again"
    ):
        drop.text(small.lake, CORPUS, (3, 4))
    monkeypatch.undo()
    drop.text(small.lake, CORPUS, (3, 4))
    assert not {3, 4} & {row[2] for row in shown(small, "latents_by_token")}


def test_a_run_whose_rows_are_not_those_that_were_counted_is_not_copied(small: Small) -> None:
    (first, *_) = small.lake.snapshot().select("latents")
    with small.lake.transaction("test") as transaction:
        transaction.remove([first])
        rows = small.lake.read([first])
        transaction.write("latents", rows.slice(1), corpus=CORPUS, autoencoder=NAME, run=0)
    n = first.rows
    with pytest.raises(LakeError, match=f"run 0 of {CORPUS} by {NAME} has {n - 1} latents, its moments count {n}; "):
        by_token.refresh(small.lake, NAME, PLENTY)
    assert runs(small) == []


def test_a_lake_in_an_object_store_has_the_same(small: Small) -> None:
    with serve("s3") as put:
        for path in Path(small.config.lake).rglob("*"):
            if path.is_file():
                url = put(f"lake/{path.relative_to(small.config.lake)}", path.read_bytes())
        remote = Lake(url.partition("/lake/")[0] + "/lake")
        assert by_token.refresh(remote, NAME, PLENTY) == 3
        found = connect(remote.path).sql("from latents_by_token order by all").fetchall()
    assert found == shown(small, "latents")
