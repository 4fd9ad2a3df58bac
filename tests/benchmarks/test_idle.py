"""What the benchmark of live training calls idle."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks._idle import share_without

SPANS = st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(SPANS, min_size=1, max_size=12))
def test_idle_is_what_no_kernel_covers(spans: list[tuple[int, int]]) -> None:
    covered = {moment for start, end in spans for moment in range(start, end)}
    length = max(end for _, end in spans) - min(start for start, _ in spans)
    assert round(share_without(spans) * length) == length - len(covered)
