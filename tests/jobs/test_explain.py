"""The step explain: planted atoms are found by the whole pipeline, rows against plain tries, and what is missing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sae.jobs import checkpoints, explain
from sae.jobs.explain import Explainer
from sae.jobs.lake import Lake, connect, write_views
from sae.n2g.pattern import ANY, START
from sae.n2g.trie import Trie
from sae.schemas.errors import LakeError, SubjectError
from sae.subject import Subject
from tests import planted
from tests.in_process import encode_all, explain_all, run_of, train
from tests.tiny_run import NAME, Lab, sae, tiny_config

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "explain__ranks": 3,
    "explain__length": 6,
    "explain__gap": 2,
    "explain__contexts": 40,
    "explain__unit_atoms": 20,
    "explain__batch_contexts": 8,
}


@pytest.fixture(scope="module")
def made(finished: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With explanations; not to be changed."""
    lab = finished.copy(tmp_path_factory.mktemp("made"))
    assert explain_all(lab, **SETTINGS) == 4
    write_views(Lake(str(lab.lake)))
    return lab


def rows(lab: Lab, sql: str) -> list[tuple[Any, ...]]:
    return connect(str(lab.lake)).sql(sql).fetchall()


def table(lab: Lab) -> list[tuple[Any, ...]]:
    return rows(lab, "from explanations order by atom")


LETTERS = {letter: ord(letter) - ord("a") for letter in "abcdefghijkl"}


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Letters drawn at random, a model that tells tokens, positions and the tokens before, and atoms of these."""
    folder = tmp_path_factory.mktemp("planted")
    planted.planted_gpt2(folder / "model")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    for number in range(40):
        (folder / "texts" / f"{number:02}.txt").write_text("".join(draw.choices("abcdefghijkl", k=150)))
    config = tiny_config(folder)
    config["subject"] = {"model": str(folder / "model"), "hook": planted.HOOK}
    config["autoencoder"] = {"name": NAME, "n_latents": len(ATOMS), "activation": "relu"}
    config["training"]["l1_coef"] = 0.1
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    lab = Lab(folder, folder / "lake")
    lab.done("tokenize")
    ids = dict(rows(lab, "select token, token_id from vocabulary"))
    run = run_of(lab)
    atoms = [({at(ids): weight for at, weight in weights}, bias) for weights, bias in ATOMS.values()]
    planted.commit(Lake(run.lake), NAME, atoms, checkpoints.made_with(run))
    encode_all(lab)
    lab.done("aggregate")
    assert explain_all(lab, explain__contexts=100, explain__gap=0) == 1
    write_views(Lake(str(lab.lake)))
    return lab


def token(letter: str) -> Any:
    return lambda ids: planted.token(ids[letter])


def before(letter: str) -> Any:
    return lambda ids: planted.before(ids[letter])


def position(pos: int) -> Any:
    return lambda ids: planted.position(pos)


# Weights and bias: an atom fires where the entries that are there outweigh it.
ATOMS: dict[str, tuple[list[tuple[Any, float]], float]] = {
    "c": ([(token("c"), 2.0)], -1.0),
    "ab": ([(token("b"), 1.0), (before("a"), 1.0)], -1.5),
    "the start of text": ([(position(0), 1.0)], -0.25),
    "d, e or f": ([(token(letter), 1.0) for letter in "def"], -0.5),
    "any behind g": ([(before("g"), 1.0)], -0.5),
    "nothing": ([(token("c"), 1.0)], -2.0),
}
EXPECTED: dict[str, set[tuple[Any, ...]]] = {
    "c": {("c",)},
    "ab": {("b", "a")},
    "the start of text": {(ANY, START)},
    "d, e or f": {("d",), ("e",), ("f",)},
    "any behind g": {(ANY, "g"), ("g", START)},  # the first token looks at itself
    "nothing": set(),
}


@pytest.mark.parametrize("atom", range(len(ATOMS)), ids=ATOMS)
def test_planted_atoms_are_recovered_exactly(planted_run: Lab, atom: int) -> None:
    name = list(ATOMS)[atom]
    ids = dict(rows(planted_run, "select token, token_id from vocabulary"))
    columns = "trie, n_patterns, n_active, n_predicted, recall, precision, correlation"
    ((trie, n, n_active, n_predicted, *scores),) = rows(
        planted_run, f"select {columns} from explanations where atom = {atom}"
    )
    found = {one.elements for one in Trie.from_json(trie).patterns()}
    assert found == {tuple(ids.get(one, one) for one in elements) for elements in EXPECTED[name]}
    assert n == len(EXPECTED[name])
    assert n_predicted == n_active
    assert (n_active > 10) == (name != "nothing")
    assert scores == ([pytest.approx(1.0, abs=1e-9)] * 3 if n_active else [None] * 3)


def test_patterns_can_be_read(planted_run: Lab) -> None:
    found = [set(patterns) for (patterns,) in rows(planted_run, "select patterns from explanations order by atom")]
    assert found == [{"c"}, {"ab"}, {"[^][*]"}, {"d", "e", "f"}, {"g[*]", "[^]g"}, set()]


def test_an_atom_that_never_fires_has_an_explanation_without_patterns(planted_run: Lab) -> None:
    columns = "n_examples, n_patterns, patterns, acts, n_active, n_predicted, n_tokens > 1000"
    idle = list(ATOMS).index("nothing")
    assert rows(planted_run, f"select {columns} from explanations where atom = {idle}") == [(0, 0, [], [], 0, 0, True)]


def test_there_is_one_row_for_each_atom(made: Lab) -> None:
    assert rows(made, "select atom from explanations order by atom") == [(atom,) for atom in range(64)]
    distinct = "select atom, count(distinct (context_id, pos)) as n from examples where rank < 3 group by atom"
    assert rows(made, f"select count(*) from explanations join ({distinct}) using (atom) where n = n_examples") == [
        (64,)
    ]
    assert rows(made, "select distinct len(acts) - n_patterns, len(patterns) - n_patterns from explanations") == [
        (0, 0)
    ]
    assert rows(made, "select count(*) > 60 from explanations where n_patterns between 1 and n_examples") == [(True,)]


def test_scores_are_those_of_plain_tries_on_other_contexts(made: Lab) -> None:
    config = run_of(made, **SETTINGS)
    snapshot = Lake(config.lake).snapshot()
    drawn = explain._drawn(snapshot, config)
    assert len(drawn) == 40
    contexts = dict(rows(made, "select context_id, token_ids from contexts"))
    real: dict[tuple[int, int, int], float] = {
        (atom, context, pos): act
        for atom, context, pos, act in rows(made, "select atom, context_id, pos, act from latents")
    }
    built_from = set(rows(made, "select atom, context_id from examples where rank < 3"))
    scored = 0
    columns = "atom, trie, n_tokens, n_active, n_predicted, recall, precision, correlation"
    for atom, trie, n_tokens, n_active, n_predicted, recall, precision, correlation in rows(
        made, f"select {columns} from explanations"
    ):
        p, r = [], []
        for context in drawn.tolist():
            if (atom, context) in built_from:
                continue
            tokens = contexts[context]
            p += Trie.from_json(trie).predict(tokens)[1:]  # position 0 is masked
            r += [real.get((atom, context, pos), 0.0) for pos in range(1, len(tokens))]
        predicted, active = np.array(p), np.array(r)
        both = ((predicted > 0) & (active > 0)).sum()
        assert (n_tokens, n_active, n_predicted) == (len(p), (active > 0).sum(), (predicted > 0).sum())
        assert recall == (pytest.approx(both / n_active) if n_active else None)
        assert precision == (pytest.approx(both / n_predicted) if n_predicted else None)
        if predicted.std() and active.std():
            scored += 1
            assert correlation == pytest.approx(np.corrcoef(predicted, active)[0, 1], abs=1e-6)
        else:
            assert correlation is None
    assert scored > 10


def test_ends_of_examples_keep_half_of_the_activation_of_a_plain_forward(made: Lab) -> None:
    """The strongest pattern of an atom predicts what one of its examples' ends gives by itself."""
    config = run_of(made)
    subject = Subject.load(**config.subject.model_dump())
    autoencoder = checkpoints.load(Lake(config.lake), NAME)
    example = "select atom, pos, token_ids, act from examples join contexts using (context_id) where rank < 3"
    found = {atom: Trie.from_json(trie) for atom, trie in rows(made, "select atom, trie from explanations")}
    checked = 0
    for atom, pos, tokens, act in rows(made, f"{example} order by hash(atom, context_id) limit 40"):
        of_ends = []
        for n in range(1, min(pos + 1, 6) + 1):
            end = tokens[pos + 1 - n : pos + 1]
            padded = end if n == pos + 1 else [0, *end]
            with torch.no_grad():
                latents, _ = autoencoder.encode(subject.activations(torch.tensor([padded]))[0, -1])
            if latents[atom] >= 0.5 * act:
                of_ends.append(float(latents[atom]))
        if of_ends:
            acts = [one.act for one in found[atom].patterns()]
            assert min(abs(one - end) for one in acts for end in of_ends) < 1e-4 or max(acts) > min(of_ends)
            checked += 1
    assert checked > 20


def test_a_second_run_makes_nothing_and_more_atoms_only_what_is_missing(
    made: Lab, finished: Lab, tmp_path: Path
) -> None:
    lab = finished.copy(tmp_path)
    assert explain_all(lab, **SETTINGS, explain__atoms=[3, 5]) == 1
    assert rows(lab, "select atom from explanations order by atom") == [(3,), (4,), (5,)]
    assert explain_all(lab, **SETTINGS, explain__atoms=[4, 5]) == 0
    assert explain_all(lab, **SETTINGS) == 4
    assert explain_all(lab, **SETTINGS) == 0
    assert table(lab) == table(made)
    assert lab.sae("explain", **SETTINGS).lines == [f"explain: explanations of {NAME} are up to date"]


def test_an_attempt_that_was_lost_and_done_again_adds_no_rows(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    config = run_of(lab, **SETTINGS)
    snapshot = Lake(config.lake).snapshot()
    # As another command has cut the atoms, too.
    explainer = Explainer(
        config, explain._source(snapshot, config), [(0, 19), (7, 25)], explain._drawn(snapshot, config), 1
    )
    explainer({"run": [1]})
    assert table(lab) == table(made)


def test_other_settings_replace_what_was_made_with_the_old_ones(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    assert explain_all(lab, **{**SETTINGS, "explain__ranks": 1}) == 4
    assert table(lab) != table(made)
    assert len(table(lab)) == 64
    assert (
        explain_all(lab, **{**SETTINGS, "explain__ranks": 1, "explain__unit_atoms": 7, "explain__batch_contexts": 3})
        == 0
    )


def test_the_padding_is_a_token_of_the_config(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    assert explain_all(lab, **SETTINGS, explain__padding="a") == 4
    source = Lake(str(lab.lake)).snapshot().properties[f"explain/{NAME}"]
    assert rows(lab, f"select token from vocabulary where token_id = {source['padding']}") == [("a",)]


def test_text_that_is_dropped_leaves_no_explanations_and_they_are_made_anew(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    ((gone,),) = rows(lab, "select doc_id from examples join contexts using (context_id) order by rank limit 1")
    assert sae("drop", lab.lake, "--doc", str(gone)).code == 0
    assert table(lab) == []
    refused = lab.sae("explain", **SETTINGS)
    assert (refused.code, len(refused.lines)) == (1, 1)
    assert "run sae aggregate first" in refused.stderr
    lab.done("aggregate")
    assert explain_all(lab, **SETTINGS) == 4
    config = run_of(lab, **SETTINGS)
    drawn = explain._drawn(Lake(config.lake).snapshot(), config)
    left = {context for (context,) in rows(lab, "select context_id from contexts")}
    assert set(drawn.tolist()) <= left


def test_dropped_latents_take_explanations_along(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    assert sae("drop", lab.lake, "--latents", NAME).code == 0
    assert table(lab) == []
    snapshot = Lake(str(lab.lake)).snapshot()
    assert not [key for key in (*snapshot.units, *snapshot.properties) if key.startswith("explain/")]


def test_explanations_of_examples_that_changed_meanwhile_are_not_committed(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    config = run_of(lab, **{**SETTINGS, "explain__ranks": 1})
    snapshot = Lake(config.lake).snapshot()
    explainer = Explainer(config, explain._source(snapshot, config), [(0, 3)], explain._drawn(snapshot, config), 1)
    with pytest.raises(LakeError, match="the examples of tiny changed meanwhile; run sae explain again"):
        explainer({"run": [0]})


def test_status_tells_explanations_of_other_examples(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    told = f"explanations of {NAME} (made of other examples)"
    assert told not in sae("status", lab.lake).stdout
    with Lake(str(lab.lake)).transaction("test") as transaction:
        transaction.set(f"aggregate/{NAME}", ["of other runs"])
    assert told in sae("status", lab.lake).stdout


def test_compacted_latents_give_the_same_scores(made: Lab, finished: Lab, no_ray: None, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    lab.done("compact")
    lab.done("aggregate")
    explain_all(lab, **SETTINGS)
    assert table(lab) == table(made)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"explain__atoms": [60, 64]}, "explain.atoms: got 60 to 64; autoencoder tiny has atoms 0 to 63"),
        ({"explain__padding": "a fox"}, "explain.padding: got 'a fox', which is "),
        ({"explain__threshold": 0}, "explain.threshold: got 0; expected greater than 0"),
        ({"explain__gap": -1}, "explain.gap: got -1; expected greater than or equal to 0"),
        ({"explain__rank": 3}, "explain.rank: unknown key; did you mean ranks?"),
        ({"subject__hook": "blocks.0.hook_resid_pre"}, "subject.hook: autoencoder tiny"),
        ({"encode__weights": "plain"}, "encode.weights, encode.checkpoint: got plain and last,"),
    ],
)
def test_what_does_not_fit_is_one_line(made: Lab, overrides: dict[str, Any], line: str) -> None:
    before = Lake(str(made.lake)).snapshot().version
    result = made.sae("explain", **{**SETTINGS, **overrides})
    assert (result.code, len(result.lines)) == (1, 1), result.stderr
    assert line in result.stderr
    assert Lake(str(made.lake)).snapshot().version == before


def test_steps_in_the_wrong_order_are_one_line(tokenized: Lab, tmp_path: Path) -> None:
    lab = tokenized.copy(tmp_path)
    for needed, do in (("train", train), ("aggregate", encode_all), ("aggregate", None)):
        result = lab.sae("explain")
        assert (result.code, len(result.lines)) == (1, 1), result.stderr
        assert f"run sae {needed} first" in result.stderr
        if do is not None:
            do(lab)


def test_activations_that_are_nan_are_one_line_and_leave_no_rows(
    finished: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = finished.copy(tmp_path)
    load = Subject.load

    def spoiled(*given: Any, **named: Any) -> Subject:
        subject = load(*given, **named)
        subject.bridge.original_model.transformer.wte.weight.fill_(float("nan"))
        return subject

    monkeypatch.setattr(Subject, "load", spoiled)
    with pytest.raises(SubjectError, match=r"an activation is NaN or infinite; try subject\.dtype float32"):
        explain_all(lab, **SETTINGS)
    assert table(lab) == []


@pytest.mark.usefixtures("one_ray")
def test_the_command_gives_the_same_rows_with_ray_and_goes_on_where_it_was(
    made: Lab, finished: Lab, tmp_path: Path
) -> None:
    lab = finished.copy(tmp_path)
    explain_all(lab, **SETTINGS, explain__atoms=[20, 39])  # what a command that was killed had committed
    files = rows(lab, "select count(*) from explanations")
    version = Lake(str(lab.lake)).snapshot().version
    lab.done("explain", **SETTINGS)
    lake = Lake(str(lab.lake))
    assert files == [(20,)]
    assert table(lab) == table(made)
    assert units(lake) == {f"explain/{NAME}/{part}" for part in ("0:19", "20:39", "40:59", "60:63")}
    assert lake.snapshot().version == version + 3


@pytest.mark.long
def test_a_command_that_was_killed_goes_on_with_what_is_missing(made: Lab, finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    given = {**SETTINGS, "explain__unit_atoms": 1}
    flags = [f"--{key.replace('__', '.')}={value}" for key, value in {"lake": lab.lake, **given}.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sae.jobs.explain", str(lab.config), *flags]
    with subprocess.Popen(command, env=environment, start_new_session=True) as running:
        lake = Lake(str(lab.lake))
        while len(units(lake)) < 3 and running.poll() is None:
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGKILL)
    before = units(lake)
    assert 3 <= len(before) < 64, "it was killed midway"
    explain_all(lab, **SETTINGS)
    assert before < units(lake)
    assert table(lab) == table(made)


def units(lake: Lake) -> set[str]:
    return {unit for unit in lake.snapshot().units if unit.startswith("explain/")}


def test_a_trie_of_the_table_is_json_that_names_its_gap(made: Lab) -> None:
    for (trie,) in rows(made, "select trie from explanations"):
        assert json.loads(trie)["gap"] == SETTINGS["explain__gap"]
