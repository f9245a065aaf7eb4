"""A job that saves as fast as it can, to be killed: ``python -m tests.support.saver OPTIONS``.

It goes on from the newest checkpoint, having checked it. Every rank tells on a pipe what happens:
``ready PID STEP`` when it goes on from a step, ``safe STEP`` when ``wait`` has returned.
"""

import argparse
import itertools
import os
from pathlib import Path

from mpi4py import MPI

from shardopt.checkpoint import Checkpointer
from tests.support.errors import take_step
from tests.support.numbered import Origin, assert_filled, build, fill


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--pipe", type=Path, required=True)
    parser.add_argument(
        "--job", type=int, required=True, help="number of the job, in what it saves"
    )
    parser.add_argument("--keep-last", type=int)
    parser.add_argument("--saves", type=int, help="end after so many; never unless given")
    options = parser.parse_args()
    pipe = os.open(options.pipe, os.O_WRONLY)

    def tell(*words: object) -> None:
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    with (
        build(MPI.COMM_WORLD) as opt,
        Checkpointer(options.directory, keep_last=options.keep_last) as checkpointer,
    ):
        restored = checkpointer.restore(opt)
        first = 1
        if restored is not None:
            origin = Origin(**restored.extra)
            assert restored.step == origin.step
            assert_filled(opt, origin)
            first = restored.step + 1
        opt.comm.Barrier()
        tell("ready", os.getpid(), first - 1)
        for step in itertools.count(first):
            if options.saves is not None and step >= first + options.saves:
                break
            origin = Origin(step, options.job)
            fill(opt, origin)
            checkpointer.save(step, opt, extra=origin.extra)
            for _ in range(step % 3):  # commits happen in steps, too
                take_step(opt)
            checkpointer.wait()
            tell("safe", step)


if __name__ == "__main__":
    main()
