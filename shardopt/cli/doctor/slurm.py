"""Slurm's way to count the memory of a job, as ``scontrol show config`` prints it."""

import re
import shutil
import subprocess
from collections.abc import Mapping

from shardopt.cli.doctor.facts import Slurm

_ANSWER_S = 10


def find_slurm(environ: Mapping[str, str]) -> Slurm | None:
    """Return the settings of the Slurm that runs this job, or None if there is none."""
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None or "SLURM_JOB_ID" not in environ:
        return None
    try:
        command = [scontrol, "show", "config"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", done.stdout, re.MULTILINE))
    if "JobAcctGatherType" not in settings:
        return None
    params = settings.get("JobAcctGatherParams", "")
    return Slurm(settings["JobAcctGatherType"], "" if params == "(null)" else params)
