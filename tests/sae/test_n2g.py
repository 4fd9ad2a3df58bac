"""N2G on made-up activations: the worked examples, planted patterns, the compiled matcher against the plain trie."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.n2g.build import Settings, Tokens, pattern_of
from sae.n2g.compiled import Compiled, Sparse
from sae.n2g.pattern import ANY, GAP, START, Pattern, text
from sae.n2g.probes import Latents, Prober
from sae.n2g.scores import scores
from sae.n2g.trie import Trie
from sae.schemas.errors import LakeError

A, B, C, D, E, PADDING = range(6)
Acts = Callable[[Sequence[int]], list[float]]
"""The activation of an atom at each token."""


class Fake:
    """A subject whose atoms are functions of tokens; notes the shapes of its batches."""

    def __init__(self, *atoms: Acts) -> None:
        self.atoms = atoms
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, token_ids: Any) -> list[Latents]:
        self.shapes.append(token_ids.shape)
        return [self._last(row.tolist()) for row in token_ids]

    def _last(self, tokens: list[int]) -> Latents:
        acts = np.array([acts(tokens)[-1] for acts in self.atoms], np.float32)
        return np.flatnonzero(acts > 0), acts[acts > 0]


def explained(acts: Acts, examples: Sequence[tuple[Tokens, int]], **settings: Any) -> Trie:
    """The trie of one atom, from contexts and positions in them."""
    given = Settings(**{"padding": PADDING, "gap": 0, **settings})
    asked = [(0, pattern_of(tokens[: at + 1], acts(tokens)[at], given)) for tokens, at in examples]
    found = Prober(Fake(acts), 1024).patterns(asked)
    return Trie(filter(None, found), given.gap)


def at_each(holds: Callable[[Sequence[int], int], bool], act: float = 1.0) -> Acts:
    return lambda tokens: [act * holds(tokens, at) for at in range(len(tokens))]


first_position = at_each(lambda tokens, at: at == 0)
is_c = at_each(lambda tokens, at: tokens[at] == C)
a_before_c = at_each(lambda tokens, at: tokens[at] == C and A in tokens[:at])


def test_worked_example_first_position() -> None:
    trie = explained(first_position, [((A, B, C), 0), ((B, C, D), 0)])
    assert trie.patterns() == [Pattern((ANY, START), 1.0)]
    assert trie.predict([A, B, C]) == [1, 0, 0]
    assert trie.predict([C, B, A]) == [1, 0, 0]


def test_worked_example_one_token() -> None:
    trie = explained(is_c, [((A, B, C), 2), ((B, C, D), 1)])
    assert trie.predict([B, C]) == [0, 1]
    assert trie.predict([A, A, A]) == [0, 0, 0]
    assert trie.predict([C, B, C]) == [1, 0, 1]


APART = [((A, B, C), 2), ((B, A, C), 2), ((A, C, D), 1)]


@pytest.mark.parametrize("gap", [0, 8])
def test_worked_example_two_tokens_apart(gap: int) -> None:
    trie = explained(a_before_c, APART, gap=gap)
    assert trie.predict([B, C]) == [0, 0]
    assert trie.predict([A, C]) == [0, 1]
    assert trie.predict([A, E, C, A, C]) == [0, 0, 1, 0, 1]


def test_without_gaps_two_tokens_are_only_as_far_apart_as_in_an_example() -> None:
    assert explained(a_before_c, APART).predict([A, B, B, C]) == [0, 0, 0, 0]


def test_worked_example_nothing_to_explain() -> None:
    trie = explained(at_each(lambda tokens, at: False), [])
    assert trie.patterns() == []
    assert trie.predict([A, E, C, A, C]) == [0] * 5


def test_what_the_reference_cannot_match() -> None:
    """Two tokens with any others between them."""
    trie = explained(a_before_c, APART, gap=8)
    assert trie.predict([A, B, B, C]) == [0, 0, 0, 1]
    assert [one.elements for one in trie.patterns()] == [(C, GAP, A)]
    (alone,) = explained(a_before_c, APART[:1], gap=8).patterns()
    assert alone.elements == (C, GAP, A), "one example is enough"


def test_a_gap_is_not_seen_where_distance_matters() -> None:
    bigram = at_each(lambda tokens, at: at > 0 and (tokens[at - 1], tokens[at]) == (A, C))
    assert explained(bigram, [((B, A, C), 2)], gap=8).patterns() == [Pattern((C, A), 1.0)]
    near = at_each(lambda tokens, at: tokens[at] == C and A in tokens[max(0, at - 3) : at])
    assert explained(near, [((A, B, C), 2)], gap=8).patterns() == [Pattern((C, ANY, A), 1.0)]
    assert explained(near, [((A, B, C), 2)], gap=2).patterns() == [Pattern((C, GAP, A), 1.0)]


def test_an_exact_branch_does_not_hide_a_wildcard() -> None:
    trie = Trie([Pattern((C, B, A), 1.0), Pattern((C, ANY, D), 2.0)])
    assert trie.predict([D, B, C]) == [0, 0, 2]
    assert trie.predict([A, B, C]) == [0, 0, 1]


def test_of_equal_patterns_the_strongest_stays_whatever_their_order() -> None:
    for acts in ((1.0, 3.0, 2.0), (3.0, 1.0, 2.0)):
        assert Trie(Pattern((C,), act) for act in acts).predict([C]) == [3]


def test_an_example_that_needs_more_tokens_than_are_tried_gives_no_pattern() -> None:
    examples = [((A, B, B, B, C), 4)]
    assert explained(a_before_c, examples, length=4).patterns() == []
    assert explained(a_before_c, examples, length=5).patterns() == [Pattern((C, ANY, ANY, ANY, A), 1.0)]


def test_a_weaker_end_counts_from_half_the_activation_on() -> None:
    def acts(weak: float) -> Acts:
        return lambda tokens: [(tokens[at] == C) * (1.0 if A in tokens[:at] else weak) for at in range(len(tokens))]

    assert explained(acts(0.5), [((A, C), 1)]).patterns() == [Pattern((C,), 0.5)]
    assert explained(acts(0.49), [((A, C), 1)]).patterns() == [Pattern((C, A), 1.0)]


def test_the_padding_token_is_the_one_that_is_given() -> None:
    """An atom that fires on the padding is not explained by itself, as it would be with another one."""
    on_padding = at_each(lambda tokens, at: tokens[at] == PADDING)
    assert explained(on_padding, [((A, PADDING), 1)]).patterns() == [Pattern((ANY,), 1.0)]
    assert explained(on_padding, [((A, PADDING), 1)], padding=B).patterns() == [Pattern((PADDING,), 1.0)]


def test_ends_stand_behind_as_much_padding_as_positions_do_not_count() -> None:
    """At position 0 the subject gives something else, as at attention sinks."""
    elsewhere = at_each(lambda tokens, at: at > 0 and tokens[at] == C)
    assert explained(elsewhere, [((A, B, C), 2)], lead=1).patterns() == [Pattern((C,), 1.0)]
    second = at_each(lambda tokens, at: at == 1)
    assert explained(second, [((A, B, C), 1)], lead=1).patterns() == [Pattern((ANY, ANY, START), 1.0)]


def test_an_end_from_within_a_context_is_not_bound_to_a_start_where_it_never_stood() -> None:
    """It fires there too, for another reason than in its context: what it has before it there is looked for."""
    behind_a = at_each(lambda tokens, at: tokens[at] == C and (at == 0 or A in tokens[:at]))
    assert explained(behind_a, [((B, A, B, C), 3)]).patterns() == [Pattern((C, ANY, A), 1.0)]
    # Where that is too far away to be tried, nothing is said of what comes before.
    assert explained(behind_a, [((B, A, B, C), 3)], length=2).patterns() == [Pattern((C,), 1.0)]
    assert explained(behind_a, [((C, B), 0)]).patterns() == [Pattern((C, START), 1.0)]


def test_no_sequence_is_longer_than_the_subject_can_run() -> None:
    fake = Fake(a_before_c)
    tokens = (A, B, B, C)
    for lead in (0, 3):
        tests = pattern_of(tokens, 1.0, Settings(PADDING, gap=8, lead=lead, limit=4))
        (found,) = Prober(fake, 1024).patterns([(0, tests)])
        assert found == Pattern((C, ANY, ANY, A, START), 1.0), "it was never seen behind another token"
    assert max(length for _, length in fake.shapes) == 4


PLANTED: dict[str, tuple[Acts, set[tuple[int, ...]]]] = {
    "a token": (at_each(lambda tokens, at: tokens[at] == 7, 2.0), {(7,)}),
    "a bigram": (at_each(lambda tokens, at: at > 0 and tuple(tokens[at - 1 : at + 1]) == (3, 4), 0.5), {(4, 3)}),
    "the start of text": (at_each(lambda tokens, at: at == 0), {(ANY, START)}),
    "a token at the start": (at_each(lambda tokens, at: at == 0 and tokens[at] == 9), {(9, START)}),
    "any of three": (at_each(lambda tokens, at: tokens[at] in (5, 6, 8)), {(5,), (6,), (8,)}),
    "one, any, another": (
        at_each(lambda tokens, at: at > 1 and tokens[at] == 2 and tokens[at - 2] == 1),
        {(2, ANY, 1)},
    ),
    "one before another": (at_each(lambda tokens, at: tokens[at] == 2 and 1 in tokens[:at]), {(2, GAP, 1)}),
    "nothing": (at_each(lambda tokens, at: False), set()),
}


def test_planted_atoms_are_recovered_exactly_together() -> None:
    draw = random.Random(0)
    contexts = [tuple(draw.choices(range(12), k=10)) for _ in range(400)]
    atoms = [acts for acts, _ in PLANTED.values()]
    fake = Fake(*atoms)
    settings = Settings(padding=11, gap=8)
    real = [[acts(tokens) for tokens in contexts] for acts in atoms]
    asked, owners = [], []
    for atom, rows in enumerate(real):
        firing = [(c, at) for c, row in enumerate(rows[:200]) for at, act in enumerate(row) if act > 0]
        for c, at in firing[:24]:
            asked.append((atom, pattern_of(contexts[c][: at + 1], rows[c][at], settings)))
            owners.append(atom)
    found = Prober(fake, 256).patterns(asked)
    tries = [
        Trie((one for one, of in zip(found, owners, strict=True) if one and of == a), 8) for a in range(len(atoms))
    ]
    for trie, (name, (_, expected)) in zip(tries, PLANTED.items(), strict=True):
        assert {one.elements for one in trie.patterns()} == expected, name
    held_out, offsets = np.array(contexts[200:]).flatten(), np.arange(0, 2001, 10)
    acts = np.array([[act for row in rows[200:] for act in row] for rows in real])
    scored = scores(Compiled(tries).match(held_out, offsets), sparse(acts), np.full(len(atoms), 2000))
    scored_on = np.array([name != "nothing" for name in PLANTED])
    for each in (scored.recall, scored.precision, scored.correlation):
        np.testing.assert_allclose(each[scored_on], 1.0)
        assert np.isnan(each[~scored_on]).all()


def test_a_batch_is_full_while_there_is_work_and_nothing_is_run_twice() -> None:
    draw = random.Random(1)
    contexts = [tuple(draw.choices(range(200), k=8)) for _ in range(1200)]
    even = at_each(lambda tokens, at: at > 0 and tokens[at] % 2 == 0 and tokens[at - 1] % 2 == 0)
    fake = Fake(even)
    asked = [(0, pattern_of(c[: at + 1], 1.0, Settings(199))) for c in contexts for at in range(8) if even(c)[at]]
    Prober(fake, 512).patterns(asked)
    short = [n * length for n, length in fake.shapes if n * length < 512 - 16 * length]
    assert len(fake.shapes) > 5 * len(short), fake.shapes


def test_what_was_run_is_known_to_other_atoms_and_later_calls() -> None:
    fake = Fake(is_c, is_c)
    prober = Prober(fake, 1024)
    asked = [(atom, (A, C)) for atom in (0, 1)]
    first = prober.patterns((atom, pattern_of(tokens, 1.0, Settings(PADDING))) for atom, tokens in asked)
    n = sum(rows for rows, _ in fake.shapes)
    assert n == 3, "the token, behind padding, and padding in its place"
    again = prober.patterns((atom, pattern_of(tokens, 1.0, Settings(PADDING))) for atom, tokens in asked)
    assert again == first == [Pattern((C,), 1.0)] * 2
    assert sum(rows for rows, _ in fake.shapes) == n


acts = st.floats(2**-20, 2**10, width=32)
elements = st.lists(st.sampled_from([0, 1, 2, 3, ANY, GAP]), min_size=1, max_size=4)
patterns = st.builds(
    lambda inner, start, act: Pattern((*inner, *([START] if start else [])), act), elements, st.booleans(), acts
)
several = st.lists(patterns, max_size=6)
contexts_ = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=5)


@given(st.lists(several, max_size=3), st.integers(0, 3), contexts_)
def test_the_compiled_matcher_predicts_what_the_tries_do(
    atoms: list[list[Pattern]], gap: int, contexts: list[list[int]]
) -> None:
    tries = [Trie(each, gap) for each in atoms]
    tokens = np.concatenate(contexts)
    found = Compiled(tries).match(tokens, np.concatenate([[0], np.cumsum([len(each) for each in contexts])]))
    dense = np.zeros((len(tries), len(tokens)))
    dense[found.atom, found.at] = found.act
    assert len(found.atom) == np.count_nonzero(dense)
    assert dense.tolist() == [[act for each in contexts for act in trie.predict(each)] for trie in tries]


@given(several, st.lists(st.integers(0, 4), min_size=1, max_size=7))
def test_a_prediction_is_the_strongest_pattern_that_a_plain_search_finds(
    given_: list[Pattern], tokens: list[int]
) -> None:
    def matches(elements: tuple[int, ...], at: int) -> bool:
        if not elements:
            return True
        first, *rest = elements
        if first == START:
            return at < 0
        if first == GAP:
            return any(matches(tuple(rest), at - n) for n in range(3) if at - n >= -1)
        return at >= 0 and first in (ANY, tokens[at]) and matches(tuple(rest), at - 1)

    expected = [max([one.act for one in given_ if matches(one.elements, at)], default=0.0) for at in range(len(tokens))]
    assert Trie(given_, 2).predict(tokens) == expected


@given(several, st.integers(0, 3), contexts_)
def test_a_trie_that_was_saved_predicts_the_same(given_: list[Pattern], gap: int, contexts: list[list[int]]) -> None:
    trie = Trie(given_, gap)
    loaded = Trie.from_json(trie.to_json())
    assert (loaded.gap, loaded.patterns()) == (gap, trie.patterns())
    assert [loaded.predict(each) for each in contexts] == [trie.predict(each) for each in contexts]
    assert loaded.to_json() == trie.to_json()


@pytest.mark.parametrize(
    "damaged",
    ["", "[]", "{}", '{"gap":0}', '{"gap":-1,"trie":{}}', '{"gap":0,"trie":{"x":{}}}', '{"gap":0,"trie":{"1":2}}']
    + [f'{{"gap":0,"trie":{{"1":{{"act":{act}}}}}}}' for act in ("NaN", '"a"', "true", "null")],
)
def test_a_damaged_trie_is_one_line(damaged: str) -> None:
    with pytest.raises(LakeError, match="an explanation's trie is damaged") as error:
        Trie.from_json(damaged)
    assert "\n" not in str(error.value)


def test_tries_of_two_gaps_are_not_compiled_together() -> None:
    with pytest.raises(ValueError, match=r"tries have gaps \[0, 1\]"):
        Compiled([Trie(gap=0), Trie(gap=1)])


def test_a_pattern_reads_as_its_text_does() -> None:
    words = {1: " rate", 2: " interest"}
    assert text((1, 2), words) == " interest rate"
    assert text((1, ANY, GAP, 9, START), words) == "[^][9][...][*] rate"


def sparse(dense: Any) -> Sparse:
    atom, at = np.nonzero(dense)
    return Sparse(atom, at, dense[atom, at])


def test_scores_are_those_of_dense_arrays() -> None:
    draw = np.random.default_rng(0)
    shape = (5, 300)
    both = [draw.random(shape) * (draw.random(shape) < share) for share in (0.1, 0.2)]
    both[0][3], both[1][4], both[0][2] = 0, 0, both[1][2]
    predicted, real = (sparse(dense) for dense in both)
    found = scores(predicted, real, np.full(5, 300))
    on = [dense > 0 for dense in both]
    assert found.n_predicted.tolist() == on[0].sum(axis=1).tolist()
    assert found.n_active.tolist() == on[1].sum(axis=1).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.precision, (on[0] & on[1]).sum(axis=1) / on[0].sum(axis=1))
        np.testing.assert_allclose(found.recall, (on[0] & on[1]).sum(axis=1) / on[1].sum(axis=1))
    for atom in (0, 1, 2):
        assert found.correlation[atom] == pytest.approx(np.corrcoef(both[0][atom], both[1][atom])[0, 1])
    assert np.isnan(found.correlation[3:]).all()
