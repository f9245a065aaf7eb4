"""The user's side of the optimizer: param groups, parameters, and what was done to them since."""

from bisect import bisect_right, insort
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, is_on_device
from shardopt.errors import PartitionError
from shardopt.layout.partition import Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.binding import Binding, byte_bounds, may_overlap, read_before_write
from shardopt.params.forms import BITS_KEY, FormRules, require_same_bits
from shardopt.params.groups import Group, HyperparamsReader, complete_groups
from shardopt.params.known_groups import KnownGroups, params_in
from shardopt.rule.hyperparams import Hyperparams, Rule
from shardopt.rule.nadam import NAdam
from shardopt.store.buffers import ShardBuffers

if TYPE_CHECKING:
    from shardopt.params.planning import PlannedGroups


class Registry(Generic[P]):
    """All parameters of this rank, in the order of ``param_groups``.

    Args:
        adapter: Reads and binds the framework's parameters.
        partition: Empty so far.
        holder: Holds what the framework holds.
        device: Where that is.
        rules: How the state of parameters is kept; None for the default.
        rule: How a step computes.

    Attributes:
        adapter: As given.
        device: As given.
        rules: As given.
        rule: As given.
        param_groups: As the user sees them.
        bindings: One for each parameter.
        partition: Where every element lives.
        shared: All memory that parameters and gradients live in.
    """

    def __init__(
        self,
        adapter: Adapter[P],
        partition: Partition,
        holder: Backend,
        device: str,
        rules: FormRules | None = None,
        rule: Rule = NAdam,
    ) -> None:
        self.adapter = adapter
        self.device = device
        self.rules = rules or FormRules()
        self.rule = rule
        self._holder = holder
        self.partition = partition
        self.param_groups: list[Group] = []
        self.bindings: list[Binding] = []
        self._reader = HyperparamsReader(rule)
        self.shared: list[FloatArray] = []
        self._bounds: list[tuple[int, int]] = []  # of the regions' parameters, sorted
        self._index_of: dict[int, int] = {}
        self._buffers: Sequence[ShardBuffers] = ()
        self._live: tuple[list[bool], list[FloatArray]] = [], []
        self._of_mask: tuple[int, list[P]] = 0, []  # the last mask's parameters: it seldom changes
        self._known = KnownGroups()
        self._bits: list[Any] = []  # that each group has asked for

    # -- parameters come and go --------------------------------------------------------------------

    def is_edited(self, defaults: Mapping[str, Any]) -> bool:
        """Whether users have changed which parameters are in which groups, or in which order.

        Groups that are other dicts with the same parameters, such as copies, just take the place of
        those that were there.

        Args:
            defaults: Hyperparameters for groups that lack some.
        """
        groups, known = self.param_groups, self._known
        if known.is_same(groups):
            return False
        try:
            complete_groups(groups, defaults)
        except PartitionError:
            return True  # whoever takes them over meets it again
        if not known.has_params_of(groups):
            return True
        known.replace(groups)
        return False

    def restore_groups(self) -> None:
        """Undo what users have edited."""
        self._known.restore(self.param_groups)

    def pending(self) -> list[Any]:
        """Return what users have put into groups and no call has taken over yet."""
        return [param for param in params_in(self.param_groups) if self.index_of(param) is None]

    def take(self, planned: "PlannedGroups", buffers: Sequence[ShardBuffers]) -> list[Binding]:
        """Take over planned groups, and return the bindings of new parameters, not bound yet.

        Args:
            planned: The groups.
            buffers: The memory of all regions.
        """
        before, added = self.bindings, []
        if planned.kept_regions is None:
            self.param_groups += planned.groups
        else:
            self.bindings, self._index_of = [], {}
            self.shared.clear()
            self._bounds.clear()
        for member in planned.members:
            placed = planned.partition.params[len(self.bindings)]
            if member.source is None:
                memory = buffers[placed.region]
                arrays = memory.node_param(placed), memory.own_param(placed)
                views = *arrays, memory.own_grad(placed)
                of_framework = self.adapter, self._holder
                added.append(Binding(placed.spec.name, member.param, of_framework, views))
                added[-1].own_name = member.own_name
            binding = added[-1] if member.source is None else before[member.source]
            binding.name = placed.spec.name
            self._index_of[id(member.param)] = len(self.bindings)
            self.bindings.append(binding)
        self.partition, self._buffers = planned.partition, buffers
        self._live, self._of_mask = ([], []), (0, [])
        for each in buffers[len(self._bounds) :]:
            self.shared += each.params, each.own_params, each.grads
            insort(self._bounds, byte_bounds(each.own_params))
        self._note_groups(planned)
        return added

    def _note_groups(self, planned: "PlannedGroups") -> None:
        """Remember the groups as they are now; after an edit names follow their parameters."""
        bits = [group.get(BITS_KEY) for group in planned.groups]
        if planned.kept_regions is None:
            self._known.extend(planned.groups)
            self._bits += bits
            return
        self._bits = bits
        names = iter(self.bindings)
        for group in planned.groups:
            own = [next(names).name for _ in group["params"]]
            if "param_names" in group and group["param_names"] != own:
                group["param_names"] = own
        self._known.replace(planned.groups)

    def mask_of_trained(self) -> int:
        """Return the bit mask of the parameters that require a gradient."""
        trained = (self.adapter.requires_grad(binding.param) for binding in self.bindings)
        return sum(1 << index for index, wanted in enumerate(trained) if wanted)

    def may_overlap(self, array: FloatArray) -> bool:
        """Whether an array may share memory with a parameter."""
        start, stop = byte_bounds(array)
        before = bisect_right(self._bounds, (stop,)) - 1  # regions do not overlap each other
        return before >= 0 and self._bounds[before][1] > start

    def may_be_shared(self, array: FloatArray) -> bool:
        """Whether an array may share memory with parameters or gradients."""
        return any(may_overlap(array, shared) for shared in self.shared)

    def index_of(self, param: P) -> int | None:
        """Return the index of a parameter, or None if it is not this optimizer's."""
        return self._index_of.get(id(param))

    def release(self) -> None:
        """Leave all parameters without gradients, and with the values that they have."""
        self.shared.clear()
        self._bounds.clear()
        self._buffers, self._live = (), ([], [])
        self._of_mask = 0, []
        for binding in self.bindings:
            binding.release()

    # -- around a step -----------------------------------------------------------------------------

    def read_hypers(self) -> Sequence[Hyperparams]:
        """Return the hyperparameters of each param group as they are now.

        Raises:
            HyperparamsError: One is out of range.
        """
        for index, (group, bits) in enumerate(zip(self.param_groups, self._bits, strict=True)):
            require_same_bits(index, group, bits)
        return self._reader.read(self.param_groups)

    def take_grads(self) -> tuple[int, int]:
        """Copy gradients that are elsewhere into shared memory.

        Only this rank reads its gradients now, so copying them before the ranks have agreed
        changes nothing for the others.

        Returns:
            Bit mask of the parameters that have a gradient on this rank; and the bytes copied, with
            those that the adapter has copied since the last call.

        Raises:
            PartitionError: A gradient was replaced by one that does not fit.
        """
        present = 0
        new_grads: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            has_grad, grad = binding.find_new_grad()
            present |= has_grad << index
            if grad is not None:
                new_grads[index] = grad
        copied_nbytes = self._copy_grads(present, new_grads) + self.adapter.copied_nbytes
        self.adapter.copied_nbytes = 0
        return present, copied_nbytes

    def host(self, array: FloatArray) -> FloatArray:
        """Return the values of an array of a user's, wherever it is, as a NumPy array."""
        return self._holder.host(array) if is_on_device(array) else array

    def find_replaced(self) -> dict[int, FloatArray]:
        """Find arrays that have taken the place of parameters' views, by parameter index.

        Raises:
            PartitionError: One has another shape or dtype.
        """
        replaced: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            data = binding.find_new_data()
            if data is not None:
                replaced[index] = data
        return read_before_write(replaced, self.shared)

    def adopt(self, replaced: Mapping[int, FloatArray], winners: Container[int]) -> int:
        """Bind replaced parameters to shared memory again.

        Args:
            replaced: See ``find_replaced``.
            winners: The parameters whose new value this rank writes into shared memory.

        Returns:
            Bytes written.
        """
        copied_nbytes = 0
        for index, array in replaced.items():
            binding = self.bindings[index]
            if index in winners:
                self._holder.copy(binding.data, array)
                copied_nbytes += binding.data.nbytes
            binding.bind_data()
        if copied_nbytes:
            self._holder.wait()  # hosts read it, too
        return copied_nbytes

    def bump_version(self, present: int) -> None:
        """Report to the framework that the parameters of a bit mask have new values."""
        if self._of_mask[0] != present:
            params = [b.param for index, b in enumerate(self.bindings) if present >> index & 1]
            self._of_mask = present, params
        self.adapter.bump_version(self._of_mask[1])

    def rebind(self) -> None:
        """Make every parameter show shared memory, whatever has taken its place; its value is new.

        A loaded checkpoint is there.
        """
        for binding in self.bindings:
            binding.bind_data()
        self.adapter.bump_version([binding.param for binding in self.bindings])

    def cleared_by(self, *, set_to_none: bool) -> list[bool]:
        """Return for each parameter whether ``zero_grad`` leaves it without a gradient.

        Args:
            set_to_none: Leave all without; else one that has none may stay so, if that is what its
                framework does.
        """
        if set_to_none:
            return [True] * len(self.bindings)
        if self.adapter.grads_from_start:
            return [False] * len(self.bindings)
        return [not binding.has_grad() for binding in self.bindings]

    def zero_pending(self, *, set_to_none: bool) -> None:
        """Zero the gradients of parameters that no call has taken over yet, or remove them."""
        for param in self.pending():
            if not hasattr(param, "grad"):
                continue  # whoever takes it over reports it
            if set_to_none:
                param.grad = None
                continue
            grad = self.adapter.grad(param, "of an edited group")
            if grad is not None:
                self._holder.zero(grad)
            elif self.adapter.grads_from_start:
                data = self.adapter.data(param, "of an edited group")
                param.grad = self._holder.duplicate(data)
                self._holder.zero(param.grad)

    def zero_grads(self) -> None:
        """Zero this rank's gradients in shared memory."""
        for grads in self._live_grads():
            self._holder.zero(grads)

    def scale_grads(self, factor: float) -> None:
        """Multiply this rank's gradients in shared memory."""
        for grads in self._live_grads():
            self._holder.scale(grads, factor)

    def mask_of_live(self) -> int:
        """Return the bit mask of the parameters whose gradients are in use."""
        return sum(1 << index for index, binding in enumerate(self.bindings) if binding.is_live)

    def find_written(self) -> list[int]:
        """Return the parameters that the framework has seen written to since ``note_values``."""
        return [i for i, b in enumerate(self.bindings) if self.adapter.was_written(b.param)]

    def note_values(self, bindings: Sequence[Binding] | None = None) -> None:
        """Have the framework look for writes to some parameters, or to all, from now on."""
        for binding in self.bindings if bindings is None else bindings:
            self.adapter.note_value(binding.param)

    def _live_grads(self) -> list[FloatArray]:
        """Return the memory of gradients that are in use; see ``Binding.is_live``."""
        is_live = [binding.is_live for binding in self.bindings]
        if self._live[0] != is_live:
            mask = int("".join("01"[live] for live in reversed(is_live)), 2)
            grads = [
                buffers.grads[buffers.local(run).slice]
                for region, buffers in enumerate(self._buffers)
                for run in self.partition.runs(region, mask)
            ]
            self._live = is_live, grads
        return self._live[1]

    def bind_present(self, params: int) -> None:
        """Bind the gradients of a bit mask of parameters, which count as present from now on."""
        for index, binding in enumerate(self.bindings):
            if params >> index & 1:
                binding.bind_grad()

    def names_of(self, params: int) -> list[str]:
        """Return the names of a bit mask of parameters."""
        return [b.name for index, b in enumerate(self.bindings) if params >> index & 1]

    def bind_grads(self, cleared: Sequence[bool]) -> None:
        """Bind gradients that have been zeroed in shared memory, or leave parameters without.

        Args:
            cleared: See ``cleared_by``.
        """
        for binding, none in zip(self.bindings, cleared, strict=True):
            if none:
                binding.clear_grad()
            else:
                binding.bind_grad()

    def _copy_grads(self, present: int, new_grads: Mapping[int, FloatArray]) -> int:
        """Copy all gradients that are elsewhere into shared memory, and return their bytes."""
        values = read_before_write(new_grads, self.shared)
        for index, binding in enumerate(self.bindings):
            if index in values:
                binding.write_grad(values[index])
            elif not present >> index & 1:
                binding.zero_grad()
        return sum(array.nbytes for array in values.values())


def describe_hypers(hypers: Sequence[Hyperparams], first_group: int = 0) -> dict[str, object]:
    """Describe the hyperparameters of groups by name."""
    return {
        f"{name} of param group {index}": getattr(hyper, name)
        for index, hyper in enumerate(hypers, first_group)
        for name in hyper.names()
    }
