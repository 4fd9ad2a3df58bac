"""A law that measurements follow is found again."""

import itertools

import pytest
import torch

from benchmarks._scaling_law import Law, fit

GRID = [*itertools.product((2048, 8192, 32768, 131072), (8, 32, 128))]
SIZES, KS = [n for n, _ in GRID], [k for _, k in GRID]
# The paper's own, for GPT-2 small's size of it.
LAW = Law(-0.50, 0.26, -0.017, -0.042, -1.32, -0.085, 0.0)


def test_a_law_is_found_again_from_exact_errors() -> None:
    found = fit(SIZES, KS, [LAW.error(n, k) for n, k in GRID])
    assert found.residual < 1e-5
    for n, k in ((4096, 16), (65536, 64), (524288, 32)):
        assert found.error(n, k) == pytest.approx(LAW.error(n, k), rel=1e-2)


def test_noise_in_the_errors_moves_the_law_by_no_more() -> None:
    noise = torch.randn(len(GRID), generator=torch.Generator().manual_seed(1)) * 0.005
    errors = [LAW.error(n, k) * float(factor) for (n, k), factor in zip(GRID, noise.exp(), strict=True)]
    found = fit(SIZES, KS, errors)
    assert found.residual < 0.006
    for n, k in GRID:
        assert found.error(n, k) == pytest.approx(LAW.error(n, k), rel=0.02)


@pytest.mark.parametrize(("errors", "line"), [([0.1] * 5, "at least six"), ([0.1] * 5 + [0.0], "above 0")])
def test_what_gives_no_law_is_refused(errors: list[float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        fit(SIZES[:6], KS[:6], errors)
