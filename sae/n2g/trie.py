"""Patterns of one atom as a trie over tokens, read backwards: what it predicts, and how it is written as JSON."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sae.n2g.pattern import ANY, GAP, START, Pattern
from sae.schemas.errors import LakeError

_NAMES: Final = {ANY: "token(*)", GAP: "token(...)", START: "token(^)"}
_ELEMENTS: Final = {name: element for element, name in _NAMES.items()}
_ACT: Final = "act"


@dataclass
class _Node:
    act: float | None = None
    children: dict[int, "_Node"] = field(default_factory=dict)


class Trie:
    """The prediction at a position is the largest activation of the patterns that end there, 0 where there is none.

    gap: tokens that a GAP stands for at most.
    """

    def __init__(self, patterns: Iterable[Pattern] = (), gap: int = 0) -> None:
        self.gap = gap
        self._root = _Node()
        for pattern in patterns:
            self.add(pattern)

    def add(self, pattern: Pattern) -> None:
        """Of equal patterns the one with the largest activation stays."""
        node = self._root
        for element in pattern.elements:
            node = node.children.setdefault(element, _Node())
        node.act = pattern.act if node.act is None else max(node.act, pattern.act)

    def patterns(self) -> list[Pattern]:
        """The strongest first; of equally strong ones in order of their elements."""
        return sorted(_patterns(self._root, ()), key=lambda one: (-one.act, one.elements))

    def predict(self, tokens: Sequence[int]) -> list[float]:
        """The activation at each token of a context that begins with the first one."""
        return [self._best(self._root, tokens, at) for at in range(len(tokens))]

    def _best(self, node: _Node, tokens: Sequence[int], at: int) -> float:
        """Of the patterns that go on from a node with the token at `at`, which is -1 before the first."""
        found = [node.act or 0.0]
        for element, child in node.children.items():
            if element == GAP:
                found += [self._best(child, tokens, at - n) for n in range(min(self.gap, at + 1) + 1)]
            elif element == START:
                found += [child.act or 0.0] if at < 0 else []
            elif at >= 0 and element in (ANY, tokens[at]):
                found.append(self._best(child, tokens, at - 1))
        return max(found)

    def to_json(self) -> str:
        """All that `from_json` needs to predict the same."""
        return json.dumps({"gap": self.gap, "trie": _described(self._root)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Trie":
        """Raises LakeError where the text is not what `to_json` writes."""
        try:
            found = json.loads(text)
            trie = cls(gap=_gap(found["gap"]))
            trie._root = _node(found["trie"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LakeError(
                f"an explanation's trie is damaged ({type(error).__name__}: {str(error)[:80]}); make it anew with "
                "sae explain, after sae drop LAKE --latents NAME or with other settings"
            ) from None
        return trie


def _patterns(node: _Node, elements: tuple[int, ...]) -> Iterator[Pattern]:
    if node.act is not None:
        yield Pattern(elements, node.act)
    for element, child in node.children.items():
        yield from _patterns(child, (*elements, element))


def _described(node: _Node) -> dict[str, Any]:
    act = {} if node.act is None else {_ACT: node.act}
    children = sorted(node.children.items())
    return {**act, **{_NAMES.get(element) or str(element): _described(child) for element, child in children}}


def _node(found: dict[str, Any]) -> _Node:
    children = {_element(name): _node(child) for name, child in found.items() if name != _ACT}
    return _Node(_finite(found[_ACT]) if _ACT in found else None, children)


def _element(name: str) -> int:
    if name in _ELEMENTS:
        return _ELEMENTS[name]
    if not (name.isascii() and name.isdigit()):
        raise ValueError(f"no token: {name!r}")
    return int(name)


def _finite(act: Any) -> float:
    if isinstance(act, bool) or not math.isfinite(act):
        raise ValueError(f"no activation: {act!r}")
    return float(act)


def _gap(gap: Any) -> int:
    if not isinstance(gap, int) or isinstance(gap, bool) or gap < 0:
        raise ValueError(f"no gap: {gap!r}")
    return gap
