"""Stage histograms: what they count, on any number of threads, and what a quantile means."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfsd.stages import BUCKETS, NOTHING, Histogram, Latencies, Recorder, bucket_of, upper_bound

LONG = upper_bound(BUCKETS - 1)


@given(st.floats(min_value=2**-20, max_value=LONG * 0.99))
def test_a_bucket_is_right_to_within_a_fifth(seconds: float) -> None:
    bound = upper_bound(bucket_of(seconds))
    assert seconds < bound <= seconds * 1.25


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-12])
def test_what_is_too_short_to_measure_is_counted_in_the_first_bucket(seconds: float) -> None:
    assert bucket_of(seconds) == 0


@given(st.lists(st.floats(min_value=0, max_value=1000), min_size=1))
def test_everything_is_counted_and_quantiles_bound_what_they_should(values: list[float]) -> None:
    histogram = Histogram()
    for seconds in values:
        histogram.add(seconds)
    found = histogram.snapshot()
    assert found.count == len(values)
    assert found.seconds == pytest.approx(sum(values))
    assert found.octaves()[-1] == (LONG, len(values))
    for share in (0.5, 0.99):
        bound = found.quantile(share)
        covered = sum(seconds < bound or bound == LONG for seconds in values)
        assert covered >= share * len(values)
    assert Latencies.from_json(found.as_json()) == found


def test_a_difference_is_what_came_later() -> None:
    histogram = Histogram()
    histogram.add(0.001)
    before = histogram.snapshot()
    histogram.add(2.0)
    spent = histogram.snapshot().since(before)
    assert spent.count == 1
    assert spent.seconds == pytest.approx(2.0)
    assert 2.0 < spent.quantile(0.5) <= 2.5
    assert before.since(before) == NOTHING
    assert NOTHING.quantile(0.99) == 0.0


def test_no_count_is_lost_among_threads() -> None:
    recorder = Recorder(["read", "write"])
    together = threading.Barrier(8)

    def work(_: int) -> None:
        together.wait()
        for _ in range(2000):
            recorder.note("read", 0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = recorder.snapshot()
    assert found["read"].count == 16_000
    assert found["write"] == NOTHING
    assert list(found) == ["read", "write"]


def test_a_thread_takes_over_the_histograms_of_one_that_ended() -> None:
    recorder = Recorder(["read"])
    for _ in range(50):
        thread = threading.Thread(target=recorder.note, args=("read", 0.5))
        thread.start()
        thread.join()
    assert recorder.snapshot()["read"].count == 50
    assert recorder.threads_at_once < 5


def test_a_stage_that_is_not_listed_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="lunch is not a stage"):
        Recorder(["read"]).note("lunch", 1.0)
