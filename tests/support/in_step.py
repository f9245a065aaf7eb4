"""Keeps the ranks of ``mpirun -n N python -m pytest --with-mpi`` in step.

pytest-mpi brings the option, the marker ``mpi(min_size=...)`` and ``mpi_tmp_path``; such a run
takes only the tests marked ``mpi``. After every phase of a test the ranks exchange its outcomes. A
test that failed on one rank is failed on all of them with that rank's text, so the output of rank 0
and the JUnit file it writes are complete; the other ranks print nothing.

A rank that failed may never make the call in which the others wait for it. If they have not
arrived within ``in_step_grace`` seconds, or a rank that did not fail has waited ``in_step_limit``
seconds, every rank of this machine prints its stack, and the job is aborted.
"""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

OUTCOMES = ("passed", "skipped", "failed")
_STACK_S = 0.3
"""The time that a rank has to print its stack, on a busy machine, before the next one does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two waiting times."""
    parser.addini("in_step_grace", "seconds that a failed rank waits for the others", "float", 10.0)
    parser.addini("in_step_limit", "seconds that any rank waits for the others", "float", 60.0)


def runs_with_mpi(config: pytest.Config) -> bool:
    """Whether pytest-mpi was told to run the tests that need ranks."""
    return bool(config.getoption("--with-mpi") or config.getoption("--only-mpi"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin, and silence all ranks but rank 0."""
    if not runs_with_mpi(config):
        return
    in_step = InStep(config.getini("in_step_grace"), config.getini("in_step_limit"))
    config.pluginmanager.register(in_step, "in-step")
    if in_step.comm.rank > 0:
        config.option.xmlpath = None
        # The terminal reporter is made after this and writes to what it finds here.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests marked ``mpi`` for runs with MPI, the others for runs without."""
    with_mpi: bool = config.getoption("--with-mpi")

    def runs_now(item: pytest.Item) -> bool:
        return bool(item.get_closest_marker("mpi")) == with_mpi

    config.hook.pytest_deselected(items=[item for item in items if not runs_now(item)])
    items[:] = filter(runs_now, items)


class InStep:
    """The hooks that keep a rank in step; they are called at the same points on all ranks."""

    def __init__(self, grace_s: float, limit_s: float) -> None:
        from mpi4py import MPI  # here, as runs without MPI load this file too

        self.grace_s = grace_s
        self.limit_s = limit_s
        self.comm = MPI.COMM_WORLD.Dup()  # nothing that a test sends can be taken for ours
        node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.node_pids: list[tuple[int, int]] = node.allgather((self.comm.rank, os.getpid()))
        node.Free()
        self.collect_errors: list[str] = []
        self.stderr = os.fdopen(os.dup(2), "w")  # not what pytest captures
        # A handler in C prints the Python stacks even while this rank sits in a call of MPI's.
        faulthandler.register(signal.SIGQUIT, file=self.stderr)

    def pytest_report_header(self) -> str:
        """Return the MPI library and the number of ranks."""
        from mpi4py import MPI

        name, version = MPI.get_vendor()
        return f"mpi: {name} {'.'.join(map(str, version))}, ranks: {self.comm.size}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the errors of this rank's collection."""
        if report.failed:
            self.collect_errors.append(report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """End the run if the ranks have not collected the same tests."""
        collected = ([item.nodeid for item in session.items], self.collect_errors)
        self.wait(self.comm.Ibarrier(), "collected the tests", self.limit_s)
        everywhere = self.comm.allgather(collected)
        if any(other != everywhere[0] for other in everywhere):
            pytest.exit(_describe_collections(everywhere), returncode=pytest.ExitCode.TESTS_FAILED)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Make the outcome of a phase the same on all ranks."""
        from mpi4py import MPI

        report = yield
        text = _failure_text(report)
        code = OUTCOMES.index(report.outcome)
        extremes = np.array([code, -code], np.int32)
        self.wait(
            self.comm.Iallreduce(MPI.IN_PLACE, extremes, MPI.MAX),
            f"{report.outcome} the {report.when} of {report.nodeid}\n{text}",
            self.grace_s if report.failed else self.limit_s,
        )
        if extremes.sum() == 0 and not report.failed:  # the same on all ranks, nothing to tell
            return report
        everywhere = self.comm.allgather((report.outcome, text))
        outcomes = [outcome for outcome, _ in everywhere]
        if "failed" in outcomes:
            _adopt_failures(report, everywhere)
        elif len(set(outcomes)) > 1:
            report.outcome = "failed"
            report.longrepr = f"must end alike on all ranks; got {outcomes}, by rank"
        return report

    def wait(self, arrival: "MPI.Request", what: str, patience_s: float) -> None:
        """Wait until every rank has come here, or abort the job if one does not.

        Args:
            arrival: A collective that this rank has begun.
            what: What this rank has done by now, for the message in case of an abort.
            patience_s: Seconds to wait for the others.
        """
        from shardopt.comm.waiting import wait_until  # here, as it loads MPI

        def check(waited_s: float) -> None:
            if waited_s > patience_s:
                self.give_up(what)

        wait_until(arrival.Test, check, nap_s=0.001)  # leaves the core to ranks that still work

    def give_up(self, what: str) -> NoReturn:
        """Print the outcome of this rank and the stacks of all on this machine; abort the job."""
        rank = self.comm.rank
        self.print_past_capture(f"\nrank {rank} {what}\nbut not all ranks have come to its end.")
        all_s = len(self.node_pids) * _STACK_S
        time.sleep(2 * rank * all_s)  # the lowest rank that waits prints the stacks, once
        for other, pid in self.node_pids:
            self.print_past_capture(f"\nrank {other} is here:")
            os.kill(pid, signal.SIGQUIT)
            time.sleep(_STACK_S)
        self.comm.Abort(1)

    def print_past_capture(self, text: str) -> None:
        """Print to the stream that faulthandler prints to."""
        print(text, file=self.stderr, flush=True)


def _failure_text(report: pytest.TestReport) -> str:
    """Return the traceback of a failure, and the output of the test."""
    if not report.failed:
        return ""
    printed = (f"----- {title} -----\n{content}" for title, content in report.sections)
    return "\n".join((report.longreprtext, *printed))


def _adopt_failures(report: pytest.TestReport, everywhere: Sequence[tuple[str, str]]) -> None:
    """Add to the report of a phase its failures on other ranks."""
    ranks_by_text: dict[str, list[str]] = {}
    for rank, (outcome, text) in enumerate(everywhere):
        if outcome == "failed":
            ranks_by_text.setdefault(text, []).append(str(rank))
    if report.failed:
        del ranks_by_text[_failure_text(report)]  # told already
    told = [
        (f"{report.when} failed on rank {', '.join(ranks)}", text)
        for text, ranks in ranks_by_text.items()
    ]
    if report.failed:
        report.sections += told
    else:
        report.outcome = "failed"
        report.longrepr = "\n".join(f"{title}:\n{text}" for title, text in told)


def _describe_collections(everywhere: Sequence[tuple[list[str], list[str]]]) -> str:
    """Return what each rank collected that others did not, with its errors."""
    common = set.intersection(*(set(nodeids) for nodeids, _ in everywhere))
    lines = ["all ranks must collect the same tests in the same order; got"]
    for rank, (nodeids, errors) in enumerate(everywhere):
        own = [nodeid for nodeid in nodeids if nodeid not in common]
        lines.append(f"rank {rank}: {len(nodeids)} tests, of which not everywhere: {own}")
        lines += errors
    return "\n".join(lines)
