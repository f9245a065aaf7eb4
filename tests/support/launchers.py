"""The paths of the launchers, and jobs that a test observes while they run."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import kill_with_ranks

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
PAYLOAD = Path(__file__).with_name("payload.py")


def plain(*command):
    """Return a command without the tests' settings for MPI: launchers must work without them."""
    settings = [name for name in os.environ if "MCA" in name or name.endswith("_NUM_THREADS")]
    return ["env", *(word for name in [*settings, "NPROC"] for word in ("-u", name)), *command]


def launch(script, *arguments):
    """Return the command that runs the payload with a launcher."""
    *options, payload = arguments
    return plain("bash", LAUNCH / script, *options, sys.executable, PAYLOAD, *payload.split())


def run(command, cwd, timeout_s=60):
    """Run a command on this machine to its end."""
    words = [*map(str, command)]
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )


class Watched:
    """A job whose output is read as it appears; on exit no process of it is left."""

    def __init__(self, process):
        self.process = process
        self.lines = []
        self.readers = [
            threading.Thread(target=self._read, args=(stream,))
            for stream in (process.stdout, process.stderr)
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream):
        with stream:
            self.lines.extend(stream)

    @property
    def output(self):
        return "".join(self.lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            kill_with_ranks(self.process)
        for reader in self.readers:
            reader.join()

    def wait_for(self, text, count=1):
        """Wait until the job has printed a text ``count`` times."""
        wait_until(lambda: self.output.count(text) >= count or self.process.poll() is not None)
        assert self.output.count(text) >= count, self.output

    def end(self, timeout_s=60):
        """Wait for the end and the last output; returns the exit code."""
        self.process.wait(timeout_s)
        for reader in self.readers:
            reader.join()
        return self.process.returncode


def start(command, cwd):
    """Start a command on this machine."""
    return Watched(
        subprocess.Popen(
            [*map(str, command)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def wait_until(condition, timeout_s=60):
    """Wait until other processes have made a condition true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
