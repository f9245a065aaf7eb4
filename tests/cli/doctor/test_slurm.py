"""Slurm's settings, as a stand-in for its scontrol prints them."""

import pytest

from shardopt.cli.doctor.facts import Slurm
from shardopt.cli.doctor.slurm import find_slurm

CONFIG = """Configuration data as of 2026-11-24T10:22:14
AccountingStorageType   = accounting_storage/none
JobAcctGatherParams     = {}
JobAcctGatherType       = jobacct_gather/linux
"""


@pytest.fixture
def scontrol(tmp_path):
    """Return a function that makes a scontrol, and an environment that finds it."""

    def make(script):
        program = tmp_path / "scontrol"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return {"PATH": f"{tmp_path}:/bin:/usr/bin", "SLURM_JOB_ID": "7"}

    return make


@pytest.mark.parametrize(
    ("params", "found"), [("UsePss,OverMemoryKill", "UsePss,OverMemoryKill"), ("(null)", "")]
)
def test_settings(scontrol, params, found):
    environ = scontrol(f'[ "$1 $2" = "show config" ] && cat <<END\n{CONFIG.format(params)}END')
    assert find_slurm(environ) == Slurm("jobacct_gather/linux", found)
    del environ["SLURM_JOB_ID"]
    assert find_slurm(environ) is None


def test_a_slurm_that_does_not_answer(scontrol, tmp_path):
    assert find_slurm(scontrol("echo 'Unable to contact slurm controller' >&2; exit 1")) is None
    assert find_slurm({"PATH": str(tmp_path / "none"), "SLURM_JOB_ID": "7"}) is None
