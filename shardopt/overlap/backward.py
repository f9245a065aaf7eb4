"""Gradients that set out for other nodes while backward still computes."""

import threading
import time
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt.comm.collectives import LOOKS, Collectives
from shardopt.comm.shared_memory import Window
from shardopt.comm.topology import Topology
from shardopt.core.pipeline import Pipeline
from shardopt.params.registry import Registry
from shardopt.transport.reduce_scatter import ReduceScatter

_LINE_NUMEL = 8  # a cache line of int64 for each rank
_NAP_S = 0.0003
_LOOK_UP_EVERY_S = 0.1
_LONGEST_FAREWELL_S = 5.0
_LONGEST_REST = 64


class BackwardOverlap:
    """Starts the exchange of a bucket as soon as all ranks of the node have its gradients.

    [Note: early travellers]
    A framework that tells when backward has added to a gradient lets its bucket leave before the
    step. Nobody can tell whether more will be added, so each rank goes by its last step: a
    parameter is *ready* when backward has reached it as often as then (micro-batches count, and
    parameters that are not used do not hold up others). Ranks announce how many buckets, in the
    order of travel, are ready; what all ranks of a node have announced starts, in a thread.

    A gradient that changes after its bucket was announced makes the bucket *stale*, and so does
    one that somebody has put in its place. Ranks agree on what is stale when the step begins, and
    exchange it once more: the bits are those of gradients as they are when ``step`` is called.
    What the framework does not see (torch: writes through ``.data`` or ``.numpy()``) goes
    unnoticed. After steps with stale buckets gradients stay at home for a while.

    Collective: construction, ``settle`` and ``free``.

    Args:
        topology: The ranks.
        collectives: The same.
        registry: This rank's parameters.
        pipeline: Their memory.
        overlap: As in ``ShardPolicy``.

    Attributes:
        copied_nbytes: Gradients that were copied into the window early since ``open``.
    """

    def __init__(
        self,
        topology: Topology,
        collectives: Collectives,
        registry: Registry[Any],
        pipeline: Pipeline,
        overlap: bool,
    ) -> None:
        self._rollcall = collectives
        self._registry = registry
        self._pipeline = pipeline
        self._runner: ProgressThread | None = None
        self._count: list[int] = []  # how often backward has reached each parameter
        self._expected: list[int] = []
        self._version: list[object] = []
        self._routes_of: list[list[int]] = []
        self._missing: list[int] = []  # for each route, parameters that are not ready
        self._unused: list[list[int]] = []  # for each, what begins in it and is not awaited
        self._stale = 0
        self._halted = False
        self.copied_nbytes = 0
        self._rest = self._next_rest = 0  # steps to stay at home
        if pipeline.courier is None or not overlap or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return
        if registry.face.on_grad_ready(self._accumulated):
            self._runner = ProgressThread(topology, pipeline)

    # -- while backward runs -----------------------------------------------------------------------

    def _accumulated(self, param: Any) -> None:
        """Take note that backward has added to a gradient."""
        index = self._registry.index_of(param)
        if index is None or index >= len(self._count) or self._runner is None:
            return
        self._count[index] += 1
        if self._count[index] > self._expected[index]:
            self._mark_stale(index)
        if self._count[index] != self._expected[index]:
            return
        copied_nbytes = self._registry.bindings[index].take_grad()
        if copied_nbytes is None:
            self._halted = True  # the step will say what is wrong with it
            return
        self.copied_nbytes += copied_nbytes
        self._version[index] = self._registry.bindings[index].grad_version()
        for route in self._routes_of[index]:
            self._missing[route] -= 1
        if not self._halted and not self._rest:
            self._announce(self._runner)

    def _announce(self, runner: "ProgressThread") -> None:
        """Let the routes set out that are ready by now."""
        start = stop = runner.announced
        while stop < len(self._missing) and not self._missing[stop]:
            for index in self._unused[stop]:
                self._version[index] = self._registry.bindings[index].grad_version()
            stop += 1
        if stop > start:
            self._pipeline.sync()
            runner.announce(stop)

    def grads_zeroed(self) -> None:
        """Take note that all gradients are about to be written to."""
        if self._runner is not None and any(self._count):
            self._halted = True
            self._stale |= (1 << self._runner.announced) - 1

    # -- around a step -----------------------------------------------------------------------------

    def close(self) -> int:
        """Let nothing more start early, and give the bit mask of the routes that are stale."""
        if self._runner is None:
            return 0
        self._runner.pause()
        self._halted = True
        announced = self._runner.announced
        for index, routes in enumerate(self._routes_of if announced else ()):
            if any(route < announced for route in routes) and not self._is_fresh(index):
                self._mark_stale(index)
        return self._stale

    def open(self, step: int, was_stale: bool = False) -> None:
        """Be ready for the gradients of another step.

        Args:
            step: Its number.
            was_stale: Whether something was stale in the last one, on any rank.
        """
        if self._pipeline.courier is not None:
            self._pipeline.courier.reset()
        if self._runner is None:
            return
        if was_stale:
            self._rest = self._next_rest = min(2 * self._next_rest or 1, _LONGEST_REST)
        elif self._rest:
            self._rest -= 1
        elif any(self._count):
            self._next_rest = 0
        self._lay_out()
        self._runner.open(step)

    def settle(self, step: int) -> None:
        """Come to rest, without an update: complete what has begun on any rank.

        Collective: every rank.
        """
        courier = self._pipeline.courier
        if courier is None:
            return
        if self._runner is not None:
            self._runner.withdraw()
        begun = np.array([courier.exchange.num_started])
        if self._rollcall.allreduce(begun, MPI.MAX, step, "settle")[0]:
            courier.collect_all(step)

    def free(self) -> None:
        """Release what is shared. Collective over the node."""
        if self._runner is not None:
            self._runner.free()

    # -- inside ------------------------------------------------------------------------------------

    def _is_fresh(self, index: int) -> bool:
        """Whether a gradient is what it was when it was announced."""
        binding = self._registry.bindings[index]
        if self._version[index] != binding.grad_version():
            return False
        return binding.holds_grad() or not (binding.has_grad() or binding.grad.any())

    def _mark_stale(self, index: int) -> None:
        assert self._runner is not None
        for route in self._routes_of[index]:
            if route < self._runner.announced:
                self._stale |= 1 << route

    def _lay_out(self) -> None:
        courier, partition = self._pipeline.courier, self._registry.partition
        assert courier is not None
        num_params, known = len(partition.params), len(self._count)
        self._expected = self._count + [0] * (num_params - known)
        self._count = [0] * num_params
        self._version = [None] * num_params
        if known != num_params:
            self._routes_of = [[] for _ in range(num_params)]
            for place, each in enumerate(courier.exchange.routes):
                bucket = partition.buckets[each.bucket]
                for index, *_ in partition.params_in(bucket.region, bucket.start, bucket.stop):
                    self._routes_of[index].append(place)
        self._missing = [0] * len(courier.exchange.routes)
        self._unused = [[] for _ in courier.exchange.routes]
        for index, (expected, routes) in enumerate(
            zip(self._expected, self._routes_of, strict=True)
        ):
            for route in routes if expected else ():
                self._missing[route] += 1
            if routes and not expected:
                self._unused[routes[0]].append(index)
        self._stale, self._halted, self.copied_nbytes = 0, False, 0


class ProgressThread:
    """The thread that exchanges what has been announced, and the announcements of the node.

    Only one of the thread and the caller of ``pause`` works with the courier: the lock's holder.

    Attributes:
        announced: Routes that are ready on this rank.
    """

    def __init__(self, topology: Topology, pipeline: Pipeline) -> None:
        assert pipeline.courier is not None
        self.announced = 0
        self._pipeline = pipeline
        self._courier = pipeline.courier
        self._exchange = pipeline.courier.exchange
        self._window = Window(topology.node_comm, 8 * _LINE_NUMEL)
        self._lines = self._window.memory.view(np.int64).reshape(-1, _LINE_NUMEL)
        self._mine = self._lines[topology.node_rank]
        self._mine[:] = 0
        self._step = 0
        self._error: Exception | None = None
        self._wake, self._ended, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._paused = self._lock.acquire()
        self._thread = threading.Thread(target=self._run, name="shardopt exchange", daemon=True)
        self._thread.start()
        self._farewell = weakref.finalize(
            self, _say_farewell, self._ended, self._wake, self._thread, self._exchange
        )

    def announce(self, announced: int) -> None:
        """Tell the node; what was written to gradients must be visible: ``sync`` them before."""
        self.announced = announced
        self._mine[0] = self._step << 32 | announced
        self._window.sync()
        self._wake.set()

    def pause(self) -> None:
        """Take the courier over from the thread.

        Raises:
            Exception: What the thread met with.
        """
        if not self._paused:
            self._paused = self._lock.acquire()
        if self._error is not None:
            raise self._error

    def withdraw(self) -> None:
        """Pause, and take back what was announced, as the same step may be opened again.

        Nobody opens it before all ranks have come here: see ``BackwardOverlap.settle``.
        """
        self._mine[0] = 0
        self._window.sync()
        self.pause()

    def open(self, step: int) -> None:
        """Hand the courier to the thread, for the gradients of step ``step``."""
        self._step, self.announced = step, 0
        if self._paused:
            self._paused = False
            self._lock.release()

    def free(self) -> None:
        """End the thread and release the window. Collective over the node."""
        self._farewell()
        del self._lines, self._mine
        self._window.free()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            is_busy = True
            while is_busy and not self._ended.is_set():
                if self._lock.acquire(timeout=_LOOK_UP_EVERY_S):
                    try:
                        is_busy = all(self._work() for _ in range(LOOKS))
                    finally:
                        self._lock.release()
                    time.sleep(_NAP_S)

    def _work(self) -> bool:
        """Do what can be done without waiting; give whether there will be more."""
        try:
            with self._courier.translate_mpi_errors(self._step):
                self._exchange.advance(self._num_ready())
        except Exception as error:  # for the next step to raise
            self._error = error
        more = self._exchange.num_started < self.announced or not self._exchange.is_idle
        return more and self._error is None

    def _num_ready(self) -> int:
        """Routes that all ranks of the node have announced for this step."""
        self._window.sync()
        lines = self._lines[:, 0]
        ready = int(np.where(lines >> 32 == self._step, lines & 0xFFFFFFFF, 0).min())
        self._pipeline.sync()  # what they had written before can be read from here on
        return ready


def _say_farewell(
    ended: threading.Event, wake: threading.Event, thread: threading.Thread, exchange: ReduceScatter
) -> None:
    """End the thread before MPI does; what is under way should arrive, as others wait for it."""
    ended.set()
    wake.set()
    thread.join()
    stop = time.monotonic() + _LONGEST_FAREWELL_S
    with suppress(MPI.Exception):  # of others that are gone before
        while not MPI.Is_finalized() and not exchange.is_quiet() and time.monotonic() < stop:
            time.sleep(_NAP_S)
