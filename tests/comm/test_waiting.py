"""Waits with a deadline."""

import threading
from itertools import count

import pytest

from shardopt.comm.waiting import deadline, overdue, wait_until
from shardopt.errors import RankFailureError


def fail(waited_s):
    raise AssertionError(f"gave up after {waited_s} s")


def test_what_is_done_at_once_is_tested_once():
    tests = count()
    wait_until(lambda: next(tests) == 0, fail)
    assert next(tests) == 1


@pytest.mark.parametrize("num_tests", [1, 150, 1000])
def test_the_wait_ends_with_the_first_test_that_succeeds(num_tests):
    tests = count(1)
    wait_until(lambda: next(tests) == num_tests, lambda waited_s: None)
    assert next(tests) == num_tests + 1


def test_the_check_decides_when_to_give_up():
    times = []

    def check(waited_s):
        times.append(waited_s)
        if len(times) == 3:
            raise RankFailureError("enough")

    with pytest.raises(RankFailureError, match="enough"):
        wait_until(lambda: False, check)
    assert len(times) == 3
    assert times[0] > 0.1
    assert times == sorted(times)


def test_an_error_of_the_test_ends_the_wait():
    tests = count()
    with pytest.raises(ZeroDivisionError):
        wait_until(lambda: 1 / (300 - next(tests)) > 1, fail)


def test_a_wait_may_end_between_two_checks():
    done, checked = threading.Event(), threading.Event()

    def check(waited_s):
        checked.set()
        done.set()

    wait_until(done.is_set, check)
    assert checked.is_set()


class Recorder:
    """Keeps the messages about what is overdue."""

    def __init__(self):
        self.messages = []
        self.called = threading.Event()

    def on_overdue(self, message):
        self.messages.append(message)
        self.called.set()


def test_what_is_overdue_is_reported_to_the_policy():
    failure = Recorder()
    with deadline(0.01, "NAdam()", failure):
        assert failure.called.wait(60)
    (message,) = failure.messages
    assert message.startswith("NAdam() did not complete within 0.01 s on rank 0 on ")


def test_what_ends_in_time_is_not_reported():
    failure = Recorder()
    before = threading.active_count()
    with deadline(1000.0, "NAdam()", failure), overdue(1000.0, failure.on_overdue):
        assert threading.active_count() == before + 2
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(60)
    assert threading.active_count() == before
    assert not failure.messages
