"""A pattern of tokens, read backwards from the token on which an atom fires."""

from collections.abc import Mapping
from typing import Final, NamedTuple

ANY: Final = -1
"""One token, whichever."""
GAP: Final = -2
"""Any tokens, from none up to the trie's gap."""
START: Final = -3
"""Before the first token of a context."""

_WORDS: Final = {ANY: "[*]", GAP: "[...]", START: "[^]"}


class Pattern(NamedTuple):
    """elements: token ids, ANY, GAP and START, the last token first; START only as the last of them.

    act: the activation that it predicts.
    """

    elements: tuple[int, ...]
    act: float


def text(elements: tuple[int, ...], tokens: Mapping[int, str]) -> str:
    """The elements as one reads them, with the strings of tokens; a token that has none is told by its id."""
    return "".join(_WORDS.get(one) or tokens.get(one, f"[{one}]") for one in reversed(elements))
