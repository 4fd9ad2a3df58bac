"""Figures speak of the held-out text of that training, and are refreshed when they are asked of other tokens."""

from pathlib import Path
from typing import Any

import pytest

from sae.jobs import evaluate
from sae.jobs.activations import Live
from sae.jobs.contexts import Array, Contexts
from sae.jobs.lake import connect
from sae.subject import Subject
from tests.in_process import run_of, train
from tests.tiny_run import Lab


@pytest.fixture(scope="module")
def long_documents(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The tiny run over documents that are longer than what is evaluated, trained for ten steps."""
    folder = tmp_path_factory.mktemp("long")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"the quick brown fox paid {number} yen " * 60)
    there = lab.without_lake(folder)
    there.done("tokenize", corpus__paths=[str(folder / "*.txt")])
    train(there, training__tokens=640, training__validation=0.3)
    return there


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8),
        ("training__validation", 0.5),
        ("training__dead_tokens", 10),
        ("subject__hook", "blocks.0.hook_resid_pre"),
        ("autoencoder__k", 8),
    ],
)
def test_other_settings_than_in_training_are_refused(key: str, value: Any, long_documents: Lab) -> None:
    before = long_documents.bytes()
    result = long_documents.sae("evaluate", **{"training__validation": 0.3, key: value})
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert f"error: {key.replace('__', '.')}: autoencoder tiny of" in result.stderr
    assert f"now it is {value}; give " in result.stderr
    assert long_documents.bytes() == before


def test_the_evaluated_tokens_are_of_several_documents(long_documents: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    documents: list[set[int]] = []

    class Noted(Live):
        def __init__(self, subject: Subject, contexts: Contexts, batch: int) -> None:
            super().__init__(subject, contexts, batch)
            self._doc_id = contexts.doc_id

        def vectors(self, rows: Array) -> Any:
            documents.append(set(self._doc_id[rows].tolist()))
            return super().vectors(rows)

    monkeypatch.setattr(evaluate, "Live", Noted)
    evaluate._evaluate(run_of(long_documents, training__validation=0.3, evaluate__tokens=256))
    training, evaluated = documents
    assert len(evaluated) > 1
    assert not training & evaluated


@pytest.mark.slow
def test_figures_follow_the_number_of_tokens(long_documents: Lab, one_ray: None, tmp_path: Path) -> None:
    lab = long_documents.copy(tmp_path)

    def figures(tokens: int) -> dict[str, float]:
        lab.done("evaluate", training__validation=0.3, evaluate__tokens=tokens)
        query = "select metric, value from metrics where phase = 'evaluate'"
        rows = connect(str(lab.lake)).sql(query).fetchall()
        found = dict(rows)
        assert len(found) == len(rows), "one row a metric"
        return found

    few, more = figures(64), figures(512)
    assert few != more
    assert figures(64) == few
    result = lab.done("evaluate", training__validation=0.3, evaluate__tokens=64)
    assert len(result.lines) == 1, "nothing is left to do"
