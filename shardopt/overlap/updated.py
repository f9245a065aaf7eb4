"""Parameters that ranks update as backward goes."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from shardopt._typing import FloatArray
from shardopt.comm.consensus import Consensus, attempt
from shardopt.comm.exit_hook import ExitHook, mpi_is_usable
from shardopt.errors import CallOrderError, CheckpointError, HyperparamsError
from shardopt.layout.ring import plan_ring
from shardopt.overlap.progress import drain
from shardopt.overlap.segments import end_segment
from shardopt.overlap.update_ring import UpdateRing
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.store.memory import Memory
from shardopt.transport.sync import BucketSync
from shardopt.transport.updating_exchange import Updating

if TYPE_CHECKING:
    from shardopt.rule.hyperparams import Hyperparams

OPTION = "policy.update_in_backward"


class UpdatedGradients:
    """Hands gradients to a ring whose ranks update parameters with them; see ``Gradients``.

    [Note: between backward and step]
    From the first gradient of a backward until ``step()`` has committed it, some parameters are
    new and others old, and no step is counted. Whatever would show, save or change them in between
    raises. What a user has written since the last step would be overwritten, or overwrite updates:
    each rank looks for it before it announces its first gradient, and raises.

    An error in a backward is raised there, on its rank, and by the step on all ranks. If something
    has been updated by then, the state is not *whole*, which all ranks know, as all update the same
    buckets: steps and saves raise until a checkpoint is loaded, as after any step that raises.

    Args:
        registry: The parameters of this rank.
        memory: Their memory.
        sync: Sums, updates, and sends parameters to other nodes.
        consensus: The ranks.
        ring_nbytes: As in ``ShardPolicy``.

    Attributes:
        begin: Finds the hyperparameters of a step before its first update; raises if there must be
            none. To be set.
        hypers: Those of the present step, or of the last one.
    """

    are_averages = False
    are_updates = True

    def __init__(
        self,
        registry: Registry[Any],
        memory: Memory,
        sync: BucketSync,
        consensus: Consensus,
        ring_nbytes: int | None,
    ) -> None:
        self.late_nbytes, self.waited_s = 0, 0.0
        self.begin: Callable[[], Sequence[Hyperparams]] = registry.read_hypers
        self.hypers: Sequence[Hyperparams] = ()
        assert isinstance(sync.reduction, Updating)
        self._registry, self._memory, self._reduction = registry, memory, sync.reduction
        self._updates, self._ring_nbytes = sync.reduction.updates, ring_nbytes
        self._consensus = consensus
        has_others = consensus.topology.num_nodes > 1
        self._guard = sync.translate_mpi_errors if has_others else nullcontext[None]
        self._exit = ExitHook(self, drain, sync.reduction)
        self._pid = os.getpid()
        self._ring: UpdateRing | None = None
        self._expected = 0  # bit mask of parameters
        self._arrived: set[int] = set()  # since the last step
        self._late: dict[int, FloatArray] = {}  # gradients whose buckets were closed before
        self._has_begun = False  # a backward, since the last step
        self._is_planned = False
        self._is_torn = False
        self._error: Exception | None = None
        adapter = registry.adapter
        adapter.on_grad_ready(self._on_grad)
        adapter.on_backward_ends(self._on_start, self._on_end)
        adapter.on_fault(self._note)

    # -- the layout --------------------------------------------------------------------------------

    def leave(self, call: str, step: int) -> None:
        """See ``Gradients.leave``; nothing is under way."""
        self._forget_spent()

    def lay_out(self) -> None:
        """See ``Gradients.lay_out``."""
        registry, partition = self._registry, self._registry.partition
        self._reduction.lay_out(partition)
        self._expected = registry.mask_of_trained()
        expected = [i for i in range(len(partition.params)) if self._expected >> i & 1]
        plan = plan_ring(partition, self._ring_nbytes)
        self._drop_ring()
        self._ring = UpdateRing(self._memory, partition, self._reduction, plan, expected)

    # -- while backward runs -----------------------------------------------------------------------

    def _on_start(self) -> None:
        """Get ready for a backward.

        Raises:
            Exception: There must be none now.
        """
        if self._ring is None or not mpi_is_usable(self._pid):
            return
        if self._error is None:
            self._note(attempt(self._begin_backward).error)
        if self._error is not None:
            raise self._error

    def _begin_backward(self) -> None:
        if self._has_begun:
            raise CallOrderError(
                f"step() must come between two backwards with {OPTION}; got a second backward "
                "before it, such as that of a reentrant checkpoint. The first one has used its "
                "gradients: leave the option out to accumulate, and set use_reentrant=False."
            )
        self.require_whole("a backward")
        self._has_begun = True
        self._plan()

    def _plan(self) -> None:
        """Read hyperparameters, for all updates of a step."""
        self.hypers = self.begin()
        self._updates.begin(self.hypers, self._expected)
        self._is_planned = True

    def _on_grad(self, param: Any) -> None:
        """Hand over a gradient that backward has computed.

        Raises:
            CallOrderError: It is not the first one since the last step.
        """
        index = self._registry.index_of(param)
        if index is None or self._ring is None or not mpi_is_usable(self._pid):
            return
        binding, adapter = self._registry.bindings[index], self._registry.adapter
        grad = adapter.grad(param, binding.name)
        if grad is None or grad.dtype != binding.data.dtype or grad.shape != binding.data.shape:
            return  # the step reports it
        if index in self._arrived:
            self._note(
                CallOrderError(
                    f"each parameter must get one gradient in a backward with {OPTION}; got a "
                    f"second one of {binding.name!r}. Reentrant checkpoints give several to a "
                    "parameter that is used in more than one: use use_reentrant=False."
                )
            )
            assert self._error is not None
            raise self._error
        self._arrived.add(index)
        adapter.bump_version([param])  # others may write to it from now on
        if self._ring.has_closed(index):
            self._late[index] = grad
            self._ring.hold(index)
        else:
            with self._guard():
                self._ring.put(index, grad)
        binding.bind_grad()

    def _on_end(self) -> None:
        """Announce that all gradients have come."""
        if self._ring is not None and mpi_is_usable(self._pid):
            with self._guard():
                self._ring.end_backward()

    def _note(self, error: Exception | None) -> None:
        """Remember an error, for the step to raise on all ranks."""
        self._error = self._error or error
        if self._error is not None and self._ring is not None:
            self._ring.has_failed = True

    # -- around a step -----------------------------------------------------------------------------

    def require_settled(self, call: str) -> None:
        """See ``Gradients.require_settled``."""
        if self._has_begun:
            raise CallOrderError(
                f"{call} must come after step(), and before the next backward, with {OPTION}; got "
                "it in between, while parameters are updated. Call step() first, on all ranks."
            )

    def require_whole(self, call: str) -> None:
        """See ``Gradients.require_whole``."""
        if self._is_torn:
            raise CheckpointError(
                f"{call} needs a state that is whole; got one of which a step has updated a part "
                "before it raised. Load a checkpoint, which makes it whole again."
            )

    def mend(self) -> None:
        """See ``Gradients.mend``; a backward that was refused meanwhile is forgotten."""
        self._is_torn, self._error = False, None
        if self._ring is not None:
            self._ring.has_failed = False

    def take(self, step: int) -> tuple[int, int]:
        """See ``Gradients.take``: completes all updates."""
        ring, registry = self._ring, self._registry
        if ring is None:
            return 0, 0
        registry.adapter.end_backward()
        own, error = attempt(self._find_own)
        self._note(error)
        if self._error is None:
            self._note(attempt(self.require_whole, "step()").error)
        if not self._is_planned and self._error is None:
            self._note(attempt(self._plan).error)
        grads = {**self._late, **(own or {})}
        if self._meet(step, has_more=bool(grads)) or ring.is_split:
            grads |= ring.kept
            ring.begin_rest()
            for index, grad in grads.items():
                ring.put(index, grad)
            self._meet(step, has_more=False)
            assert not ring.is_split  # nothing comes later
        if ring.twice:
            names = ", ".join(repr(registry.bindings[i].name) for i in sorted(ring.twice)[:3])
            self._note(
                CallOrderError(
                    f"a gradient must not be put into p.grad after backward with {OPTION}; got one "
                    f"for {names}, which other ranks have updated. Put it there before, on all."
                )
            )
        for index in own or ():
            registry.bindings[index].bind_grad()
        arrived = self._arrived.union(own or ())
        if arrived:
            ring.expect(arrived)
        self._is_torn = self._is_torn or ring.updated != 0  # until it is committed
        self._expected = ring.updated or self._expected
        self.late_nbytes = ring.late_nbytes + sum(grad.nbytes for grad in grads.values())
        self.waited_s, ring.late_nbytes, ring.waited_s = ring.waited_s, 0, 0.0
        error, self._error = self._error, None
        self._has_begun = self._is_planned = False
        self._arrived.clear()
        self._late.clear()
        ring.begin_step()
        if error is not None:
            raise error
        return mask_of(arrived), 0

    def describe(self, loss_scale: float) -> Mapping[str, object]:
        """See ``Gradients.describe``."""
        return {}

    def adopt_writes(self, present: int) -> None:
        """Do nothing: there is nothing to write to."""

    def show(self, present: int, step: int) -> None:
        """Do nothing: there are no averages."""

    def commit(self, present: int) -> None:
        """See ``Gradients.commit``."""
        self._updates.count(present)
        self._is_torn = False

    def zero(self, *, set_to_none: bool) -> None:
        """See ``Gradients.zero``.

        Raises:
            CallOrderError: A backward has come since the last step.
            HyperparamsError: Zeros are to stay.
        """
        self.require_settled("zero_grad()")
        if not set_to_none:
            raise HyperparamsError(
                f"set_to_none must be True with {OPTION}; got False. There is no memory for zeros: "
                "call zero_grad() without it."
            )
        for binding in self._registry.bindings:
            binding.remove_grad()

    def scale(self, factor: float) -> None:
        """Do nothing: ranks with different loss scales have been refused."""

    def free(self) -> None:
        """See ``Gradients.free``; nothing is under way."""
        self._exit.cancel()
        self._drop_ring()

    # -- inside ------------------------------------------------------------------------------------

    def _drop_ring(self) -> None:
        if self._ring is not None:
            self._ring.free()
            self._ring = None

    def _meet(self, step: int, *, has_more: bool) -> bool:
        """End a segment on all ranks, with all updates; see ``GradRing``.

        Returns:
            Whether some rank has gradients for another segment.
        """
        ring = self._ring
        assert ring is not None
        end_segment(ring, self._consensus, step, "step()", has_more=has_more)
        return ring.has_more()

    def _find_own(self) -> dict[int, FloatArray]:
        """Return gradients that no backward has handed over.

        Raises:
            CallOrderError: Those that one has handed over were set to None, or replaced.
            PartitionError: One does not fit.
        """
        own = {}
        for index, binding in enumerate(self._registry.bindings):
            has_grad, array = binding.find_new_grad()
            if index in self._arrived and (not has_grad or array is not None):
                raise CallOrderError(
                    f"gradients must not be set between backward and step() with {OPTION}; got "
                    f"that of {binding.name!r} set to "
                    f"{'None' if array is None else 'another tensor'}. Leave them alone: they have "
                    "been used for the update already."
                )
            if array is not None:
                own[index] = array.copy() if self._registry.may_be_shared(array) else array
        return own

    def _forget_spent(self) -> None:
        for binding in self._registry.bindings:
            if binding.holds_grad():
                binding.remove_grad()
