"""When threads should read: after three slow reads in a row, and not for longer than needed."""

import pytest

from keras_remote_airflow.core.slow_reads import SlowReads

FAST, SLOW = 0.001, 0.1


@pytest.fixture
def reads():
    return SlowReads(slow_read_seconds=0.01, reads_by_threads=8)


def by_threads(reads: SlowReads) -> int:
    """Return how many reads threads make before one is measured again."""
    count = 0
    while reads.threads_should_read:
        reads.read_by_threads(1)
        count += 1
    return count


def test_at_first_no_threads_read(reads):
    assert not reads.threads_should_read


def test_three_slow_reads_in_a_row_are_a_slow_disk(reads):
    for _ in range(2):
        reads.note(SLOW)
        assert reads.last_was_slow
        assert not reads.threads_should_read
    reads.note(SLOW)
    assert reads.threads_should_read


def test_slow_reads_with_fast_ones_in_between_are_no_slow_disk(reads):
    for seconds in (SLOW, SLOW, FAST) * 5:
        reads.note(seconds)
        assert not reads.threads_should_read
    assert not reads.last_was_slow


def test_one_measured_read_tells_whether_the_disk_is_still_slow(reads):
    for _ in range(3):
        reads.note(SLOW)
    assert by_threads(reads) == 8
    reads.note(SLOW)
    assert by_threads(reads) == 16
    reads.note(SLOW)
    assert by_threads(reads) == 32


def test_fast_read_ends_it_and_the_next_slow_disk_starts_anew(reads):
    for _ in range(4):
        reads.note(SLOW)
        by_threads(reads)
    reads.note(FAST)
    assert not reads.threads_should_read
    for _ in range(3):
        reads.note(SLOW)
    assert by_threads(reads) == 8


def test_reads_measured_together_count_with_their_mean():
    reads = SlowReads(slow_read_seconds=0.05, reads_by_threads=8)
    reads.note(0.4, reads=4)
    assert reads.last_was_slow
    reads.note(0.1, reads=4)
    assert not reads.last_was_slow
