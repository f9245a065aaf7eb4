"""Small runs of the training script, and the files they leave."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from shardopt.checkpoint.format.directory import list_checkpoints
from shardopt.checkpoint.format.reader import Reader, read_manifest
from tests.conftest import kill_with_ranks, read_job_env

SCRIPT = Path(__file__).parents[2] / "launch" / "train_lm.py"
SMALL = ("--layers", "1", "--width", "32", "--context", "32", "--batch", "2")


def read_log(out):
    """Return the records of a log, without a last line that is still being written."""
    lines = (out / "train.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def column(out, key):
    """Return the values of a key, from every record that has it."""
    return [record[key] for record in read_log(out) if key in record]


def steps_in(out):
    return [record["step"] for record in read_log(out) if record["kind"] == "step"]


def saved_steps(directory):
    return [folder.step for folder in list_checkpoints(directory)]


def newest_tensors(directory):
    """Return all tensors of the newest checkpoint, by parameter name and state key."""
    path = list_checkpoints(directory)[-1].path
    with Reader(path, read_manifest(path)) as reader:
        return {
            (entry.name, key): reader.tensor(index, key)
            for index, entry in enumerate(reader.manifest.params)
            for key in reader.manifest.slices[index]
        }


class Started:
    """A run that the test observes; on exit from the context no process of it is left."""

    def __init__(self, mpirun, num_ranks, *arguments):
        self.job = subprocess.Popen(
            [mpirun.program, "-n", str(num_ranks), sys.executable, SCRIPT, *map(str, arguments)],
            cwd=mpirun.folder,
            env=os.environ | read_job_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.job.poll() is None:
            kill_with_ranks(self.job)
        self.job.stdout.close()

    def wait_until(self, condition, timeout_s=60):
        """Wait until the run has got so far."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                if condition():
                    return
            assert self.job.poll() is None, self.job.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ranks(self):
        """Return the processes of the ranks that are alive."""
        found = []
        for process in psutil.Process(self.job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, among others
                if str(SCRIPT) in process.cmdline():
                    found.append(process)
        return found

    def kill(self, number):
        """Send a signal to a single rank."""
        self.ranks()[-1].send_signal(number)

    def end(self, timeout_s=30):
        """Wait for the end of all ranks; returns the exit code and the output."""
        ranks = self.ranks() if self.job.poll() is None else []
        output, _ = self.job.communicate(timeout=timeout_s)
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive
        return self.job.returncode, output

    def stop(self, number=signal.SIGTERM):
        """Signal a single rank, and wait for the end of all."""
        self.kill(number)
        return self.end()
