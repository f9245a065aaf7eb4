"""A run's checkpoints: written beside the steps, kept, found, and asked for by signals."""

import os
import signal

import numpy as np
import pytest

from shardopt.checkpoint import Checkpointer, Restored, load
from shardopt.errors import CheckpointError, RankMismatchError
from tests.support.errors import BOTH_WAYS, errs, is_last, refused
from tests.support.models import build, content, params_of, train

pytestmark = pytest.mark.mpi

BOTH_KINDS = pytest.mark.parametrize("asynchronous", [True, False], ids=["beside", "at once"])


def names(comm, folder):
    """What is in a folder, by rank 0's eyes."""
    return comm.bcast(sorted(path.name for path in folder.iterdir()) if comm.rank == 0 else None)


def step_until_saved(comm, opt, checkpointer, step):
    """Train, from step number 100 on, until ``step`` is among the checkpoints."""
    number = 100
    while not comm.bcast(step in checkpointer.steps()):
        train(opt, [number])
        number += 1


@BOTH_KINDS
def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(comm, mpi_tmp_path, asynchronous):
    with build(comm) as opt, Checkpointer(mpi_tmp_path, asynchronous=asynchronous) as checkpointer:
        train(opt, range(2))
        saved, extra = content(opt), {"x": np.zeros(1000), "per_rank": [comm.rank]}
        checkpointer.save(2, opt, extra)
        extra["x"][:] = 1
        extra["per_rank"][0] = -1
        train(opt, range(2, 6))
        checkpointer.wait()
        with build(comm, seed=3) as other:
            restored = checkpointer.restore(other)
            assert content(other) == saved
        assert restored.step == 2
        assert restored.path == mpi_tmp_path / "step-000000000002"
        assert not restored.extra["x"].any()
        assert restored.extra["per_rank"] == [[rank] for rank in range(comm.size)]


def test_steps_alone_bring_a_save_to_its_end(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        for step in 5, 6:
            checkpointer.save(step, opt)
            step_until_saved(comm, opt, checkpointer, step)
        assert names(comm, mpi_tmp_path) == ["step-000000000005", "step-000000000006"]


@BOTH_KINDS
def test_the_last_are_kept(comm, mpi_tmp_path, asynchronous):
    with build(comm) as opt, Checkpointer(mpi_tmp_path, 2, asynchronous) as checkpointer:
        for step in 1, 5, 20, 30:
            checkpointer.save(step, opt)
        checkpointer.wait()
        assert checkpointer.steps() == [20, 30]
        assert names(comm, mpi_tmp_path) == ["step-000000000020", "step-000000000030"]
        checkpointer.save(3, opt)  # after going back: the newest save stays, whatever its step
        checkpointer.wait()
        assert checkpointer.steps() == [3, 20, 30]


def test_all_are_kept(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path, keep_last=None) as checkpointer:
        for step in range(5):
            checkpointer.save(step, opt)
    assert Checkpointer(mpi_tmp_path).steps() == [0, 1, 2, 3, 4]


def test_a_step_that_is_there_is_saved_beside_it(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        checkpointer.save(7, opt)
        train(opt, range(2))
        checkpointer.save(7, opt)
        checkpointer.wait()
        assert names(comm, mpi_tmp_path) == ["step-000000000007", "step-000000000007.1"]
        assert checkpointer.steps() == [7]
        with build(comm, seed=3) as other:
            assert checkpointer.restore(other).path.name == "step-000000000007.1"
            assert content(other) == content(opt)


def test_a_chosen_step_is_restored_or_none(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        for step in 1, 2:
            train(opt, [step])
            checkpointer.save(step, opt)
        with build(comm, seed=3) as other:
            assert checkpointer.restore(other, step=1).step == 1
            assert other.last_step.step == 1
            before = content(other)
            with refused(comm, CheckpointError, "a checkpoint of step 9 that can be loaded"):
                checkpointer.restore(other, step=9)
            assert content(other) == before


def test_there_may_be_nothing_to_restore(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path / "new") as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.restore(opt) is None
        checkpointer.wait()
        checkpointer.save(1, opt)
    assert Checkpointer(mpi_tmp_path / "new").steps() == [1]


def test_a_closed_optimizer_has_its_last_checkpoint(comm, mpi_tmp_path):
    checkpointer = Checkpointer(mpi_tmp_path)
    with build(comm) as opt:
        train(opt, range(2))
        checkpointer.save(1, opt)
        saved = content(opt)
    assert comm.bcast(checkpointer.steps()) == [1]
    checkpointer.close()
    with build(comm, seed=3) as other:
        load(mpi_tmp_path / "step-000000000001", other)
        assert content(other) == saved


def test_several_optimizers_take_turns(comm, mpi_tmp_path):
    with build(comm) as first, build(comm, seed=1) as second:
        one, two = Checkpointer(mpi_tmp_path / "one"), Checkpointer(mpi_tmp_path / "two")
        one.save(1, first)
        two.save(1, second)
        train(first, range(3))
        two.save(2, second)
        step_until_saved(comm, first, one, 1)
        one.close()
        two.close()
        assert two.steps() == [1, 2]


def test_memory_is_used_again_and_grows(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path, keep_last=1) as checkpointer:
        for step, size in enumerate((10, 3_000_000, 10)):
            checkpointer.save(step, opt, {"per_rank": np.full(size, comm.rank, np.uint8)})
            checkpointer.wait()
            for rank, array in enumerate(checkpointer.restore(opt).extra["per_rank"]):
                np.testing.assert_array_equal(array, np.full(size, rank))


@BOTH_WAYS
@pytest.mark.parametrize("step", [-1, 2.5, "7", None, True])
def test_a_step_is_a_whole_number(comm, mpi_tmp_path, step, alone):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        with refused(comm, CheckpointError, f"step must be a whole number >= 0; got {step!r}",
                     alone=alone):  # fmt: skip
            checkpointer.save(step if errs(comm, alone) else 1, opt)
        checkpointer.save(np.int64(4), opt)
        checkpointer.wait()
        assert names(comm, mpi_tmp_path) == ["step-000000000004"]


@pytest.mark.parametrize("keep_last", [0, -1, 2.0, "3", True])
def test_keep_last_is_a_positive_number(keep_last):
    with pytest.raises(CheckpointError, match="keep_last must be a whole number >= 1 or None"):
        Checkpointer("x", keep_last=keep_last)


@pytest.mark.mpi(min_size=2)
def test_ranks_save_the_same_step_into_the_same_folder(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        with refused(comm, RankMismatchError, "step must be the same on every rank"):
            checkpointer.save(4 if is_last(comm) else 3, opt)
        elsewhere = Checkpointer(mpi_tmp_path / str(comm.rank))
        with refused(comm, RankMismatchError, "folder must be the same on every rank"):
            elsewhere.save(3, opt)
        assert names(comm, mpi_tmp_path) in ([], ["0"])
        checkpointer.save(3, opt)


def test_a_peek_loads_nothing(comm, mpi_tmp_path):
    checkpointer = Checkpointer(mpi_tmp_path / "saved")
    assert checkpointer.peek() is None
    with build(comm) as opt, checkpointer:
        for step in 3, 4, 5:
            checkpointer.save(step, opt, {"width": step, "per_rank": comm.rank})
        checkpointer.wait()
        extra = {"width": 5, "per_rank": list(range(comm.size))}
        path = mpi_tmp_path / "saved" / "step-000000000005"
        assert checkpointer.peek() == Restored(5, extra, path)
        comm.Barrier()
        if comm.rank == 0:
            (path / "manifest.json").write_text("{")
        comm.Barrier()
        assert checkpointer.peek().step == 4
        with pytest.raises(CheckpointError, match="directory must be readable; got Not a dir"):
            Checkpointer(path / "manifest.json").peek()
        comm.Barrier()


# -- signals ---------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_is_known_to_all_after_the_same_step(comm, mpi_tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        checkpointer.save_on_signal(opt, signal.SIGUSR2, signal.SIGTERM)
        train(opt, [0])
        assert checkpointer.signalled is None
        if is_last(comm):
            os.kill(os.getpid(), signal.SIGUSR2)
        train(opt, [1])
        assert comm.allgather(checkpointer.signalled) == [signal.SIGUSR2] * comm.size
        checkpointer.save(2, opt)
        train(opt, [2])
        assert checkpointer.signalled is None  # told once
        if comm.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        train(opt, [3])
        assert comm.allgather(checkpointer.signalled) == [signal.SIGTERM] * comm.size
    assert checkpointer.steps() == [2]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_of_several_signals_in_one_step_none_is_lost(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        checkpointer.save_on_signal(opt, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        if is_last(comm):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        if comm.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
        heard = []
        for step in range(4):
            train(opt, [step])
            heard.append(checkpointer.signalled)
        assert heard == [signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, None]


def test_signals_are_given_back_when_the_optimizer_goes_first(comm, mpi_tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    checkpointer = Checkpointer(mpi_tmp_path)
    with build(comm) as opt:
        checkpointer.save_on_signal(opt)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    checkpointer.close()


@BOTH_WAYS
def test_a_signal_that_cannot_be_caught(comm, mpi_tmp_path, alone):
    chosen = signal.SIGKILL if errs(comm, alone) else signal.SIGUSR2
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        with pytest.raises(OSError, match="Invalid argument"):
            checkpointer.save_on_signal(opt, chosen)
        assert opt.core.background == []
        train(opt, [0])


def test_the_weights_are_untouched_by_all_this(comm, mpi_tmp_path):
    with build(comm) as opt, build(comm) as plain, Checkpointer(mpi_tmp_path) as checkpointer:
        checkpointer.save_on_signal(opt, signal.SIGUSR2)
        for step in range(6):
            train(opt, [step])
            train(plain, [step])
            checkpointer.save(step, opt)
        assert [p.data.tobytes() for p in params_of(opt)] == [
            p.data.tobytes() for p in params_of(plain)
        ]
