"""Progress of a step: a bar with rate and time left on a terminal, one line a minute elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S: Final = 60.0


class Bar:
    """Counts done units; `note` is shown behind the rate."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit, self.done, self.note = name, total, unit, done, ""
        self._start, self._done_before = time.monotonic(), done

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        self.note = note or self.note

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second since the step began; what an earlier command did is not counted."""
        return (self.done - self._done_before) / max(self.elapsed, 1e-9)

    def line(self) -> str:
        left = (self.total - self.done) / self.rate if self.rate else 0.0
        share = f"{self.done:,}/{self.total:,} {self.unit}"
        return f"{self.name}: {share}, {self.rate:,.0f} {self.unit}/s, {left:,.0f} s left {self.note}".rstrip()


class _TerminalBar(Bar):
    def __init__(self, progress: Progress, name: str, total: int, unit: str, done: int) -> None:
        super().__init__(name, total, unit, done)
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, rate="")

    def advance(self, n: int, note: str = "") -> None:
        super().advance(n, note)
        rate = f"{self.rate:,.0f} {self.unit}/s {self.note}"
        self._progress.update(self._task, completed=self.done, rate=rate)


class _LineBar(Bar):
    _printed = 0.0

    def advance(self, n: int, note: str = "") -> None:
        super().advance(n, note)
        if self.elapsed - self._printed >= _LINE_EVERY_S:
            self._printed = self.elapsed
            say(self.line())


@contextmanager
def bar(name: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar that ends where the block ends."""
    if not sys.stderr.isatty():
        yield _LineBar(name, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        yield _TerminalBar(progress, name, total, unit, done)


def say(message: str) -> None:
    """One line for the user; standard output stays free for answers."""
    print(message, file=sys.stderr, flush=True)
