"""The cached tokens of a corpus are its contexts, and never those of another tokenization."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae.jobs import drop, token_cache
from sae.jobs.lake import Lake
from sae.jobs.token_cache import Tokens, open_tokens
from sae.schemas.tables import SCHEMAS
from tests.lakes import CORPUS, Small, small_lake
from tests.tiny_run import sae


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_lake(tmp_path / "lake")


def opened(lake: Lake) -> Tokens:
    return open_tokens(lake, lake.snapshot(), CORPUS)


def arrays(small: Small) -> list[Path]:
    return sorted(Path(small.config.lake, "_cache").rglob("*.npy"))


def test_every_context_is_there_and_no_other(small: Small) -> None:
    tokens = opened(small.lake)
    assert [tokens.of(context) for context in range(len(small.contexts))] == [
        (token_ids, context) for context, token_ids in enumerate(small.contexts)
    ]
    assert tokens.token_ids.dtype == np.uint16
    for absent in (-1, len(small.contexts)):
        with pytest.raises(IndexError):
            tokens.of(absent)


def test_a_second_use_makes_nothing(small: Small) -> None:
    opened(small.lake)
    made = {path: path.stat().st_mtime_ns for path in arrays(small)}
    opened(small.lake)
    assert len(made) == 3
    assert {path: path.stat().st_mtime_ns for path in arrays(small)} == made


def test_a_corpus_that_was_tokenized_anew_gets_its_own(small: Small) -> None:
    opened(small.lake)
    stale = arrays(small)
    n = len(small.contexts)
    columns = {"context_id": range(n), "doc_id": range(n), "start": [0] * n, "token_ids": [[3, 1]] * n}
    with small.lake.transaction("tokenize") as transaction:
        transaction.remove(transaction.base.select("contexts", corpus=CORPUS))
        transaction.write("contexts", pa.table(columns, schema=SCHEMAS["contexts"]), corpus=CORPUS)
    assert opened(small.lake).of(7) == ([3, 1], 7)
    assert len(arrays(small)) == 3
    assert not set(stale) & set(arrays(small))


def test_an_array_that_was_cut_off_is_made_again(small: Small) -> None:
    opened(small.lake)
    path = next(path for path in arrays(small) if path.parent.name == "token_ids")
    path.write_bytes(path.read_bytes()[:-1])
    assert opened(small.lake).of(0) == (small.contexts[0], 0)


def test_a_lake_that_cannot_be_written_to_has_it_in_the_users_cache(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Path(small.config.lake, "_cache").write_text("in the way")
    assert opened(small.lake).of(0) == (small.contexts[0], 0)
    assert len(list((tmp_path / "home").rglob("*.npy"))) == 3


def test_contexts_in_any_order_are_the_single_ones(small: Small) -> None:
    tokens = opened(small.lake)
    n = len(small.contexts)
    asked = np.array([n - 1, -1, 3, 3, n, 0])
    token_ids, ends, doc_id = tokens.of_each(asked)
    found = [token_ids[start:stop].tolist() for start, stop in itertools.pairwise(ends)]
    assert found == [small.contexts[at] if 0 <= at < n else [] for at in asked]
    assert doc_id[[0, 2, 3, 5]].tolist() == [n - 1, 3, 3, 0]


def test_nothing_of_a_dropped_text_is_left_in_the_arrays(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    opened(small.lake)
    of_lake = arrays(small)
    # The same lake, used by somebody who could not write to it.
    with monkeypatch.context() as before:
        before.setattr(token_cache, "_CACHE", "run.yaml/in-the-way")
        Path(small.config.lake, "run.yaml").touch()
        opened(small.lake)
    of_user = list((tmp_path / "home").rglob("*.npy"))
    assert len(of_lake) == len(of_user) == 3
    killed = Path(small.config.lake, "_cache", CORPUS, "token_ids", ".tmp-" + 32 * "0")
    foreign = Path(small.config.lake, "_cache", "notes.txt")
    for path in (killed, foreign):
        path.touch()
    drop.text(small.lake, CORPUS, (3, 4))
    assert not any(path.exists() for path in (*of_lake, *of_user, killed))
    assert foreign.exists()
    assert opened(small.lake).of(5) == (small.contexts[5], 5)
    assert opened(small.lake).of_each(np.array([3, 4]))[0].tolist() == []
    assert len(arrays(small)) == 3
    drop.whole_corpus(small.lake, CORPUS)
    assert arrays(small) == []


def test_latents_that_are_dropped_leave_the_arrays(small: Small) -> None:
    opened(small.lake)
    before = arrays(small)
    drop.latents(small.lake, CORPUS, ["small"])
    small.lake.collect_garbage(0)
    assert sae("gc", small.config.lake, "--older-than", "0").code == 0
    assert arrays(small) == before


def test_gc_deletes_arrays_of_contexts_that_are_gone(small: Small) -> None:
    opened(small.lake)
    before = small.lake.snapshot()
    drop.text(small.lake, CORPUS, (3, 4))
    # Somebody who began before has just finished.
    open_tokens(small.lake, before, CORPUS)
    stale = arrays(small)
    result = sae("gc", small.config.lake)
    assert set(map(str, stale)) <= set(result.stdout.splitlines())
    assert arrays(small) == []
