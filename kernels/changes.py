"""What differs between two predictions of the next token: losses, KL, and the tokens that change most.

Shapes: u clean rows, m ablated ones, V vocabulary, v votes, b blocks of columns, G groups of columns.

A row has tens of thousands of columns, and every pass over it in float32 costs more than the subject's own blocks. The
kernels read it twice and keep only sums and the extremes of groups: the v largest lie in the v groups with the largest
maxima, so those alone are looked at again.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels._arguments import expect
from sae.kernels.compiled import Compiled
from sae.kernels.dispatch import use_triton
from sae.kernels.extremes import extremes

_MEMBERS: Final = 32
_GROUPS: Final = 128  # of a block; neighbours are in different groups, which one instruction compares
_BLOCK: Final = _MEMBERS * _GROUPS
_WARPS: Final = 8


class Changes(NamedTuple):
    """What ablation changes in the predictions of p tokens, clean - ablated.

    loss_diff: [p] of the token that follows, in nats, negative where the atom helped; kl: [p] KL(clean || ablated), in
    nats; the others: [p, v] the tokens int64 whose logits or probabilities the atom raises (up) or lowers (down) most,
    and by how much. In float32 they are good to about 1e-6; a subject in half precision rounds far more.
    """

    loss_diff: Tensor
    kl: Tensor
    up_tokens_by_logits: Tensor
    up_by_logits: Tensor
    down_tokens_by_logits: Tensor
    down_by_logits: Tensor
    up_tokens_by_probs: Tensor
    up_by_probs: Tensor
    down_tokens_by_probs: Tensor
    down_by_probs: Tensor


def changes(clean: Tensor, ablated: Tensor, shared: Tensor, following: Tensor, votes: int) -> Changes:
    """Of logits, clean [u, V] and ablated [m, V], each of which has the clean ones `shared` [m]: in order, all of them.

    following: [m] the tokens that are predicted. Of votes that are equal any comes first.

    Raises ValueError when shapes or types disagree.
    """
    form = "clean [u, V] float, ablated [m, V] float, shared [m] int, following [m] int"
    expect("changes", form, clean, ablated, shared, following)
    of = _changes_triton if use_triton(clean, ablated) and len(ablated) else _changes_torch
    return of(clean.contiguous(), ablated.contiguous(), shared, following, votes)


def _changes_torch(clean: Tensor, ablated: Tensor, shared: Tensor, following: Tensor, votes: int) -> Changes:
    log_clean, log_ablated = (logits.log_softmax(dim=-1, dtype=torch.float32) for logits in (clean, ablated))
    # Logits are log-probabilities but for a number that all tokens share.
    shift = (clean[:, 0] - log_clean[:, 0])[shared] - (ablated[:, 0] - log_ablated[:, 0])
    diff = _spread(log_clean, shared) - log_ablated
    loss_diff = -diff.gather(1, following[:, None]).squeeze(1)
    up, up_by, down, down_by = _votes(diff, votes)
    probs = _spread(log_clean.exp_(), shared)
    kl = torch.linalg.vecdot(probs, diff).clamp_(min=0)
    by_probs = _votes(torch.sub(probs, log_ablated.exp_(), out=diff), votes)
    return Changes(loss_diff, kl, up, up_by + shift[:, None], down, down_by + shift[:, None], *by_probs)


def _spread(rows: Tensor, shared: Tensor) -> Tensor:
    """rows[shared], in ascending order and with each row at least once: no copy where it is each exactly once."""
    return rows if len(rows) == len(shared) else rows[shared]


def _votes(scores: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The n largest of each row of [m, V] and where they are, [m, n] each, and the same of the n smallest."""
    return *extremes(scores, n, largest=True), *extremes(scores, n, largest=False)


def _changes_triton(clean: Tensor, ablated: Tensor, shared: Tensor, following: Tensor, votes: int) -> Changes:
    rows, width = ablated.shape
    blocks = triton.cdiv(width, _BLOCK)
    of_clean, of_ablated = _log_norms(clean), _log_norms(ablated)
    kl = ablated.new_empty(rows, blocks, dtype=torch.float32)
    # Of the differences of log-probabilities the largest and the smallest, and the same of probabilities.
    found = ablated.new_empty(rows, blocks, 4, _GROUPS, dtype=torch.float32)
    _compare_kernel[rows, blocks](
        clean, ablated, shared, of_clean, of_ablated, kl, found, width, _MEMBERS, _GROUPS, num_warps=_WARPS
    )
    pairs = _Pairs(clean, ablated, shared, of_clean, of_ablated)
    votes = min(votes, width)
    lists = [
        pairs.votes(found[:, :, number].flatten(1), votes, by_probs=number > 1, largest=number % 2 == 0)
        for number in range(4)
    ]
    loss_diff = -pairs.scores(following[:, None], by_probs=False).squeeze(1)
    shift = (of_clean[shared] - of_ablated)[:, None]
    by_logits = [(tokens, scores + shift) for tokens, scores in lists[:2]]
    parts = [tensor for pair in (*by_logits, *lists[2:]) for tensor in pair]
    return Changes(loss_diff, kl.sum(dim=1).clamp_(min=0), *parts)


class _Pairs(NamedTuple):
    """Each ablated row beside its clean one, with the logarithms of what norms their probabilities."""

    clean: Tensor
    ablated: Tensor
    shared: Tensor
    of_clean: Tensor
    of_ablated: Tensor

    def scores(self, columns: Tensor, *, by_probs: bool) -> Tensor:
        """Differences [m, c] at columns [m, c], clean - ablated: of log-probabilities, or of probabilities."""
        clean = self.clean[self.shared[:, None], columns].float() - self.of_clean[self.shared][:, None]
        ablated = self.ablated.gather(1, columns).float() - self.of_ablated[:, None]
        return clean.exp() - ablated.exp() if by_probs else clean - ablated

    def votes(self, groups: Tensor, n: int, *, by_probs: bool, largest: bool) -> tuple[Tensor, Tensor]:
        """The n columns [m, n] with the most extreme differences, given those of all groups [m, G], and these."""
        width = self.clean.shape[1]
        chosen = groups.topk(min(n, groups.shape[1]), largest=largest, sorted=False).indices
        first = chosen // _GROUPS * _BLOCK + chosen % _GROUPS
        steps = _GROUPS * torch.arange(_MEMBERS, device=groups.device)
        columns = (first[:, :, None] + steps).flatten(1)
        scores = self.scores(columns.clamp(max=width - 1), by_probs=by_probs)
        scores = scores.masked_fill(columns >= width, -torch.inf if largest else torch.inf)
        best = scores.topk(n, largest=largest)
        return columns.gather(1, best.indices), best.values


def _log_norms(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of each row: [m] float32."""
    rows, width = logits.shape
    blocks = triton.cdiv(width, _BLOCK)
    parts = logits.new_empty(rows, blocks, dtype=torch.float32)
    _norm_kernel[rows, blocks](logits, parts, width, _BLOCK, num_warps=_WARPS)
    return parts.logsumexp(dim=1)


@triton.jit
def _norm_kernel(logits_ptr, parts_ptr, width, BLOCK: tl.constexpr):
    """Logarithm of the sum of exponentials of a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * width + column, mask=column < width, other=float("-inf")).to(tl.float32)
    most = tl.max(logits, axis=0)
    below = tl.sum(tl.exp(logits - most), axis=0)
    tl.store(parts_ptr + row * tl.num_programs(1) + block, most + tl.log(below))


@triton.jit
def _compare_kernel(
    clean_ptr, ablated_ptr, shared_ptr, of_clean_ptr, of_ablated_ptr, kl_ptr, found_ptr, width,
    MEMBERS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Of a block of a pair of rows its part of the KL divergence, and the extremes of each group."""
    pair = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    group = tl.arange(0, GROUPS)
    column = block * MEMBERS * GROUPS + tl.arange(0, MEMBERS)[:, None] * GROUPS + group[None, :]
    inside = column < width
    source = tl.load(shared_ptr + pair).to(tl.int64)
    clean = tl.load(clean_ptr + source * width + column, mask=inside, other=0.0).to(tl.float32)
    ablated = tl.load(ablated_ptr + pair * width + column, mask=inside, other=0.0).to(tl.float32)
    clean -= tl.load(of_clean_ptr + source)
    ablated -= tl.load(of_ablated_ptr + pair)
    by_logits = clean - ablated
    probs = tl.exp(clean)
    by_probs = probs - tl.exp(ablated)
    terms = tl.where(inside, probs * by_logits, 0.0)
    tl.store(kl_ptr + pair * blocks + block, tl.sum(tl.sum(terms, axis=0), axis=0))
    least, most = float("-inf"), float("inf")
    at = found_ptr + (pair * blocks + block) * 4 * GROUPS + group
    tl.store(at, tl.max(tl.where(inside, by_logits, least), axis=0))
    tl.store(at + GROUPS, tl.min(tl.where(inside, by_logits, most), axis=0))
    tl.store(at + 2 * GROUPS, tl.max(tl.where(inside, by_probs, least), axis=0))
    tl.store(at + 3 * GROUPS, tl.min(tl.where(inside, by_probs, most), axis=0))


COMPILED = [
    variant
    # Widths of vocabularies that are multiples of 16, and others.
    for dtype, width in (("bf16", "i32:16"), ("bf16", "i32"), ("fp16", "i32:16"), ("fp32", "i32"))
    for variant in (
        Compiled(_norm_kernel, f"*{dtype}, *fp32, {width}", {"BLOCK": _BLOCK}, num_warps=_WARPS),
        Compiled(
            _compare_kernel,
            f"*{dtype}, *{dtype}, *i64, *fp32, *fp32, *fp32, *fp32, {width}",
            {"MEMBERS": _MEMBERS, "GROUPS": _GROUPS},
            num_warps=_WARPS,
        ),
    )
]
