"""The learning rate as laws: what holds for every schedule, and what tells them apart."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sae.schedule import Schedule, learning_rate

PEAK = 3e-4
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


class Case(NamedTuple):
    schedule: Schedule
    total: int
    batch: int
    warmup: int
    decay: float

    def at(self, tokens: int) -> float:
        return learning_rate(
            tokens,
            self.batch,
            total_tokens=self.total,
            peak=PEAK,
            schedule=self.schedule,
            warmup_tokens=self.warmup,
            decay_fraction=self.decay,
        )

    def course(self) -> list[float]:
        """The rate of every step."""
        return [self.at(tokens) for tokens in range(0, self.total, self.batch)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(2, 2**20))
    total = draw(st.integers(batch, 60 * batch))
    return Case(draw(st.sampled_from(SCHEDULES)), total, batch, draw(st.integers(0, 2 * total)), draw(st.floats(0, 1)))


@given(cases())
def test_no_step_is_wasted_and_none_exceeds_the_peak(case: Case) -> None:
    assert all(0 < rate <= PEAK for rate in case.course())


@given(cases())
def test_it_rises_in_the_warm_up_and_never_after_it(case: Case) -> None:
    assume(case.schedule != "constant" or case.decay == 0)  # its decay may begin in the warm-up
    course = case.course()
    warm = next((step for step, rate in enumerate(course) if rate == PEAK), len(course) - 1)
    assert all(a < b for a, b in pairwise(course[: warm + 1]))
    assert all(a >= b for a, b in pairwise(course[warm:]))


@given(cases())
def test_the_peak_is_reached_where_the_run_outlasts_the_warm_up(case: Case) -> None:
    assume(case.warmup + case.batch <= case.total * (1 - case.decay if case.schedule == "constant" else 1))
    assert max(case.course()) == PEAK


@given(cases(), st.integers(0, 10**6))
def test_a_resumed_run_goes_on_with_the_same_rates(case: Case, at: int) -> None:
    course = case.course()
    step = at % len(course)
    resumed = [case.at(tokens) for tokens in range(step * case.batch, case.total, case.batch)]
    assert resumed == course[step:]


@given(cases())
def test_linear_and_cosine_fall_to_zero_evenly_about_half_the_way(case: Case) -> None:
    """And both courses are point-symmetric about half the way, where they are at half of the peak."""
    assume(case.schedule != "constant" and case.warmup < case.total)
    assert case.at(case.total) == 0
    case = case._replace(batch=2 * case.total)  # warm from the first step on
    half = (case.warmup + case.total) // 2
    mirrored = case.at(case.warmup + case.total - half)
    assert case.at(half) + mirrored == pytest.approx(PEAK, rel=1e-9)


def test_the_courses() -> None:
    def course(schedule: Schedule, decay: float = 0.0) -> list[float]:
        case = Case(schedule, 1000, 100, 200, decay)
        return [rate / PEAK for rate in case.course()]

    assert course("constant") == [0.5, *[1.0] * 9]
    assert course("constant", 0.2) == pytest.approx([0.5, *[1.0] * 8, 0.5])
    assert course("linear") == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    half_period = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert course("cosine") == pytest.approx([0.5, 1, *half_period])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_steps_of_a_very_long_run_still_learn(schedule: Schedule) -> None:
    case = Case(schedule, 10**12, 2, 10**6, 0.3)
    assert 0 < case.at(10**12 - 2) < 1e-8 * PEAK


@given(cases(), st.integers(0, 2**26))
def test_a_constant_rate_is_bitwise_what_it_was_before_there_were_schedules(case: Case, tokens: int) -> None:
    """So that a training begun earlier goes on with the same bits."""
    case = case._replace(schedule="constant")
    warm = min(1.0, (tokens + case.batch) / case.warmup) if case.warmup > 0 else 1.0
    decay_tokens = case.decay * case.total
    left = max(0, case.total - tokens)
    assert case.at(tokens) == PEAK * min(warm, left / decay_tokens if decay_tokens > 0 else 1.0, 1.0)
