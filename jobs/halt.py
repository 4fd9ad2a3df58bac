"""How ranks that run by themselves end after the same step: no device and no other rank is waited for in a step.

Whoever wants them to end holds all of them, so that none begins another step, asks how far they are, and names a step
that none has begun.
"""

import threading


class Halt:
    """One rank's part in it: `hold` and `end_after` are called by another thread than the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun, self._held = 0, False
        self._last: int | None = None

    def hold(self) -> int:
        """The step that was begun last, 0 before the first; the next one waits until `end_after` is called."""
        with self._changed:
            self._held = True
            return self._begun

    def end_after(self, step: int) -> None:
        """Lets the rank go on until that step, or to the end of the next where it is beyond."""
        with self._changed:
            self._last, self._held = step, False
            self._changed.notify_all()

    def begin(self, step: int) -> None:
        """To be called before each step."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held)
            self._begun = step

    def is_last(self, step: int) -> bool:
        """Whether to end after this step, which was begun."""
        with self._changed:
            return self._last is not None and step >= self._last
