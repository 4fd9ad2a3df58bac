"""What counts as growth of memory."""

import pytest

from benchmarks.encode_memory import slope


@pytest.mark.parametrize("an_hour", [0.0, 30.0])
def test_peaks_are_no_growth_and_do_not_hide_it(an_hour: float) -> None:
    seconds = [5.0 * number for number in range(100)]
    megabytes = [400 + an_hour / 3600 * at + (90 if number % 7 == 6 else 0) for number, at in enumerate(seconds)]
    assert slope(seconds, megabytes) * 3600 == pytest.approx(an_hour, abs=1e-6)
