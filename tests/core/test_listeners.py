"""Listeners are told of each step, on the ranks that have them, until the optimizer is closed."""

import pytest

from shardopt.errors import ClosedError
from tests.support.errors import make_optimizer, take_step

pytestmark = pytest.mark.mpi


class Note:
    """Notes what it is told."""

    def __init__(self):
        self.steps, self.num_closed = [], 0

    def after_step(self, report):
        self.steps.append((report.step, report.num_updated, "update" in report.seconds))

    def close(self):
        self.num_closed += 1


def test_a_listener_of_one_rank_is_told_of_each_step(comm):
    note = Note()
    with make_optimizer(comm) as opt:
        take_step(opt)
        if comm.rank == comm.size - 1:
            opt.listeners.append(note)
        take_step(opt)
        take_step(opt)
        assert note.num_closed == 0
    is_told = comm.rank == comm.size - 1
    assert note.steps == ([(2, 3, True), (3, 3, True)] if is_told else [])
    assert note.num_closed == is_told


def test_a_listener_may_remove_itself_and_raise(comm):
    class Once(Note):
        def after_step(self, report):
            super().after_step(report)
            opt.listeners.remove(self)
            raise KeyError("mine")

    once = Once()
    with make_optimizer(comm) as opt:
        opt.listeners.append(once)
        with pytest.raises(KeyError, match="mine"):
            take_step(opt)
        take_step(opt)
        assert opt.last_step.step == 2
    assert (once.steps, once.num_closed) == ([(1, 3, True)], 0)


def test_what_closing_a_listener_raises_holds_up_no_other_rank(comm):
    class Torn(Note):
        def close(self):
            super().close()
            raise OSError("the log is full")

    torn, note = Torn(), Note()
    opt = make_optimizer(comm)
    take_step(opt)
    if comm.rank == comm.size - 1:
        opt.listeners.extend([torn, note])
        with pytest.raises(OSError, match="the log is full"):
            opt.close()
        assert (torn.num_closed, note.num_closed) == (1, 1)
    else:
        opt.close()
    opt.close()  # it is closed everywhere
    with pytest.raises(ClosedError):
        take_step(opt)


def test_the_list_itself_is_not_replaced(comm):
    with (
        make_optimizer(comm) as opt,
        pytest.raises(AttributeError, match=r"Append to it, and remove from it\."),
    ):
        opt.listeners = []
