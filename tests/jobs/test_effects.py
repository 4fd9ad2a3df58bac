"""The step effects on the tiny run: its rows against plain forwards and SQL, and what makes them stale."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.jobs import checkpoints, effects
from sae.jobs.effects import Ablator
from sae.jobs.lake import Lake, connect, write_views
from sae.onward import Onward
from sae.schemas.errors import LakeError, SubjectError
from sae.schemas.viewer import EFFECTS, AtomFile, Sequence
from sae.subject import Subject
from tests.in_process import effects_all, run_of
from tests.tiny_run import NAME, Lab, sae

RANKS, VOTES = 2, 3
SETTINGS: dict[str, Any] = {
    "effects__ranks": RANKS,
    "effects__votes": VOTES,
    "effects__unit_examples": 64,
    "effects__batch_contexts": 8,
    "effects__neighbours": 4,
    "effects__logits": 5,
}
KEY = "atom, context_id, pos"


@pytest.fixture(scope="module")
def made(finished: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """With effects; not to be changed."""
    lab = finished.copy(tmp_path_factory.mktemp("made"))
    assert effects_all(lab, **SETTINGS) == 4
    write_views(Lake(str(lab.lake)))
    return lab


def rows(lab: Lab, sql: str) -> list[tuple[Any, ...]]:
    return connect(str(lab.lake)).sql(sql).fetchall()


def test_there_is_one_row_for_each_example_of_the_first_ranks(made: Lab) -> None:
    wanted = rows(made, f"select distinct {KEY} from examples where rank < {RANKS} order by all")
    assert rows(made, f"select {KEY} from effects order by all") == wanted
    assert len(wanted) > 100


def test_lists_have_an_entry_for_each_later_token(made: Lab) -> None:
    lengths = "len(loss_diff), len(kl), len(up_by_logits), len(down_tokens_by_probs)"
    joined = f"select len(token_ids) - 1 - pos, {lengths} from effects join contexts using (context_id)"
    for n_later, loss_diff, kl, up, down in rows(made, joined):
        assert (loss_diff, kl, up, down) == (n_later, n_later, VOTES * n_later, VOTES * n_later)


def test_figures_equal_a_plain_forward_that_zeroes_the_latent(made: Lab) -> None:
    config = run_of(made)
    subject = Subject.load(**config.subject.model_dump())
    autoencoder = checkpoints.load(Lake(config.lake), NAME)
    columns = "atom, pos, token_ids, effects.act, stored.act, loss_diff, kl, up_tokens_by_logits, up_by_logits"
    query = f"select {columns} from effects join contexts using (context_id) join latents as stored using ({KEY})"
    drawn = rows(made, f"{query} order by hash(atom, context_id) limit 12")
    assert len(drawn) == 12
    for atom, pos, token_ids, act, stored, loss_diff, kl, up, up_by in drawn:
        ids = torch.tensor([token_ids])

        def zero(acts: torch.Tensor, hook: Any, atom: int = atom, pos: int = pos) -> torch.Tensor:
            latents, info = autoencoder.encode(acts[0, pos])
            without = latents.clone()
            without[atom] = 0
            changed = acts.clone()
            changed[0, pos] += autoencoder.decode(without, info) - autoencoder.decode(latents, info)
            return changed

        with torch.no_grad():
            clean = subject.bridge(ids)[0]
            ablated = subject.bridge.run_with_hooks(ids, fwd_hooks=[(subject.hook, zero)])[0]
        p, q = clean.log_softmax(-1)[pos:-1], ablated.log_softmax(-1)[pos:-1]
        np.testing.assert_allclose(loss_diff, (q - p).gather(1, ids[0, pos + 1 :, None])[:, 0], atol=1e-4)
        np.testing.assert_allclose(kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
        expected = (clean - ablated)[pos:-1].topk(VOTES).values
        np.testing.assert_allclose(up_by, expected.flatten(), atol=1e-4)
        chosen = (clean - ablated)[pos:-1].gather(1, torch.tensor(up).view(-1, VOTES))
        np.testing.assert_allclose(chosen, expected, atol=1e-4)
        assert act == pytest.approx(stored, rel=2**-11)


def test_a_second_run_makes_nothing_and_more_atoms_only_what_is_missing(finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    assert effects_all(lab, **SETTINGS, effects__atoms=[3, 5]) == 1
    assert {atom for (atom,) in rows(lab, "select atom from effects")} == {3, 4, 5}
    assert effects_all(lab, **SETTINGS, effects__atoms=[4, 5]) == 0
    assert effects_all(lab, **SETTINGS) == 5
    assert effects_all(lab, **SETTINGS) == 0
    wanted = rows(lab, f"select distinct {KEY} from examples where rank < {RANKS} order by all")
    assert rows(lab, f"select {KEY} from effects order by all") == wanted
    assert lab.sae("effects", **SETTINGS).lines == [f"effects: those of {NAME} are up to date"]


def test_an_attempt_that_was_lost_and_done_again_adds_no_rows(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    config = run_of(lab, **SETTINGS)
    before = rows(lab, f"select {KEY} from effects order by all")
    source = effects._source(Lake(config.lake).snapshot(), config)
    # As another command has cut the atoms, too.
    Ablator(config, source, [(0, 15), (7, 20)], 1)({"run": [1]})
    assert rows(lab, f"select {KEY} from effects order by all") == before


def test_other_settings_replace_what_was_made_with_the_old_ones(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    effects_all(lab, **{**SETTINGS, "effects__votes": 1, "effects__kinds": ["top"]})
    wanted = rows(lab, f"select distinct {KEY} from examples where rank < {RANKS} and kind = 'top' order by all")
    assert rows(lab, f"select {KEY} from effects order by all") == wanted
    assert rows(lab, "select distinct len(up_by_logits) - len(kl) from effects") == [(0,)]


def test_text_that_is_dropped_is_in_no_effects_and_the_rest_is_made_anew(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    ((gone,),) = rows(
        lab, "select doc_id from effects join contexts using (context_id) group by all order by count(*) limit 1"
    )
    assert sae("drop", lab.lake, "--doc", str(gone)).code == 0
    for table in ("effects", "neighbours"):
        assert rows(lab, f"select count(*) from {table}") == [(0,)], "made of all latents together"
    assert rows(lab, "select count(*) > 0 from logits") == [(True,)], "made of weights alone"
    refused = lab.sae("effects", **SETTINGS)
    assert (refused.code, len(refused.lines)) == (1, 1)
    assert "run sae aggregate first" in refused.stderr
    lab.done("aggregate")
    assert effects_all(lab, **SETTINGS) > 0
    assert rows(lab, f"select count(*) from effects join contexts using (context_id) where doc_id = {gone}") == [(0,)]


def test_effects_of_examples_that_changed_meanwhile_are_not_committed(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    config = run_of(lab, **{**SETTINGS, "effects__votes": 1})
    source = effects._source(Lake(config.lake).snapshot(), config)
    ablator = Ablator(config, source, [(0, 3)], 1)
    with pytest.raises(LakeError, match="the examples of tiny changed meanwhile; run sae effects again"):
        ablator({"run": [0]})


def test_status_tells_effects_of_other_examples(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    told = f"effects of {NAME} (made of other examples)"
    assert told not in sae("status", lab.lake).stdout
    with Lake(str(lab.lake)).transaction("test") as transaction:
        transaction.set(f"aggregate/{NAME}", ["of other runs"])
    assert told in sae("status", lab.lake).stdout


def test_a_model_that_predicts_nan_is_one_line_and_leaves_no_rows(
    finished: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = finished.copy(tmp_path)
    run, of_probe = Onward.run, iter([1.0])
    monkeypatch.setattr(Onward, "run", lambda *given: run(*given) * next(of_probe, torch.nan))
    with pytest.raises(SubjectError, match=r"^effects: predictions of .* are NaN or infinite in float32; "):
        effects_all(lab, **SETTINGS)
    assert rows(lab, "select count(*) from effects") == [(0,)]


def test_dropped_latents_take_all_three_tables_along(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    assert sae("drop", lab.lake, "--latents", NAME).code == 0
    for table in ("effects", "neighbours", "logits"):
        assert rows(lab, f"select count(*) from {table}") == [(0,)]
    snapshot = Lake(str(lab.lake)).snapshot()
    assert not [key for key in (*snapshot.units, *snapshot.properties) if key.startswith(("effects/", "neighbours/"))]


def test_neighbours_equal_what_sql_gives(made: Lab) -> None:
    for atom in (3, 17):
        for kind, asked in (
            ("near", "select atom, cosine from nearest_atoms"),
            ("coactive", "select atom, pearson from coactive_atoms"),
        ):
            ours = rows(
                made, f"select neighbour, value from neighbours where atom = {atom} and kind = '{kind}' order by rank"
            )
            theirs = rows(made, f"{asked}('{NAME}', {atom}) limit 4")
            assert [neighbour for neighbour, _ in ours] == [neighbour for neighbour, _ in theirs]
            np.testing.assert_allclose([value for _, value in ours], [value for _, value in theirs], atol=1e-6)


def test_logits_are_the_direction_through_norm_and_unembedding(made: Lab) -> None:
    subject = Subject.load(**run_of(made).subject.model_dump())
    for atom, direction in rows(made, "select atom, direction from decoders where atom in (0, 40)"):
        x = torch.tensor(direction)
        logits = (x - x.mean()) * subject.bridge.ln_final.weight @ subject.bridge.W_U
        for kind, largest in (("up", True), ("down", False)):
            found = rows(
                made, f"select token_id, value from logits where atom = {atom} and kind = '{kind}' order by rank"
            )
            best = logits.topk(5, largest=largest)
            assert [token for token, _ in found] == best.indices.tolist()
            np.testing.assert_allclose([value for _, value in found], best.values.tolist(), atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"effects__atoms": [60, 64]}, "effects.atoms: got 60 to 64; autoencoder tiny has atoms 0 to 63"),
        ({"subject__hook": "blocks.0.hook_resid_pre"}, "subject.hook: autoencoder tiny"),
        ({"encode__weights": "plain"}, "encode.weights, encode.checkpoint: got plain and last,"),
    ],
)
def test_what_does_not_fit_is_one_line(finished: Lab, overrides: dict[str, Any], line: str) -> None:
    before = Lake(str(finished.lake)).snapshot().version
    result = finished.sae("effects", **overrides)
    assert (result.code, len(result.lines)) == (1, 1)
    assert line in result.stderr
    assert Lake(str(finished.lake)).snapshot().version == before


def test_nothing_encoded_is_one_line(tokenized: Lab) -> None:
    result = tokenized.sae("effects")
    assert (result.code, len(result.lines)) == (1, 1)
    assert "run sae train first" in result.stderr


@pytest.mark.usefixtures("one_ray")
def test_the_command_gives_the_same_rows_with_ray(made: Lab, finished: Lab, tmp_path: Path) -> None:
    lab = finished.copy(tmp_path)
    lab.done("effects", **SETTINGS)
    for table, order in (("effects", KEY), ("logits", "atom, kind, rank"), ("neighbours", "atom, kind, rank")):
        assert rows(lab, f"select * from {table} order by {order}") == rows(
            made, f"select * from {table} order by {order}"
        )


def test_exported_pages_with_effects_are_those_of_the_table(made: Lab, tmp_path: Path) -> None:
    lab = made.copy(tmp_path)
    effects_all(lab, **SETTINGS)
    lab.done("export", export__atoms=[0, 9])
    (folder,) = (tmp_path / "viewer").rglob("atoms")
    with_effects = {atom for (atom,) in rows(lab, "select distinct atom from effects where atom < 10")}
    assert {path.name for path in folder.iterdir()} == {
        *(f"{atom}.json" for atom in range(10)),
        *(f"{atom}-ablated.json" for atom in with_effects),
    }
    words = dict(rows(lab, "select token_id, token from vocabulary"))
    for atom in with_effects:
        plain, ablated = (
            AtomFile.model_validate_json((folder / f"{atom}{suffix}.json").read_bytes()) for suffix in ("", "-ablated")
        )
        assert ablated.model_copy(update={"top": plain.top, "random": plain.random}) == plain
        for kind in ("top", "random"):
            examples = rows(lab, f"select {KEY} from examples where atom = {atom} and kind = '{kind}' order by rank")
            for key, before, sequence in zip(examples, getattr(plain, kind), getattr(ablated, kind), strict=True):
                assert sequence.model_copy(update=dict.fromkeys(EFFECTS)) == before
                assert_entries(lab, key, sequence, words)


def assert_entries(lab: Lab, key: tuple[int, ...], sequence: Sequence, words: dict[int, str]) -> None:
    """The effects of a sequence are the table's row, entry j about token j + 1."""
    pos = key[2]
    found = rows(lab, f"select * from effects where ({KEY}) = {key}")
    if not found:
        assert sequence.ablate_loss_diff is None
        return
    columns = [column for column, *_ in connect(str(lab.lake)).sql("describe effects").fetchall()]
    row = dict(zip(columns, found[0], strict=True))
    assert sequence.ablate_loss_diff is not None
    assert sequence.kl is not None
    assert sequence.top_upvotes_logits is not None
    assert sequence.top_downvote_tokens_probs is not None
    assert len(sequence.ablate_loss_diff) == len(sequence.tokens) - 1
    assert sequence.ablate_loss_diff[:pos] == [0] * pos
    assert sequence.ablate_loss_diff[pos:] == pytest.approx(row["loss_diff"], abs=0.6e-4)
    assert sequence.kl[:pos] == [None] * pos
    assert sequence.kl[pos:] == pytest.approx(row["kl"], abs=0.6e-4)
    votes = np.array(row["up_by_logits"]).reshape(-1, VOTES)
    assert sequence.top_upvotes_logits[:pos] == [None] * pos
    np.testing.assert_allclose(np.array(sequence.top_upvotes_logits[pos:]).reshape(-1, VOTES), votes, atol=0.6e-4)
    tokens = [words[token] for token in row["down_tokens_by_probs"]]
    assert [token for each in sequence.top_downvote_tokens_probs[pos:] for token in each or []] == tokens
