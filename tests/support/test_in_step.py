"""The tests' own machinery: small pytest runs under mpirun, and jobs that end badly."""

from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import psutil
import pytest
from hypothesis import strategies as st

PRELUDE = """
import os, signal, time
import pytest
from mpi4py import MPI
comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
pytestmark = pytest.mark.mpi
"""


@pytest.fixture
def run_tests(mpirun, tmp_path):
    """Run the text of a test file on a number of ranks, which wait so long for one another."""

    def run(num_ranks, text, *args, wait_s=30):
        waits = f"in_step_grace = {wait_s}\nin_step_limit = {wait_s}\n"
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{waits}")
        (tmp_path / "test_it.py").write_text(PRELUDE + text)
        plugins = ("-p", "tests.support.in_step", "-p", "no:cacheprovider")
        return mpirun(
            num_ranks,
            *("-m", "pytest", "--with-mpi", "--color=no", *plugins, *args, "test_it.py"),
            env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    return run


@pytest.mark.any_mpi
@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.thorough), 4])
def test_only_rank_0_reports(run_tests, tmp_path, num_ranks):
    text = f"""
def test_sum():
    assert comm.allreduce(1) == {num_ranks}

@pytest.mark.mpi(min_size={num_ranks + 1})
def test_for_more_ranks():
    comm.Abort(1)
"""
    job = run_tests(num_ranks, text, "--junitxml=junit.xml")
    assert job.returncode == 0, job.output
    assert job.output.count("1 passed, 1 skipped") == 1
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("tests") == "2"


@pytest.mark.any_mpi  # as the ranks agree on it, and none is ended
def test_a_failure_on_one_rank_fails_the_run_with_its_words(run_tests):
    text = """
def test_one():
    print("printed by rank", comm.rank)
    assert not last, "words of the last rank"

def test_all():
    assert False, f"words of rank {comm.rank}"

def test_next():
    comm.barrier()
"""
    job = run_tests(3, text)
    assert job.returncode == 1
    assert "2 failed, 1 passed" in job.output
    assert "call failed on rank 2:" in job.output
    assert "AssertionError: words of the last rank" in job.output
    assert "printed by rank 2" in job.output
    assert all(f"words of rank {rank}" in job.output for rank in range(3))


def test_a_rank_that_raises_before_a_collective_does_not_hang_the_run(run_tests):
    text = """
def test_it():
    if last:
        raise ValueError("boom")
    comm.barrier()  # the others wait here
"""
    job = run_tests(2, text, wait_s=1)
    assert job.returncode != 0
    assert "rank 1 failed the call of test_it.py::test_it" in job.stderr
    assert "ValueError: boom" in job.stderr
    assert "in test_it" in job.stderr.partition("rank 0 is here:")[2]


def test_a_rank_that_never_comes_does_not_hang_the_run(run_tests):
    text = """
def test_it():
    if last:
        time.sleep(600)
"""
    job = run_tests(2, text, wait_s=1)
    assert job.returncode != 0
    assert "rank 0 passed the call of test_it.py::test_it" in job.stderr
    assert "in test_it" in job.stderr.partition("rank 1 is here:")[2]


def test_a_killed_rank_ends_the_run(run_tests):
    text = """
def test_it():
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
"""
    job = run_tests(2, text)
    assert job.returncode != 0
    assert "1 passed" not in job.output


@pytest.mark.any_mpi  # as the ranks agree on it, and none is ended
def test_ranks_that_end_differently_fail(run_tests):
    text = """
def test_it():
    if last:
        pytest.skip("only here")
"""
    job = run_tests(2, text)
    assert job.returncode == 1
    assert "must end alike on all ranks; got ['passed', 'skipped']" in job.output


def test_ranks_that_collect_differently_end_the_run(run_tests):
    text = """
if last:
    raise RuntimeError("cannot be imported here")
def test_it():
    comm.barrier()
"""
    job = run_tests(2, text)
    assert job.returncode != 0
    assert "must collect the same tests" in job.output
    assert "cannot be imported here" in job.output


@pytest.mark.mpi
@hypothesis.given(st.lists(st.floats()))
def test_ranks_draw_the_same_examples(comm, numbers):
    assert len(set(map(repr, comm.allgather(numbers)))) == 1


@pytest.mark.any_mpi
def test_a_job_tells_its_exit_code_and_both_streams(mpirun):
    source = """
        import os, sys
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
        size = comm.allreduce(1)
        if comm.rank == 0:
            print("out", os.environ["COLOUR"], size, sys.argv[1:])
            print("err", file=sys.stderr)
        sys.exit(3)
    """
    job = mpirun(2, "a b", source=source, env={"COLOUR": "red"})
    assert job.returncode == 3
    assert "out red 2 ['a b']" in job.stdout
    assert "err" in job.stderr
    assert job.output == job.stdout + job.stderr


def test_a_job_that_hangs_is_killed_with_all_its_ranks(mpirun, tmp_path):
    source = """
        import signal
        from mpi4py import MPI
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("began", flush=True)
        while True:
            signal.pause()
    """
    with pytest.raises(pytest.fail.Exception, match=r"did not end within 5 s(.|\n)*began"):
        mpirun(2, source=source, timeout_s=5)
    script = str(tmp_path / "job.py")
    assert not [p for p in psutil.process_iter(["cmdline"]) if script in (p.info["cmdline"] or ())]
