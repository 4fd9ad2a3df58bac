"""The steps together: other workers and batches, interruptions, caches and repetitions give the same tables."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from sae.jobs.lake import Lake, connect
from tests.no_ray import without_ray
from tests.tiny_run import CORPUS, NAME, ORDER, Lab, rows

STEPS = ("tokenize", "train", "encode", "compact", "aggregate", "evaluate", "export")


def state(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = Lake(str(lab.lake)).snapshot().properties.get(f"autoencoder/{NAME}", {})
    return found


def final_tensors(lab: Lab) -> dict[str, Tensor]:
    """Weights and the whole training state at the last checkpoint."""
    last = state(lab)["checkpoints"][-1]
    parts = {kind: load_file(lab.lake / last[kind][0]["path"]) for kind in ("model", "state")}
    return {f"{kind}/{name}": tensor for kind, tensors in parts.items() for name, tensor in tensors.items()}


def assert_same_training(one: Lab, other: Lab) -> None:
    mine, theirs = final_tensors(one), final_tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []
    # A lake may also hold what evaluate found.
    mine_rows, their_rows = (
        [row for row in rows(lab.lake, "metrics") if not {"evaluate", "machine"} & {*row}] for lab in (one, other)
    )
    assert mine_rows == their_rows


@pytest.mark.slow
@pytest.mark.timeout(600)  # every step starts workers, which on a machine that does other work takes minutes
def test_fresh_run_with_several_actors_and_other_batches_gives_the_same_tables(
    finished: Lab, one_ray: None, tmp_path: Path
) -> None:
    """Down to the bits of a run without Ray, and so also to the stored precision: no row depends on its neighbours."""
    fresh = finished.without_lake(tmp_path)
    fresh.done("run", cluster__encode_actors=2, encode__batch_contexts=5)
    assert_same_training(fresh, finished)
    for table in ORDER.keys() - {"metrics"}:
        assert rows(fresh.lake, table) == rows(finished.lake, table), table
    again = [fresh.done(step, cluster__encode_actors=2) for step in STEPS]
    assert [len(result.lines) for result in again] == [1] * len(STEPS)


def test_batches_of_one_context_give_the_same_latents(
    finished: Lab, trained: Lab, no_ray: None, tmp_path: Path
) -> None:
    single = trained.copy(tmp_path)
    single.done("encode", encode__batch_contexts=1)
    single.done("aggregate")
    for table in ("latents", "atoms", "examples", "histograms"):
        assert rows(single.lake, table) == rows(finished.lake, table), table


def test_steps_done_a_second_time_change_nothing(finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    with without_ray():
        lab.done("compact")
    before = lab.bytes()
    for step in ("tokenize", "train", "encode", "compact", "aggregate"):
        started = time.monotonic()
        result = lab.done(step)
        assert len(result.lines) == 1
        assert time.monotonic() - started < 5, "no Ray and no model is needed to see that all is done"
    assert lab.bytes() == before


def test_stale_views_are_mended_by_the_next_command(finished: Lab, tmp_path: Path) -> None:
    """A command that is killed between its commit and views.sql leaves the old views behind."""
    lab = finished.copy(tmp_path)
    lab.done("aggregate")
    views = lab.lake / "views.sql"
    right = views.read_bytes()
    views.write_text("create view latents as select 1;")
    lab.done("aggregate")
    assert views.read_bytes() == right


def kill_trainer_at_checkpoint(lab: Lab, n: int) -> threading.Thread:
    """Waits for the n-th checkpoint and then kills the training actor, in the background."""

    def watch() -> None:
        while state(lab).get("step", 0) < n * 10:
            time.sleep(0.002)
        children = psutil.Process().children(recursive=True)
        (trainer,) = [child for child in children if child.name().startswith("ray::Trainer")]
        trainer.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_training_that_is_killed_and_goes_on_gives_the_same_bits(
    trained: Lab, tokenized: Lab, one_ray: None, tmp_path: Path
) -> None:
    killed = tokenized.copy(tmp_path)
    watcher = kill_trainer_at_checkpoint(killed, 4)
    result = killed.sae("train", training__max_failures=0)
    watcher.join()
    assert result.code == 1
    assert result.lines[-1].startswith("error: train: a worker was lost")
    assert 40 <= state(killed)["step"] < 100, "it was killed midway"
    watcher = kill_trainer_at_checkpoint(killed, 6)
    result = killed.done("train")
    watcher.join()
    assert "going on from the last checkpoint, 1 of 3 times (training.max_failures)" in result.stderr
    assert "the next step was done" in result.stderr
    assert_same_training(killed, trained)


def test_training_can_be_prolonged(trained: Lab, tokenized: Lab, no_ray: None, tmp_path: Path) -> None:
    """Training to 3,200 tokens and then to 6,400 is training to 6,400."""
    lab = tokenized.copy(tmp_path)
    lab.done("train", training__tokens=3200)
    assert state(lab)["tokens"] == 3200
    lab.done("train")
    assert_same_training(lab, trained)


@pytest.mark.slow
def test_training_from_the_cache_is_nearly_training_live(
    trained: Lab, tokenized: Lab, one_ray: None, tmp_path: Path
) -> None:
    """The cache has half precision, 2**-11 of each activation; a hundred steps don't amplify that to more than 2%."""
    lab = tokenized.copy(tmp_path)
    with without_ray():
        early = lab.sae("train", training__source="cached")
    assert early.code == 1
    assert "run sae harvest first" in early.lines[-1]
    lab.done("harvest")
    with without_ray():
        lab.done("train", training__source="cached")
    query = "select value from metrics where phase = 'validation' and metric = 'fvu' order by step"
    cached, live = ([value for (value,) in connect(str(one.lake)).sql(query).fetchall()] for one in (lab, trained))
    assert cached == pytest.approx(live, rel=0.02)
    assert cached != live
    assert len(lab.done("harvest").lines) == 1


@pytest.mark.parametrize(
    ("step", "first"),
    [
        ("train", "tokenize"),
        ("harvest", "tokenize"),
        ("encode", "tokenize"),
        ("compact", "encode"),
        ("aggregate", "encode"),
        ("evaluate", "tokenize"),
    ],
)
def test_a_step_before_its_turn_names_the_one_to_run(
    lab: Lab, tokenized: Lab, step: str, first: str, tmp_path: Path
) -> None:
    nothing = lab.without_lake(tmp_path).sae(step)
    assert nothing.code == 1
    assert nothing.lines[-1].startswith("error: ")
    assert len(nothing.lines) == 1
    if first != "tokenize":
        result = tokenized.sae(step)
        assert result.code == 1
        assert len(result.lines) == 1
        assert f"run sae {first} first" in result.lines[0]


def test_encode_before_train_names_it(tokenized: Lab) -> None:
    result = tokenized.sae("encode")
    assert (result.code, len(result.lines)) == (1, 1)
    assert "run sae train first" in result.lines[0]


def test_aggregate_waits_for_all_runs(finished: Lab, trained: Lab, tmp_path: Path) -> None:
    result = trained.sae("aggregate")
    assert (result.code, len(result.lines)) == (1, 1)
    assert "run sae encode first" in result.lines[0]


def test_bad_rows_are_counted_and_left_out(lab: Lab, tmp_path: Path) -> None:
    good = [json.dumps({"text": f"document {i}", "name": f"d{i}"}) for i in range(3)]
    bad = [
        "{",
        "",
        json.dumps({"text": 3, "name": "x"}),
        json.dumps({"name": "y"}),
        json.dumps({"text": " ", "name": "z"}),
    ]
    corpus = tmp_path / "rows.jsonl"
    lines = [good[0], *bad, good[1], good[2]]
    corpus.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff", "name": "u"}\n')
    there = lab.without_lake(tmp_path)
    given: dict[str, Any] = {"corpus__paths": [str(corpus)], "corpus__id": "name", "corpus__on_bad_row": "skip"}
    result = there.done("tokenize", **given)
    assert len(result.lines) == 1
    for cause in (
        "invalid JSON",
        "blank line",
        "column 'text' is of type int",
        "no column 'text'",
        "empty text",
        "invalid UTF-8",
    ):
        assert cause in result.stderr
    assert f"{corpus}:2" in result.stderr
    documents = connect(str(there.lake)).sql("select external_id from documents order by doc_id").fetchall()
    assert documents == [("d0",), ("d1",), ("d2",)]
    assert "6 bad rows" in there.done("tokenize", **given).stderr


def test_two_corpora_share_a_lake(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    lab.done("tokenize", corpus__name="second", corpus__paths=[str(lab.folder / "texts/00*.txt")])
    query = "select corpus, min(context_id) >> 40, count(distinct doc_id) from contexts group by corpus order by 2"
    assert connect(str(lab.lake)).sql(query).fetchall() == [(CORPUS, 0, 30), ("second", 1, 10)]
    assert rows(tokenized.lake, "contexts") == [row for row in rows(lab.lake, "contexts") if row[0] == CORPUS]
