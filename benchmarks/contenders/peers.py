"""The peers of a step: what users of shardopt would run otherwise."""

import importlib
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from benchmarks.contenders.internals import CHUNK_NUMEL, BareKernel, KernelArrays, padded_zeros
from benchmarks.contenders.names import REDUCE_SCATTER, REPLICATED, SHARDOPT, ZERO_REDUNDANCY
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import DTYPE, Contender, Problem
from benchmarks.harness.placing import FloatArray, page_aligned


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
        self._grad, exp_avg, exp_avg_sq = (
            padded_zeros(shard, DTYPE, stream, origin) for stream in (1, 2, 3)
        )
        for tensor, bounds in enumerate(self._bounds):
            problem.fill_param(self._params[slice(*bounds)], tensor)
            problem.fill_grad(self._grads[slice(*bounds)], tensor)
        param = self._params[start : start + shard]
        state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        arrays = KernelArrays(self._grad[None], param, state)
        self._kernel = BareKernel(arrays, problem.comm.size, problem.threads)

    def step(self) -> None:
        """See ``Contender``."""
        self._comm.Reduce_scatter_block(self._grads, self._grad, MPI.SUM)
        self._kernel.update()
        self._comm.Allgather(MPI.IN_PLACE, self._params)

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        return self._params[slice(*self._bounds[index])]

    def close(self) -> None:
        """See ``Contender``."""
        self._kernel.close()
        del self._params, self._grads, self._grad, self._kernel


class TorchAllReduce:
    """``all_reduce`` of every gradient over Gloo, then an optimizer of torch as it is by default.

    Other settings were not faster on CPUs: ``foreach=True``, ``parameters_as_bucket_view=True``,
    or one ``all_reduce`` after the other.

    Args:
        problem: The model.
        make_optimizer: Makes the optimizer from torch and the parameters.
    """

    def __init__(self, problem: Problem, make_optimizer: Callable[[Any, list[Any]], Any]) -> None:
        self._torch = torch = importlib.import_module("torch")
        self._dist = importlib.import_module("torch.distributed")
        self._ranks, self._group = problem.comm.size, problem.group
        self._params = torch_params(torch, problem)
        self._optimizer = make_optimizer(torch, self._params)

    def step(self) -> None:
        """See ``Contender``."""
        grads = [param.grad for param in self._params]
        sums = [self._dist.all_reduce(grad, group=self._group, async_op=True) for grad in grads]
        for work in sums:
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


def torch_params(torch: Any, problem: Problem) -> list[Any]:
    """Make a problem's parameters in PyTorch, with gradients in place."""
    params = []
    for tensor, (start, stop) in enumerate(problem.bounds()):
        param = torch.empty(stop - start).requires_grad_()
        param.grad = torch.empty(stop - start)
        problem.fill_param(param.detach().numpy(), tensor)
        problem.fill_grad(param.grad.numpy(), tensor)
        params.append(param)
    return params


def zero_redundancy(problem: Problem) -> TorchAllReduce:
    """Make torch's own sharded optimizer: moments are sharded, updated parameters broadcast."""

    def make(torch: Any, params: list[Any]) -> Any:
        optim = importlib.import_module("torch.distributed.optim")
        return optim.ZeroRedundancyOptimizer(params, torch.optim.NAdam, process_group=problem.group)

    return TorchAllReduce(problem, make)


def replicated(problem: Problem) -> TorchAllReduce:
    """Make NAdam on every rank, as after DistributedDataParallel."""
    return TorchAllReduce(problem, lambda torch, params: torch.optim.NAdam(params))


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    SHARDOPT: Shardopt,
    REDUCE_SCATTER: ReduceScatter,
    ZERO_REDUNDANCY: zero_redundancy,
    REPLICATED: replicated,
}
