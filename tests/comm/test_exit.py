"""Threads, forked children and the end of MPI."""

import pytest

from tests.support.jobs import assert_ended_by, printed_by_ranks

# -- threads ---------------------------------------------------------------------------------------

IN_A_THREAD = """
import threading
def fail():
    raise {}
opt = build()
if last:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
opt.step()
print("stepped")
"""


def test_an_exception_in_a_thread_of_one_rank_ends_the_job(run):
    job = run(2, IN_A_THREAD.format("LookupError('no more text')"))
    assert_ended_by(job, "LookupError: no more text")
    assert job.stderr.count("Traceback") == 1
    assert "Exception in thread Thread-" in job.stderr
    assert "stepped" not in job.stdout


@pytest.mark.any_mpi
def test_a_thread_may_exit(run):
    job = run(2, IN_A_THREAD.format("SystemExit(3)"))
    assert job.returncode == 0, job.output
    assert job.stdout.count("stepped") == 2
    assert job.stderr == ""


@pytest.mark.any_mpi
def test_a_hook_of_the_users_still_reports_what_threads_raise(run):
    hook = """
import threading
def hook(args):
    print("reported by the user's hook:", args.exc_value, file=sys.stderr)
threading.excepthook = hook
"""
    job = run(2, hook + IN_A_THREAD.format("LookupError('no more text')"))
    assert job.returncode != 0
    assert printed_by_ranks(job) == ["reported by the user's hook: no more text"]


# -- the end of MPI --------------------------------------------------------------------------------

OF_WHAT = {  # the communicator, and what becomes of it
    "world": ("comm", ""),
    "self": ("MPI.COMM_SELF", ""),
    "own": ("comm.Dup()", ""),
    "freed": ("comm.Dup()", "opt.comm.Free()"),
    "freed after close": ("comm.Dup()", "opt.close(); opt.comm.Free()"),
}
ENDS = {
    "exit": "",
    "finalize": "MPI.Finalize()",
    "dropped": "MPI.Finalize(); opts.clear(); gc.collect()",
}
ALONE = [pytest.param([chosen], id=chosen, marks=pytest.mark.thorough) for chosen in OF_WHAT]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("chosen", [pytest.param(list(OF_WHAT), id="all"), *ALONE])
def test_a_job_ends_well_however_mpi_does(run, chosen, end):
    body = "import gc\nopts = []\n"
    for made, then in map(OF_WHAT.get, chosen):
        body += f"""
opt = NAdam([Parameter(np.ones(9, np.float32))], comm={made})
opt.step()
{then}
opts.append(opt)
"""
    job = run(2, f"{body}del opt\n{ENDS[end]}\n")
    assert job.returncode == 0, job.output
    assert job.stderr == ""


def test_a_call_after_mpi_is_an_error_and_no_crash(run):
    job = run(
        2,
        """
opt = build()
opt.step()
MPI.Finalize()
try:
    opt.core.parts.consensus.barrier(2, "agree")
except ShardoptError as error:
    sys.stdout.write(f"{type(error).__name__}: {error}\\n")
""",
    )
    assert job.returncode == 0, job.output
    told = "ClosedError: step 2 (agree) must come before MPI.Finalize(); got a call after it. Call"
    assert job.stdout.count(told) == 2, job.output


def test_a_rank_that_finalizes_mpi_by_hand_is_not_waited_for(run):
    job = run(3, "opt = build()\nopt.step()\nif last:\n    MPI.Finalize()\nopt.step()\n")
    told = "rank 2 (last seen in step 1) left the job, but step 2 (agree) needs every rank."
    assert told in job.stderr, job.output


def test_a_forked_child_leaves_its_parent_alone(run):
    """It ends without ``MPI_Finalize``, as the children of multiprocessing do."""
    job = run(
        2,
        """
import atexit
opt = build()
opt.step()
child = os.fork()
if child == 0:
    try:
        opt.core.parts.consensus.barrier(2, "agree")
    except ShardoptError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\\n")
    sys.stdout.flush()
    atexit._run_exitfuncs()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
comm.Barrier()
assert opt.core.parts.consensus.group.detector.arrivals.left() == []
for _ in range(3):
    opt.step()
opt.close()
""",
    )
    assert job.returncode == 0, job.output
    assert job.stderr == ""
    told = "ClosedError: step 2 (agree) must be taken by the process that built the optimizer; got"
    assert job.stdout.count(told) == 2, job.output


@pytest.mark.any_mpi
def test_an_exception_in_a_forked_child_is_its_own(run):
    job = run(
        2,
        """
import threading
opt = build()
child = os.fork()
if child == 0:
    def fail():
        raise LookupError("in a thread")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        raise LookupError("in the child")
    except LookupError:
        sys.excepthook(*sys.exc_info())
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
opt.step()
opt.close()
""",
    )
    assert job.returncode == 0, job.output
    assert job.stderr.count("LookupError: in a thread") == 2
    assert job.stderr.count("LookupError: in the child") == 2
