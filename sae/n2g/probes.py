"""Runs what many examples want to know in full batches, whoever asks and however far each of them has come.

Sequences of a batch have one length: nothing is padded, and what a sequence gives does not depend on the others.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sae.n2g.build import Tests, Tokens
from sae.n2g.pattern import Pattern

Array = npt.NDArray[Any]

Latents = tuple[Array, Array]
"""Of one token: ascending latents [m] and their activations [m], those above zero."""
Run = Callable[[Array], list[Latents]]
"""Token ids [n, T] to the latents at the last token of each."""

ROWS: Final = 16
"""A batch has a multiple of so many sequences, where there are enough."""
_KNOWN: Final = 200_000  # sequences whose latents are kept: some 150 MB at 32 latents each


@dataclass
class _Asked:
    """An example, the atom that it is of, and what it waits for."""

    number: int
    atom: int
    tests: Tests
    wanted: list[Tokens] = field(default_factory=list)
    open: int = 0


class Prober:
    """Answers what examples ask of a subject. What was run once is known: examples of many atoms share their ends.

    batch_tokens: that are run at once.
    """

    def __init__(self, run: Run, batch_tokens: int) -> None:
        self._run, self._batch_tokens = run, batch_tokens
        self._known: dict[Tokens, Latents] = {}

    def patterns(self, examples: Iterable[tuple[int, Tests]]) -> list[Pattern | None]:
        """Those that examples come to, each of which is given by its atom and what it asks, in order."""
        if len(self._known) > _KNOWN:
            self._known.clear()
        asked = [_Asked(number, atom, tests) for number, (atom, tests) in enumerate(examples)]
        found: list[Pattern | None] = [None] * len(asked)
        waiting: dict[int, dict[Tokens, list[_Asked]]] = {}
        for one in asked:
            self._go_on(one, None, waiting, found)
        while waiting:
            length = max(waiting, key=lambda n: n * len(waiting[n]))
            for one in self._answered(length, waiting):
                self._go_on(one, self._acts(one), waiting, found)
        return found

    def _answered(self, length: int, waiting: dict[int, dict[Tokens, list[_Asked]]]) -> Iterator[_Asked]:
        """Runs a batch of one length, and gives the examples that have all they want."""
        queue = waiting[length]
        n = max(ROWS, self._batch_tokens // length // ROWS * ROWS)
        batch = list(queue)[:n]
        self._known.update(zip(batch, self._run(np.array(batch, np.int64)), strict=True))
        those = [one for sequence in batch for one in queue.pop(sequence)]
        if not queue:
            del waiting[length]
        for one in those:
            one.open -= 1
            if not one.open:
                yield one

    def _go_on(
        self,
        one: _Asked,
        acts: list[float] | None,
        waiting: dict[int, dict[Tokens, list[_Asked]]],
        found: list[Pattern | None],
    ) -> None:
        """Lets an example go on with the activations that it asked for until it wants what is not known."""
        try:
            while not one.open:
                one.wanted = one.tests.send(acts) if acts is not None else next(one.tests)
                new = [sequence for sequence in dict.fromkeys(one.wanted) if sequence not in self._known]
                for sequence in new:
                    waiting.setdefault(len(sequence), {}).setdefault(sequence, []).append(one)
                one.open = len(new)
                acts = self._acts(one) if not new else None
        except StopIteration as end:
            found[one.number] = end.value

    def _acts(self, one: _Asked) -> list[float]:
        return [_act(self._known[sequence], one.atom) for sequence in one.wanted]


def _act(latents: Latents, atom: int) -> float:
    numbers, acts = latents
    at = int(np.searchsorted(numbers, atom))
    return float(acts[at]) if at < len(numbers) and numbers[at] == atom else 0.0
