"""Tries of many atoms as flat arrays, matched against all tokens of a corpus at once.

Shapes: t tokens of contexts that follow each other, m matches, f places of a search that are looked at together.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sae.n2g.pattern import ANY, GAP, START
from sae.n2g.trie import Trie

Array = npt.NDArray[Any]

_TOKENS: Final = 1 << 16  # that are looked at together: 1.5 MB of places, which stay in a processor's cache


class Sparse(NamedTuple):
    """Activations above zero of some atoms, [m] each: which of the atoms, which token, and how strong.

    In order of atom and token, and one of each pair at most.
    """

    atom: Array
    at: Array
    act: Array


class _Places(NamedTuple):
    """Of a search [f]: the node that was reached, the token at which it began, and the token that is looked at next."""

    node: Array
    began: Array
    next: Array

    def of(self, chosen: Array) -> "_Places":
        return _Places(*(column[chosen] for column in self))


class Compiled:
    """Predicts what the tries predict, that of atom i being `tries[i]`. Raises ValueError where their gaps differ.

    The tries are merged into one, so that what atoms have in common is looked for once.
    """

    def __init__(self, tries: Sequence[Trie]) -> None:
        gaps = {trie.gap for trie in tries}
        if len(gaps) > 1:
            raise ValueError(f"tries have gaps {sorted(gaps)}: compile those of one gap together")
        self._gap = next(iter(gaps), 0)
        nodes: list[dict[int, int]] = [{}]
        acts: list[tuple[int, int, float]] = []
        for atom, trie in enumerate(tries):
            for pattern in trie.patterns():
                acts.append((_reached(nodes, pattern.elements), atom, pattern.act))
        self._any, self._gaps, self._start = (_children(nodes, element) for element in (ANY, GAP, START))
        self._set_tokens(nodes)
        self._set_acts(sorted(acts), len(nodes))

    def _set_tokens(self, nodes: list[dict[int, int]]) -> None:
        edges = [(node, token, child) for node, children in enumerate(nodes) for token, child in children.items()]
        node, token, child = np.array([edge for edge in edges if edge[1] >= 0], np.int64).reshape(-1, 3).T
        self._stride = int(token.max(initial=-1)) + 1
        keys = node * self._stride + token
        order = np.argsort(keys)
        self._keys, self._child = keys[order], child[order]

    def _set_acts(self, acts: list[tuple[int, int, float]], n_nodes: int) -> None:
        nodes = np.array([node for node, _, _ in acts], np.int64)
        self._atom = np.array([atom for _, atom, _ in acts], np.int64)
        self._act = np.array([act for _, _, act in acts], np.float64)
        self._first = np.searchsorted(nodes, np.arange(n_nodes + 1))

    def match(self, tokens: Array, offsets: Array) -> Sparse:
        """Predictions above zero at tokens [t].

        offsets: [c + 1] where each context begins, and where the last one ends.
        """
        first = np.repeat(offsets[:-1], np.diff(offsets))  # of each token's context
        parts = [
            self._matched(tokens, first, np.arange(low, min(low + _TOKENS, len(tokens))))
            for low in range(0, len(tokens), _TOKENS)
        ]
        empty = Sparse(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
        return strongest(Sparse(*map(np.concatenate, zip(empty, *parts, strict=True))))

    def _matched(self, tokens: Array, first: Array, began: Array) -> Sparse:
        """With repetitions and in no order, those that begin at some tokens."""
        places = _Places(np.zeros_like(began), began, began)
        found = []
        while len(places.node):
            found.append(self._acts(places))
            inside = places.next >= first[places.began]
            ends = self._start[places.node]
            at_start = ~inside & (ends >= 0)
            found.append(self._acts(_Places(ends[at_start], places.began[at_start], places.next[at_start])))
            reached = [*self._stepped(places.of(inside), tokens), *self._skipped(places, first)]
            places = _together(reached)
        return Sparse(*map(np.concatenate, zip(*found, strict=True)))

    def _acts(self, places: _Places) -> Sparse:
        """What is predicted at the nodes that were reached."""
        low, high = self._first[places.node], self._first[places.node + 1]
        n = high - low
        which = np.repeat(low - (n.cumsum() - n), n) + np.arange(n.sum())
        return Sparse(self._atom[which], np.repeat(places.began, n), self._act[which])

    def _stepped(self, places: _Places, tokens: Array) -> Iterable[_Places]:
        """Over the next token, by its own edge and by that of any token."""
        read = tokens[places.next].astype(np.int64)
        keys = places.node * self._stride + read
        nearest = np.minimum(np.searchsorted(self._keys, keys), max(0, len(self._keys) - 1))
        known = (read < self._stride) & (self._keys[nearest] == keys) if len(self._keys) else np.zeros(len(read), bool)
        yield _Places(self._child[nearest[known]], places.began[known], places.next[known] - 1)
        wild = self._any[places.node]
        yield _Places(wild[wild >= 0], places.began[wild >= 0], places.next[wild >= 0] - 1)

    def _skipped(self, places: _Places, first: Array) -> Iterable[_Places]:
        """Over the tokens of a gap, none at least."""
        beyond = self._gaps[places.node]
        for n in range(self._gap + 1):
            chosen = (beyond >= 0) & (places.next - n >= first[places.began] - 1)
            if not chosen.any():
                return
            yield _Places(beyond[chosen], places.began[chosen], places.next[chosen] - n)


def strongest(found: Sparse) -> Sparse:
    """In order, and of each pair of atom and token the one with the largest activation; those of 0 go."""
    order = np.lexsort((-found.act, found.at, found.atom))
    atom, at, act = (column[order] for column in found)
    kept = np.ones(len(atom), bool)
    kept[1:] = (np.diff(atom) != 0) | (np.diff(at) != 0)
    kept &= act > 0
    return Sparse(atom[kept], at[kept], act[kept])


def _reached(nodes: list[dict[int, int]], elements: tuple[int, ...]) -> int:
    """The node of a pattern, made where it is not there."""
    node = 0
    for element in elements:
        if element not in nodes[node]:
            nodes[node][element] = len(nodes)
            nodes.append({})
        node = nodes[node][element]
    return node


def _children(nodes: list[dict[int, int]], element: int) -> Array:
    """Of each node the child by an element, -1 where it has none."""
    return np.array([children.get(element, -1) for children in nodes], np.int64)


def _together(parts: list[_Places]) -> _Places:
    """Each place once: several ways through gaps lead to the same one."""
    places = _Places(*map(np.concatenate, zip(*parts, strict=True)))
    if len(parts) == 2 or not len(places.node):  # no gap was passed
        return places
    order = np.lexsort(places)
    sorted_ = places.of(order)
    new = np.ones(len(order), bool)
    new[1:] = np.any([np.diff(column) != 0 for column in sorted_], axis=0)
    return sorted_.of(new)
