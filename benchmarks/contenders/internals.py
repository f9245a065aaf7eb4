"""The internals of shardopt that benchmarks use. No other module here imports any.

They are its kernel by itself, on CPUs and GPUs, the places of its arrays, its view of nodes and
cores, the devices that it makes, and the parts of a checkpoint that a rank owns.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from benchmarks.harness.placing import Bytes, FloatArray, page_aligned
from shardopt import ShardPolicy
from shardopt.backends.base import Kernel, Rows, UpdatePlan
from shardopt.backends.codes import shaped
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.backends.cpu.memory import padded_zeros
from shardopt.backends.devices import make_device
from shardopt.checkpoint.format.disk import sync_folder
from shardopt.checkpoint.format.reader import read_manifest
from shardopt.checkpoint.format.requests import wanted_slices
from shardopt.cli.plan.settings import require_combination, with_forms, written
from shardopt.comm.failure import Abort, install_abort_hook
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.topology import Topology, make_topology
from shardopt.core import parts
from shardopt.core.sharded_optimizer import sharded_of
from shardopt.errors import HyperparamsError
from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.footprint import MemoryReport
from shardopt.layout.padding import row_numel
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm, StateSpec, state_specs
from shardopt.layout.traffic import Traffic, default_bucket_nbytes, plan_traffic
from shardopt.measure.cores import bound_to, cores_per_rank, count_cores
from shardopt.numpy import NAdam
from shardopt.planner.chart import Chart, Series, draw
from shardopt.planner.estimate import Layout, lay_out, memory_of
from shardopt.planner.model import evenly
from shardopt.planner.work import plan_work
from shardopt.rule.coefficients import StepCount
from shardopt.rule.rounding import Chance, make_salts
from shardopt.rule.rules import RULES
from shardopt.transport.copies import CopiesAround

__all__ = [
    "CHUNK_NUMEL",
    "Chart",
    "Series",
    "Topology",
    "compute_dtype",
    "draw",
    "has_master",
    "install_abort_hook",
    "padded_zeros",
    "sync_folder",
    "written",
]

# -- the kernel ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelArrays:
    """The arrays of one shard.

    Attributes:
        grads: [num_sources, at least numel], the rows C-contiguous.
        param: [numel].
        state: ``exp_avg``, ``exp_avg_sq`` and, for 16-bit parameters, ``master``; [numel] each.
    """

    grads: Any
    param: FloatArray
    state: Mapping[str, FloatArray]


def state_form(optim_bits: int = 32, *, has_masters: bool = True) -> StateForm:
    """Return how an optimizer keeps its state."""
    return StateForm(optim_bits, has_masters)


def make_arrays(numel: int, dtype: str, num_sources: int, form: StateForm = FULL) -> KernelArrays:
    """Make arrays of zeros that lie to each other as in ``shardopt.store.buffers``."""
    row = row_numel(numel, dtype)
    rows = page_aligned((1 + num_sources) * row, dtype).reshape(-1, row)
    state = {
        spec.key: shaped(_padded_state(numel, spec, len(rows) + i, rows[0]), spec)
        for i, spec in enumerate(state_specs(dtype, form))
    }
    return KernelArrays(rows[1:], rows[0, :numel], state)


def _padded_state(numel: int, spec: StateSpec, number: int, like: FloatArray) -> Any:
    size = numel if spec.codec is None else spec.nbytes(numel)
    return padded_zeros(size, spec.dtype, number, like)


class BareKernel:
    """A kernel on one shard, without an optimizer around it.

    Args:
        arrays: The shard, for the kernel to update in place.
        num_ranks: Ranks that the gradients are averaged over.
        threads: Cores to use.
        kernel: That of the device where the arrays are; None for CPUs.
        form: How the state is kept.
        rule: The optimizer.
    """

    def __init__(
        self,
        arrays: KernelArrays,
        num_ranks: int,
        threads: int,
        kernel: Kernel | None = None,
        form: StateForm = FULL,
        rule: str = "NAdam",
    ) -> None:
        self._arrays, self._num_ranks = arrays, num_ranks
        self._kernel: Kernel = kernel or CpuKernel(threads)
        self._kernel.prepare(arrays.param.dtype.name, form=form)
        self._full = compute_dtype(arrays.param.dtype.name)
        self._rounds_by_chance = form.rounds_by_chance
        self._sources = Rows.of(*(row[: arrays.param.size] for row in arrays.grads))
        self._targets = Rows.of(arrays.param)
        self._span = Span(0, arrays.param.size)
        self._segments = np.array([[0, arrays.param.size, 0]])
        self._step_count, self._hyperparams = StepCount(), RULES[rule]()

    def update(self, times: int = 1) -> None:
        """Take a step, so many times; what is computed on the host before is so only once."""
        self._step_count = self._hyperparams.after_step(self._step_count)
        row = self._hyperparams.coefficients(self._step_count, 1.0, 1 / self._num_ranks)
        coefficients, chance = np.array([row], self._full), None
        if self._rounds_by_chance:
            chance = Chance(make_salts([1], [self._step_count.step]), np.zeros(1, np.int64))
        plan = UpdatePlan(self._span, self._segments, coefficients, chance=chance)
        for _ in range(times):
            self._kernel.update(self._sources, self._targets, self._arrays.state, plan)

    def close(self) -> None:
        """End the threads."""
        self._kernel.close()


# -- devices ---------------------------------------------------------------------------------------


class Device:
    """A GPU, without an optimizer around it.

    Args:
        is_real: Whether it is one; otherwise it is what stands in for it in tests.

    Attributes:
        kernel: Updates arrays on it.
    """

    def __init__(self, *, is_real: bool) -> None:
        self._arena = Arena(MPI.COMM_SELF)
        self._device = make_device("cuda:0", self._arena) if is_real else _stand_in(self._arena)
        self.kernel: Kernel = self._device.kernel
        self.copy, self.wait = self._device.copy, self._device.wait
        self.host, self.host_zeros = self._device.host, self._device.host_zeros
        self.close = self._device.close

    def zeros(self, numel: int, dtype: str) -> Any:
        """Allocate [numel] zeros on it."""
        (block,) = self._device.blocks(self._arena, numel * np.dtype(dtype).itemsize)
        return block.view(np.dtype(dtype))


def make_device_arrays(device: Device, numel: int, dtype: str, num_sources: int) -> KernelArrays:
    """Make arrays of zeros on a device."""
    grads = [device.zeros(numel, dtype) for _ in range(num_sources)]
    state = {spec.key: device.zeros(numel, spec.dtype) for spec in state_specs(dtype)}
    return KernelArrays(grads, device.zeros(numel, dtype), state)


@contextmanager
def devices_made_by(kind: Callable[[Any], Any], *, are_beside: bool = True) -> Iterator[None]:
    """Have optimizers that are built meanwhile take devices of another kind.

    Args:
        kind: Makes a device in the memory of a node.
        are_beside: Whether copies of offloaded updates run beside the kernel.
    """
    module: Any = parts
    make_device, make_copies = module.make_device, module.make_copies
    module.make_device = lambda name, arena: kind(arena)
    if not are_beside:
        module.make_copies = lambda topology, memory: CopiesAround(memory, topology.node_ranks)
    try:
        yield
    finally:
        module.make_device, module.make_copies = make_device, make_copies


def stand_in_devices() -> AbstractContextManager[None]:
    """Have optimizers that are made in this block take the stand-in for a GPU."""
    return devices_made_by(_stand_in)


def _stand_in(arena: Arena) -> Any:
    return importlib.import_module("tests.support.arena_device").ArenaDevice(arena)


# -- nodes and cores -------------------------------------------------------------------------------


@contextmanager
def topology_of(comm: MPI.Intracomm, share_node: bool | int = True) -> Iterator[Topology]:
    """Yield the nodes and lanes of some ranks. Collective: every rank, on its way in and out."""
    topology = make_topology(comm, share_node=share_node, timeout_s=60, failure=Abort())
    yield topology
    topology.free()


def share_of_cores(comm: MPI.Intracomm) -> int:
    """Return the cores of each rank, as the optimizer counts them. Collective: every rank."""
    with topology_of(comm) as topology:
        return cores_per_rank(topology)


def is_oversubscribed(comm: MPI.Intracomm, threads: int) -> bool:
    """Return whether some ranks have more threads than cores. Collective: every rank.

    Args:
        comm: The ranks at work.
        threads: Of each of them.
    """
    mine = MPI.Get_processor_name(), bound_to()
    sharing = comm.allgather(mine).count(mine)
    crowded: bool = comm.allreduce(sharing * threads > count_cores(), MPI.LOR)
    return crowded


def memory_nbytes(opt: NAdam) -> int:
    """Return the bytes that a step must read and write on a node, copies by MPI left out."""
    work = plan_work(opt.partition)
    moved = (each for bucket in work for each in (bucket.reduced, bucket.summed, bucket.updated))
    return sum(each.memory_nbytes for each in moved)


def topology_in(opt: NAdam) -> Topology:
    """Return the nodes and lanes of an optimizer."""
    return opt.core.parts.topology


def planned_memory(
    numel: int, dtype: str, num_nodes: int, node_size: int, policy: ShardPolicy
) -> MemoryReport | None:
    """Return the memory of a model of equal tensors on nodes of CPUs, or None if it is refused."""
    model, layout = evenly(numel, dtype, 256), Layout(num_nodes, node_size, policy)
    try:
        require_combination(model, layout)
    except HyperparamsError:
        return None
    return memory_of(lay_out(with_forms(model, layout).specs, layout), layout)


def planned_traffic(opt: NAdam) -> Traffic:
    """Return what this rank should send in a step."""
    topology = topology_in(opt)
    return plan_traffic(opt.partition, topology.node, topology.node_rank)


def bucket_nbytes(policy: ShardPolicy, num_nodes: int, world_size: int) -> int:
    """Return the bytes of parameters in a bucket."""
    return policy.bucket_nbytes or default_bucket_nbytes(num_nodes, world_size)


# -- writes ----------------------------------------------------------------------------------------


def scan_of(opt: Any) -> Callable[[], None]:
    """Return what an optimizer does in each step to find out that no weight has been written."""
    params = opt.core.params

    def scan() -> None:
        params.find_changes()
        params.refresh()

    return scan


# -- gradients averaged in backward ----------------------------------------------------------------


def hooks_of(opt: Any) -> tuple[Callable[[], None], Callable[[Any], None], Callable[[], None]]:
    """Return what backward calls in stage 2: at its start, with each parameter, and at its end."""
    grads: Any = opt.core.parts.grads
    return grads._on_start, grads._on_grad, grads._on_end


# -- checkpoints -----------------------------------------------------------------------------------


class Place(NamedTuple):
    """A run of bytes in a file of a checkpoint, and where it belongs in memory.

    Attributes:
        path: The file.
        offset: Of its first byte in it.
        target: The memory.
    """

    path: Path
    offset: int
    target: Bytes


def num_cores(opt: NAdam) -> int:
    """Return the cores that this rank's optimizer uses."""
    return opt.core.parts.num_cores


def saves_in_flight(opt: NAdam) -> bool:
    """Return whether something is being saved beside the steps of an optimizer."""
    return bool(opt.core.background)


def owned_arrays(opt: NAdam) -> list[FloatArray]:
    """Return all that this rank saves, where it lives."""
    sharded = sharded_of(opt)
    return sharded.arrays(sharded.tensors())


def places_in_checkpoint(path: Path, opt: NAdam) -> Sequence[Place]:
    """Return where in a checkpoint everything lies that this rank's optimizer owns."""
    sharded, manifest = sharded_of(opt), read_manifest(path)
    tensors = sharded.tensors()
    found: list[Place] = []
    for shard, array in zip(tensors, sharded.arrays(tensors), strict=True):
        slices: Any = manifest.slices[shard.param][shard.key]
        found += [
            Place(path / manifest.files[run.file].name, run.start, run.target)
            for run in wanted_slices(slices, shard.span, shard.array, array)
            if run.target is not None
        ]
    return found
