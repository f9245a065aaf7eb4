"""The stages of a step on this rank, over all sections: reduce, update."""

import math
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from shardopt.comm.rollcall import RollCall
from shardopt.dtypes import compute_dtype
from shardopt.kernels.base import ALL_FINITE, Kernel, UpdatePlan
from shardopt.nadam import NUM_COEFFICIENTS, StepCoefficients
from shardopt.partition import CHUNK_NUMEL, Partition, Shard
from shardopt.schedule import Schedule
from shardopt.storage import SectionStorage

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_


class Pipeline:
    """Runs a kernel over this rank's shards.

    On one node the sum over ranks and the update are one pass: the kernel reads every rank's
    gradients where they are and writes the parameters where every rank reads them. ``reduce`` is
    an extra pass in front, for what must be known before the update; it leaves the sum in this
    rank's own gradients, unless those have 16 bits, which cannot hold it.

    Args:
        rollcall: The ranks.
        kernel: What computes.
        max_grad_norm: Clip to this, as ``torch.nn.utils.clip_grad_norm_`` does, or None.
        check_finite: As in ``ShardPolicy``.

    Attributes:
        storages: One for each section; sections are only ever appended.
    """

    def __init__(
        self,
        rollcall: RollCall,
        kernel: Kernel,
        max_grad_norm: float | None,
        check_finite: bool | None,
    ) -> None:
        self.storages: list[SectionStorage] = []
        self._max_grad_norm = max_grad_norm
        self._check_finite = check_finite
        self._rollcall = rollcall
        self._kernel = kernel

    def sync(self) -> None:
        """See [Note: when stores become visible]."""
        for storage in self.storages:
            storage.sync()

    def zero_grads(self) -> None:
        """Zero this rank's gradients."""
        for storage in self.storages:
            storage.zero_grads()

    def scale_grads(self, factor: float) -> None:
        """Multiply this rank's gradients."""
        for storage in self.storages:
            grads = storage.grads[storage.node_rank]
            grads *= grads.dtype.type(factor)

    def reduce(self, partition: Partition, step: int) -> float:
        """Sum the gradients over ranks and give the sum of their squares, the same on every rank.

        The squares of a chunk are added up by its owner and the chunks in flat order, so that
        the bits do not depend on how chunks are shared out; the allreduce only adds zeros to
        each of them.

        Collective: every rank.
        """
        if partition.numel == 0:
            return 0.0
        square_sums = np.zeros(partition.numel // CHUNK_NUMEL)
        for storage in self.storages:
            out = storage.grads[storage.node_rank] if storage.holds_sums else None
            for shard in filter(None, storage.shards):
                start, stop = storage.positions(shard)
                chunks = slice(shard.start // CHUNK_NUMEL, shard.stop // CHUNK_NUMEL)
                self._kernel.reduce(storage.grads, out, start, stop, square_sums[chunks])
        square_sums = self._rollcall.allreduce(square_sums, MPI.SUM, step, "reduce")
        return float(np.cumsum(square_sums)[-1:].sum())  # one after the other, if there are any

    def measure(
        self, partition: Partition, step: int, grad_scale: float
    ) -> tuple[float | None, float, bool]:
        """Reduce first where something must be known before the update.

        Collective: every rank.

        Args:
            partition: The layout.
            step: For messages.
            grad_scale: Factor on the sum of gradients that makes it the average.

        Returns:
            The norm or None, the clip factor, and whether to skip the step.
        """
        max_grad_norm, check_finite = self._max_grad_norm, self._check_finite
        if check_finite is None and not all(storage.holds_sums for storage in self.storages):
            check_finite = True  # 16-bit gradients overflow easily
        if max_grad_norm is None and not check_finite:
            return None, 1.0, False
        grad_norm = math.sqrt(self.reduce(partition, step)) * grad_scale
        if not math.isfinite(grad_norm) and check_finite is not False:
            return grad_norm, 1.0, True
        if max_grad_norm is None:
            return grad_norm, 1.0, False
        clip_factor = max_grad_norm / (grad_norm + _CLIP_EPS)
        return grad_norm, 1.0 if clip_factor > 1.0 else clip_factor, False

    def update(
        self, schedule: Schedule, coefficients: Sequence[StepCoefficients], *, reduced: bool
    ) -> int | None:
        """Apply a step to this rank's shards.

        Args:
            schedule: Regrouped for this step.
            coefficients: One for each of its cohorts.
            reduced: Whether ``reduce`` has summed the gradients already.

        Returns:
            Index of the first parameter in which this rank saw inf or NaN, or None.
        """
        poisoned = None
        for storage in self.storages:
            dtype = compute_dtype(storage.section.dtype)
            table = np.array(coefficients, dtype).reshape(-1, NUM_COEFFICIENTS)
            row = storage.node_rank
            one_source = reduced and storage.holds_sums
            sources = storage.grads[row : row + 1] if one_source else storage.grads
            for shard in filter(None, storage.shards):
                plan = UpdatePlan(*storage.positions(shard), schedule.segments(shard), table)
                local = slice(shard.local_start, shard.local_stop)
                state = {key: array[local] for key, array in storage.state.items()}
                flag = self._kernel.update(
                    sources,
                    storage.params,
                    state.get("master"),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    plan,
                )
                if flag != ALL_FINITE and poisoned is None:
                    poisoned = self._first_poisoned(schedule.partition, storage, shard, flag)
        return poisoned

    @staticmethod
    def _first_poisoned(
        partition: Partition, storage: SectionStorage, shard: Shard, position: int
    ) -> int | None:
        zero = storage.section.start
        for index, start, stop in partition.params_in(shard.section, position + zero, shard.stop):
            if not np.isfinite(storage.params[start - zero : stop - zero]).all():
                return index
        return None

    def free(self) -> None:
        """Release all memory. Collective over the node."""
        for storage in self.storages:
            storage.free()
        self.storages.clear()
