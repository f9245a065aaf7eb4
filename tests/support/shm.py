"""A ``/dev/shm`` of a test's own, in a mount namespace."""

import subprocess

import pytest


def with_shm(size):
    """Return the start of a command that sees a /dev/shm of that size."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount], capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(f"may not mount a file system: {probe.stderr.strip()}")
    return "unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"


def limit_shm(mpirun, size):
    """Have mpirun start jobs that see a /dev/shm of that size; return options for its calls."""
    program, *options = *with_shm(size), mpirun.program
    mpirun.program = program
    return options
