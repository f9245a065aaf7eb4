"""The number of cores that a process may use."""

import os
import subprocess
import sys

import pytest

from shardopt.measure import cores


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200000 100000\n", 2), ("50000 100000\n", 1), ("250000 100000\n", 3), ("max 100000\n", None)],
)
def test_a_quota_is_read_in_whole_cores(tmp_path, text, expected):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert cores.read_quota(path) == (expected or 1 << 30)
    assert cores.read_quota(tmp_path / "none") == 1 << 30


def test_the_script_needs_no_package_and_prints_the_number():
    command = [sys.executable, "-I", "-S", cores.__file__]
    number = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert number == cores.count_cores()
    assert 1 <= number <= len(os.sched_getaffinity(0))
