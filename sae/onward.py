"""A subject run on from its hook: what changes there is seen in the predictions, and what comes before runs once.

Shapes: B contexts, T tokens with the padding that `Subject.padded` adds, d width at the hook, D width of the residual
stream, V vocabulary, m rows.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from sae.schemas.errors import SubjectError
from sae.subject import Subject

# Hooks that are the residual stream itself, by how many blocks it has gone through more than come before theirs.
_STREAM: Final = {"hook_resid_pre": 0, "hook_in": 0, "hook_resid_post": 1, "hook_out": 1}
# Sums are taken in another order: of the largest logit, in float32 and in half precision.
_AGREES: Final = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Clean:
    """What of an unchanged run is needed to run on from the hook, for each context and position.

    encoded: [B, T, d] what an autoencoder encodes; acts: [B, T, d] what it reconstructs, the same where the subject has
    one hook, else at the output hook; entering: [B, T, D] the residual stream before the first block that runs on;
    final: [B, T, D] the stream behind the last block, of which `Onward.logits` are.
    """

    encoded: Tensor
    acts: Tensor
    entering: Tensor
    final: Tensor

    def of(self, rows: Tensor | slice) -> Self:
        """That of some contexts."""
        return type(self)(self.encoded[rows], self.acts[rows], self.entering[rows], self.final[rows])

    def followed_by(self, more: "Clean") -> "Clean":
        """That of these contexts and, behind them, of others that are as wide."""
        pairs = ((getattr(self, name), getattr(more, name)) for name in ("encoded", "acts", "entering", "final"))
        return Clean(*map(torch.cat, pairs))


class Onward:
    """The part of a subject from its hook on: from its output hook, where it has one.

    Raises SubjectError where only its first layers are loaded, its hook is in no block, or its blocks can't be run by
    themselves: that is tried, on drawn tokens.
    """

    def __init__(self, subject: Subject) -> None:
        if not subject.complete:
            raise SubjectError(
                f"{subject.model}: effects need all layers, only the first are loaded; leave out subject.layers"
            )
        hook = subject.output_hook if subject.output_hook is not None else subject.hook
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
        if match is None:
            raise SubjectError(f"subject.hook: {hook} is in no block; effects are known of hooks in blocks only")
        self._subject, self._bridge = subject, subject.bridge
        self._blocks = list(subject.bridge.blocks)
        self._is_stream = match[2] in _STREAM
        self._first = int(match[1]) + _STREAM.get(match[2], 0)
        self._in_tuple = False
        self.vocab_size = subject.vocab_size
        self._try()

    @torch.no_grad()
    def clean(self, token_ids: Tensor) -> Clean:
        """Run token_ids [B, up to T] int64, padded on the right, from the beginning to the last block."""
        kept: dict[str, Tensor] = {}

        def keep(names: list[str]) -> Callable[..., None]:
            def hook(acts: Tensor, hook: Any) -> None:
                kept.update(dict.fromkeys(names, acts))

            return hook

        points = {"encoded": self._subject.points[0], "acts": self._subject.points[-1]}
        if not self._is_stream:
            points["entering"] = self._blocks[self._first].hook_in
        names: dict[Any, list[str]] = {}  # several may be of one place
        for name, point in points.items():
            names.setdefault(point, []).append(name)
        final = self._to_last_block(
            self._subject.padded(token_ids), {point: keep(those) for point, those in names.items()}
        )
        acts = kept["acts"]
        return Clean(kept["encoded"].flatten(2), acts.flatten(2), kept.get("entering", acts), final)

    @torch.no_grad()
    def run(self, acts: Tensor, entering: Tensor) -> Tensor:
        """The stream behind the last block [B, T, D], with `acts` [B, T, d] at the hook of a clean run.

        `entering` is the clean run's; where the hook is the stream itself, acts take its place.
        """
        entering = acts if self._is_stream else entering
        if self._first == len(self._blocks):
            return entering
        ids = torch.zeros(acts.shape[:2], dtype=torch.int64, device=acts.device)
        hooks = {} if self._is_stream else {self._subject.points[-1]: _replaced_by(acts)}
        with self._entered(self._first, entering):
            return self._to_last_block(ids, hooks)

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits [m, V] of rows [m, D] of the stream behind the last block, by the model's own head."""
        ids = torch.zeros(len(final), 1, dtype=torch.int64, device=final.device)
        with self._entered(len(self._blocks), final[:, None]):
            logits: Tensor = self._bridge(ids, return_type="logits", use_cache=False)[:, 0]
        return logits

    def _to_last_block(self, ids: Tensor, hooks: Mapping[Any, Callable[..., Tensor | None]]) -> Tensor:
        def stop(acts: Tensor, hook: Any) -> None:
            raise StopAtLayerException(acts)

        last = self._blocks[-1].hook_out
        for point, hook in [*hooks.items(), (last, stop)]:
            point.add_hook(hook)
        try:
            final: Tensor = self._bridge(ids, return_type=None, use_cache=False)
        finally:
            for point in (*hooks, last):
                point.remove_hooks("fwd")
        return final

    @contextmanager
    def _entered(self, first: int, entering: Tensor) -> Iterator[None]:
        """Blocks before the first one do nothing, and the stream before it is `entering`, whatever the tokens are."""
        start = self._blocks[0]
        run = start.forward

        def entered(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(entering) if first else run(entering, *args, **kwargs)

        def passed(stream: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(stream)

        skipped = self._blocks[1:first]
        # The bridge's components hand on what is set on them to the parts that they wrap.
        vars(start)["forward"] = entered
        for block in skipped:
            vars(block)["forward"] = passed
        try:
            yield
        finally:
            for block in (start, *skipped):
                del vars(block)["forward"]  # the class' own is seen again

    def _returned(self, stream: Tensor) -> Any:
        return (stream,) if self._in_tuple else stream

    @torch.no_grad()
    def _try(self) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = self._subject.padded(torch.randint(self._subject.vocab_size, (2, 7), generator=generator))
        seen: list[bool] = []
        look = self._blocks[0].register_forward_hook(lambda _, __, output: seen.append(isinstance(output, tuple)))
        try:
            whole = self._bridge(ids, return_type="logits", use_cache=False).float()
        finally:
            look.remove()
        self._in_tuple = any(seen)
        try:
            clean = self.clean(ids)
            parts = self.logits(self.run(clean.acts, clean.entering).flatten(0, 1)).view(whole.shape).float()
            off = float((parts - whole).abs().max() / whole.abs().max())
        except Exception as error:  # models raise what they like
            raise SubjectError(self._unfit((str(error).strip() or type(error).__name__).splitlines()[0])) from error
        if not off <= _AGREES[self._bridge.cfg.dtype]:
            raise SubjectError(self._unfit(f"its logits are then off by {off:.1e} of the largest"))

    def _unfit(self, why: str) -> str:
        subject = self._subject
        return f"{subject.model} can't be run on from {subject.hook} ({why[:200]}); effects need a subject that can"


def _replaced_by(acts: Tensor) -> Callable[..., Tensor]:
    def hook(old: Tensor, hook: Any) -> Tensor:
        return acts.view_as(old)

    return hook
