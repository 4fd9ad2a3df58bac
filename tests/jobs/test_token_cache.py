"""The cached tokens of a corpus are its contexts, and never those of another tokenization."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae.jobs.lake import Lake
from sae.jobs.token_cache import Tokens, open_tokens
from sae.schemas.tables import SCHEMAS
from tests.lakes import CORPUS, Small, small_lake


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
