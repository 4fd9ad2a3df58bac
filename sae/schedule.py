"""The learning rate's course: a pure function of the tokens seen, so that a resumed training goes on where it was."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    tokens_seen: int,
    batch_tokens: int,
    *,
    total_tokens: int,
    peak: float,
    schedule: Schedule = "constant",
    warmup_tokens: int = 0,
    decay_fraction: float = 0.0,
) -> float:
    """Learning rate of the step that trains on tokens_seen..tokens_seen + batch_tokens.

    It warms up linearly over warmup_tokens. Then `constant` stays at the peak, but for a linear fall over the last
    decay_fraction of total_tokens; `linear` and `cosine` (half a period) fall to zero over all that is left, without
    heed of decay_fraction. Never zero before total_tokens, so no batch is wasted.
    """
    warm = min(1.0, (tokens_seen + batch_tokens) / warmup_tokens) if warmup_tokens > 0 else 1.0
    falling = decay_fraction * total_tokens if schedule == "constant" else total_tokens - warmup_tokens
    left = min(1.0, max(0, total_tokens - tokens_seen) / falling) if falling > 0 else 1.0
    # A half period of cosine as a squared sine: the sum 1 + cos would round to zero in the last steps of a long run.
    share = math.sin(math.pi / 2 * left) ** 2 if schedule == "cosine" else left
    return peak * min(warm, share)
