"""The contenders of a whole step: shardopt and what its users would run otherwise."""

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from names import REDUCE_SCATTER, REPLICATED, SHARDOPT, ZERO_REDUNDANCY
from placing import page_aligned
from shardopt._typing import FloatArray
from shardopt.backends.base import UpdatePlan
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.backends.cpu.memory import padded_zeros
from shardopt.comm.topology import cores_per_rank, make_topology
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy
from shardopt.rule.nadam import Hyperparams, StepCount, step_coefficients

DTYPE = "float32"
GRAD_SIZE = 0.01
LARGEST_MEAN_DIFFERENCE = 1e-5

_DEFAULTS = ShardPolicy()


@dataclass(frozen=True)
class Problem:
    """A model and its gradients, the same for every contender.

    Attributes:
        comm: The ranks that train it.
        numel: Parameters.
        num_tensors: Arrays they come in, of equal size but for the last.
        threads: Cores for each rank.
    """

    comm: MPI.Intracomm
    numel: int
    num_tensors: int
    threads: int

    def bounds(self) -> list[tuple[int, int]]:
        """Where each tensor begins and ends in the flattened model."""
        cuts = [self.numel * i // self.num_tensors for i in range(self.num_tensors + 1)]
        return [(cuts[i], cuts[i + 1]) for i in range(self.num_tensors)]

    def param(self, tensor: int) -> FloatArray:
        """A tensor's initial value, the same on every rank, in an array of its own."""
        start, stop = self.bounds()[tensor]
        array = np.empty(stop - start, DTYPE)
        self.fill_param(array, tensor)
        return array

    def grad(self, tensor: int) -> FloatArray:
        """This rank's gradient of a tensor, in an array of its own."""
        start, stop = self.bounds()[tensor]
        array = np.empty(stop - start, DTYPE)
        self.fill_grad(array, tensor)
        return array

    def fill_param(self, array: FloatArray, tensor: int) -> None:
        """Write a tensor's initial value, the same on every rank, into a C-contiguous array."""
        np.random.default_rng((0, tensor)).standard_normal(dtype=array.dtype, out=array)

    def fill_grad(self, array: FloatArray, tensor: int) -> None:
        """Write this rank's gradient of a tensor into a C-contiguous array."""
        rng = np.random.default_rng((1 + self.comm.rank, tensor))
        rng.standard_normal(dtype=array.dtype, out=array)
        array *= array.dtype.type(GRAD_SIZE)


class Contender(Protocol):
    """A model with gradients in place, ready to take steps."""

    def step(self) -> None:
        """Average the gradients over ranks and update the parameters, on every rank."""
        ...

    def tensor(self, index: int) -> FloatArray:
        """The parameters in one of the tensors, flattened."""
        ...

    def close(self) -> None:
        """Free the memory. Collective: every rank."""
        ...


class Shardopt:
    """This project.

    Args:
        problem: The model.
        policy: How to shard.
        dtype: Of the parameters.
    """

    def __init__(
        self, problem: Problem, policy: ShardPolicy = _DEFAULTS, dtype: str = DTYPE
    ) -> None:
        self._params: list[Any] = [
            Parameter(problem.param(tensor).astype(dtype, copy=False), f"tensor{tensor}")
            for tensor in range(problem.num_tensors)
        ]
        self._optimizer: Any = NAdam(self._params, comm=problem.comm, policy=policy)
        for tensor, param in enumerate(self._params):
            param.grad[...] = problem.grad(tensor)

    def step(self) -> None:
        """See ``Contender``."""
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        data: FloatArray = self._params[index].data
        return data

    def close(self) -> None:
        """See ``Contender``."""
        params, self._params = self._params, []
        for param in params:  # lest each rank is given a copy
            param.data = param.data[:0]
        del param
        self._optimizer.close()


class ReduceScatter:
    """``Reduce_scatter_block`` of gradients, our kernel on the shard, ``Allgather`` in place."""

    def __init__(self, problem: Problem) -> None:
        self._comm, self._bounds = problem.comm, problem.bounds()
        chunks = -(-problem.numel // (problem.comm.size * CHUNK_NUMEL))
        shard, start = chunks * CHUNK_NUMEL, chunks * CHUNK_NUMEL * problem.comm.rank
        # As NumPy places arrays: from and to whole pages both MPIs copy up to 1.4 times slower.
        origin = page_aligned(5, DTYPE)[4:]
        self._params = padded_zeros(shard * problem.comm.size, DTYPE, 0, origin)
        self._grads = padded_zeros(shard * problem.comm.size, DTYPE, 4, origin)
        self._grad, self._exp_avg, self._exp_avg_sq = (
            padded_zeros(shard, DTYPE, stream, origin) for stream in (1, 2, 3)
        )
        for tensor, bounds in enumerate(self._bounds):
            problem.fill_param(self._params[slice(*bounds)], tensor)
            problem.fill_grad(self._grads[slice(*bounds)], tensor)
        self._param = self._params[start : start + shard]
        self._segments = np.array([[0, shard, 0]])
        self._clock, self._hyper = StepCount(), Hyperparams()
        self._kernel = CpuKernel(problem.threads)
        self._kernel.prepare(DTYPE)

    def step(self) -> None:
        """See ``Contender``."""
        self._comm.Reduce_scatter_block(self._grads, self._grad, MPI.SUM)
        self._clock.advance(self._hyper)
        row = step_coefficients(self._hyper, self._clock, 1 / self._comm.size)
        plan = UpdatePlan(0, self._grad.size, self._segments, np.array([row], DTYPE))
        self._kernel.update(
            self._grad[None], self._param, None, self._exp_avg, self._exp_avg_sq, plan
        )  # fmt: skip
        self._comm.Allgather(MPI.IN_PLACE, self._params)

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        return self._params[slice(*self._bounds[index])]

    def close(self) -> None:
        """See ``Contender``."""
        self._kernel.close()
        del self._params, self._grads, self._grad, self._param, self._exp_avg, self._exp_avg_sq


class TorchAllReduce:
    """``all_reduce`` of every gradient over Gloo, then an optimizer of torch as it is by default.

    Other settings were not faster on CPUs: ``foreach=True``, ``parameters_as_bucket_view=True``,
    or one ``all_reduce`` after the other.

    Args:
        problem: The model.
        make_optimizer: Gets torch and the parameters.
    """

    def __init__(self, problem: Problem, make_optimizer: Callable[[Any, list[Any]], Any]) -> None:
        self._torch = torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._ranks = problem.comm.size
        self._params = []
        for tensor, (start, stop) in enumerate(problem.bounds()):
            param = torch.empty(stop - start).requires_grad_()
            param.grad = torch.empty(stop - start)
            problem.fill_param(param.detach().numpy(), tensor)
            problem.fill_grad(param.grad.numpy(), tensor)
            self._params.append(param)
        self._optimizer = make_optimizer(torch, self._params)

    def step(self) -> None:
        """See ``Contender``."""
        grads = [param.grad for param in self._params]
        for work in [self._dist.all_reduce(grad, async_op=True) for grad in grads]:
            work.wait()
        for grad in grads:
            grad.div_(self._ranks)
        self._optimizer.step()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        array: FloatArray = self._params[index].detach().numpy()
        return array

    def close(self) -> None:
        """See ``Contender``."""
        del self._params, self._optimizer


def zero_redundancy(problem: Problem) -> TorchAllReduce:
    """Torch's own sharded optimizer: moments are sharded, updated parameters broadcast."""

    def make(torch: Any, params: list[Any]) -> Any:
        optim = importlib.import_module("torch.distributed.optim")
        return optim.ZeroRedundancyOptimizer(params, torch.optim.NAdam)

    return TorchAllReduce(problem, make)


def replicated(problem: Problem) -> TorchAllReduce:
    """NAdam on every rank, as after DistributedDataParallel."""
    return TorchAllReduce(problem, lambda torch, params: torch.optim.NAdam(params))


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    SHARDOPT: Shardopt,
    REDUCE_SCATTER: ReduceScatter,
    ZERO_REDUNDANCY: zero_redundancy,
    REPLICATED: replicated,
}
PEERS = [name for name in CONTENDERS if name != SHARDOPT]


def require_alike(contenders: Mapping[str, Contender], num_tensors: int) -> None:
    """Make sure that all contenders have done the same work.

    Raises:
        RuntimeError: One of them holds other parameters.
    """
    for tensor in range(num_tensors):
        ours = contenders[SHARDOPT].tensor(tensor)
        for name, contender in contenders.items():
            difference = float(np.abs(contender.tensor(tensor) - ours).mean(dtype=np.float64))
            if not difference <= LARGEST_MEAN_DIFFERENCE:
                raise RuntimeError(
                    f"{name} must compute what shardopt computes; got parameters of tensor "
                    f"{tensor} that differ by {difference:.2g} on average. Mend the contender."
                )


def load_torch(threads: int) -> Any | None:
    """Import torch and give it as many threads, or say that its peers are left out."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        if MPI.COMM_WORLD.rank == 0:
            print("There is no torch here: its optimizers are left out.", flush=True)
        return None
    torch.set_num_threads(threads)
    return torch


@contextmanager
def gloo(comm: MPI.Intracomm, wanted: bool) -> Iterator[None]:
    """Make the ranks a process group of torch, if wanted.

    They meet where MASTER_ADDR says, or in a file if they are all on one machine.

    Collective: every rank, on its way in and out.
    """
    if not wanted:
        yield
        return
    dist = importlib.import_module("torch.distributed")
    with tempfile.TemporaryDirectory() as folder:
        store = "env://"
        if "MASTER_ADDR" not in os.environ:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = f"file://{comm.bcast(folder)}/store"
        dist.init_process_group("gloo", init_method=store, rank=comm.rank, world_size=comm.size)
        yield
        dist.destroy_process_group()
        comm.Barrier()


def share_of_cores(comm: MPI.Intracomm) -> int:
    """Cores for each rank, as the optimizer counts them. Collective: every rank."""
    topology = make_topology(comm, share_node=True, timeout_s=60)
    cores = cores_per_rank(topology)
    topology.free()
    return cores
