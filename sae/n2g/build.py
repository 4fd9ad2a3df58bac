"""From one example of an atom to a pattern, by runs of the subject on changed tokens.

It is a generator: it yields sequences of tokens, is sent the atom's activations at their last tokens, and returns the
pattern. Whoever drives it runs the sequences of many examples together.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sae.n2g.pattern import ANY, GAP, START, Pattern

Tokens = tuple[int, ...]
Tests = Generator[list[Tokens], list[float], Pattern | None]


@dataclass(frozen=True)
class Settings:
    """How patterns are found.

    padding: the token that replaces others
    threshold: share of an example's activation that its shortest end must have
    saliency: share of activation that a token must carry to stay in the pattern
    length: tokens of an example that are tried at most
    gap: tokens that may come between two that stay, at most; 0: only as many as in the example
    lead: first positions at which activations don't count; ends of an example get as much padding before them
    limit: tokens that the subject can run
    """

    padding: int
    threshold: float = 0.5
    saliency: float = 0.5
    length: int = 16
    gap: int = 8
    lead: int = 0
    limit: int = 1 << 30


@dataclass(frozen=True)
class _End:
    """An end of an example: tokens, of which the first `lead` are padding, and its own activation.

    whole: all of the example, so that the context begins with it.
    """

    tokens: Tokens
    lead: int
    act: float
    whole: bool


def pattern_of(tokens: Tokens, act: float, settings: Settings) -> Tests:
    """Of an example: the tokens of its context up to the one on which the atom fires, and its activation there.

    Returns None where no end of up to settings.length tokens has the share of the activation that it must have.
    """
    found = yield from _shortest(tokens, act, settings)
    if found is None:
        return None
    end, bound = found
    salient = yield from _salient(end, settings)
    elastic = yield from _elastic(end, salient, settings)
    return Pattern(_elements(end, salient, elastic, bound), end.act)


def _shortest(
    tokens: Tokens, act: float, settings: Settings
) -> Generator[list[Tokens], list[float], tuple[_End, bool] | None]:
    """The shortest end that activates the atom, also behind another token, and whether it is bound to the start.

    Only what did stand there can be. Where a longer end is needed for it than are tried, the shortest that activates
    the atom at all is taken for one that needs nothing before it.
    """
    first: _End | None = None
    for n in range(1, min(len(tokens), settings.length) + 1):
        end = yield from _end(tokens, n, act, settings)
        if end is None:
            continue
        bound = yield from _is_bound_to_start(end, act, settings)
        if end.whole or not bound:
            return end, bound
        first = first if first is not None else end
    return (first, False) if first is not None else None


def _end(tokens: Tokens, n: int, act: float, settings: Settings) -> Generator[list[Tokens], list[float], _End | None]:
    """The last n tokens, if they have the share of the activation that they must have and can be run."""
    whole = n == len(tokens)
    lead = 0 if whole else settings.lead
    end = (settings.padding,) * lead + tokens[-n:]
    if len(end) > settings.limit:
        return None
    (found,) = yield [end]
    if found < settings.threshold * act:
        # All of it has it, though it rounds otherwise than where it was encoded.
        return _End(end, lead, act, whole) if whole else None
    return _End(end, lead, found, whole)


def _is_bound_to_start(end: _End, act: float, settings: Settings) -> Generator[list[Tokens], list[float], bool]:
    """Whether the atom no longer fires where another token comes before."""
    if len(end.tokens) == settings.limit:
        return True
    (found,) = yield [(settings.padding, *end.tokens)]
    return found < settings.threshold * act


def _salient(end: _End, settings: Settings) -> Generator[list[Tokens], list[float], list[int]]:
    """Positions of the tokens that can't be replaced, ascending."""
    places = range(end.lead, len(end.tokens))
    found = yield [(*end.tokens[:at], settings.padding, *end.tokens[at + 1 :]) for at in places]
    return [at for at, act in zip(places, found, strict=True) if _is_missed(act, end, settings)]


def _is_missed(act: float, end: _End, settings: Settings) -> bool:
    """Whether what gives this activation lacks something that the end has."""
    return 1 - act / end.act >= settings.saliency


def _elastic(end: _End, salient: list[int], settings: Settings) -> Generator[list[Tokens], list[float], set[int]]:
    """Those of the salient places, but for the first, that may follow the one before at any distance up to the gap."""
    elastic = set()
    for before, at in pairwise(salient):
        own = at - before - 1
        if own > settings.gap:
            continue
        distances = sorted(set(_distances(settings.gap)) - {own}, key=lambda n: abs(n - own))
        tests = [end.tokens[: before + 1] + (settings.padding,) * n + end.tokens[at:] for n in distances]
        if not tests or max(map(len, tests)) > settings.limit:
            continue
        # The nearest distance alone first: it is a short sequence, and most fail it.
        (found,) = yield tests[:1]
        if _is_missed(found, end, settings):
            continue
        rest = yield tests[1:]
        if not any(_is_missed(act, end, settings) for act in rest):
            elastic.add(at)
    return elastic


def _distances(gap: int) -> Iterator[int]:
    """The longest one, none, and powers of two; none where there are no gaps."""
    if gap:
        yield from (gap, 0)
    n = 1
    while n < gap:
        yield n
        n *= 2


def _elements(end: _End, salient: list[int], elastic: set[int], bound: bool) -> tuple[int, ...]:
    first = 0 if bound else end.lead
    elements = [end.tokens[at] if at in salient else ANY for at in range(first, len(end.tokens))]
    for before, at in reversed(list(pairwise(salient))):
        if at in elastic:
            elements[before - first + 1 : at - first] = [GAP]
    return (*reversed(elements), *([START] if bound else []))
