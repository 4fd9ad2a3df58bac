"""The JSON files that the viewer reads, as models: what an export holds, and nothing else.

An atom's file is `{path}/atoms/{atom}.json`. `{atom}-ablated.json`, where there is one, replaces it whole:
the same model, with the effects of ablating the atom in its sequences. Numbers are finite; activations and
widths have the unit of the autoencoder's latents.
"""

import itertools
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from sae.schemas.origin import Count, Exported, Strict

Density = Annotated[float, Field(ge=0, le=1)]
Activation = Annotated[float, Field(ge=0)]
Bin = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
Votes = list[list[float] | None]
VoteTokens = list[list[str] | None]


class Sequence(Strict):
    """A context with the atom's activation at every token; it was chosen for `act`, at position `idx`.

    `density` is the part of the positions with an activation > 0. Effects are optional: entry j of each is
    about token j + 1, and entries up to `idx` may be null, except in `ablate_loss_diff`.
    """

    tokens: list[str] = Field(min_length=1)
    acts: list[Activation]
    act: Activation
    idx: Count
    doc_id: int | str
    density: Density
    token_ints: list[Count]

    ablate_loss_diff: list[float] | None = None
    kl: list[float | None] | None = None
    top_upvotes_logits: Votes | None = None
    top_downvotes_logits: Votes | None = None
    top_upvotes_probs: Votes | None = None
    top_downvotes_probs: Votes | None = None
    top_upvote_tokens_logits: VoteTokens | None = None
    top_downvote_tokens_logits: VoteTokens | None = None
    top_upvote_tokens_probs: VoteTokens | None = None
    top_downvote_tokens_probs: VoteTokens | None = None

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        n = len(self.tokens)
        if not n == len(self.acts) == len(self.token_ints):
            raise ValueError(f"{n} tokens, but {len(self.acts)} acts and {len(self.token_ints)} token_ints")
        if self.idx >= n:
            raise ValueError(f"idx is {self.idx}, but there are {n} tokens")
        if self.act != self.acts[self.idx]:
            raise ValueError(f"act is {self.act}, but acts[{self.idx}] is {self.acts[self.idx]}")
        for name in EFFECTS & self.model_fields_set:
            self._check_effect(name, n - 1)
        return self

    def _check_effect(self, name: str, length: int) -> None:
        entries = getattr(self, name)
        if entries is None or len(entries) != length:
            found = "null" if entries is None else f"of length {len(entries)}"
            raise ValueError(f"{name} is {found}, expected length {length}, one less than tokens")
        if None in entries[self.idx + 1 :]:
            raise ValueError(f"{name} has a null after idx {self.idx}")


_PLAIN: Final = frozenset({"tokens", "acts", "act", "idx", "doc_id", "density", "token_ints"})
EFFECTS: Final = frozenset(Sequence.model_fields) - _PLAIN


class AtomFile(Strict):
    """One atom: its statistics over all tokens, zeros included, its histogram and its example sequences.

    `mean_act` = E[a], `mean_act_squared` = E[a^2], `skew` = E[a^3] / E[a^2]^1.5, `kurtosis` =
    E[a^4] / E[a^2]^2, null where there is no value. `hist` counts activations > 0 by bin ceil(a / bin_width).
    `top` are contexts by falling activation, `random` a uniform sample of the activations > 0.
    """

    density: Density
    mean_act: float | None
    mean_act_squared: float | None
    skew: float | None
    kurtosis: float | None
    hist: dict[Bin, Annotated[int, Field(ge=1)]]
    top: list[Sequence]
    random: list[Sequence]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        counted = sum(self.hist.values())
        if (self.density > 0) != (counted > 0):
            raise ValueError(f"density is {self.density}, but hist counts {counted} activations")
        for name, sequences in (("top", self.top), ("random", self.random)):
            if len(sequences) > counted:
                raise ValueError(f"{name} has {len(sequences)} sequences, but hist counts {counted} activations")
        if any(lower.act > higher.act for higher, lower in itertools.pairwise(self.top)):
            raise ValueError("top is not in order of falling act")
        return self


class Manifest(Exported):
    """What the files of one folder were made from."""

    format: Literal["openai", "saedashboard", "neuronpedia"] = "openai"
    decimals: Count
