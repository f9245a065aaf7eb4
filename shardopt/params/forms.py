"""How the state of each parameter is to be kept, as policy and param groups ask for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardopt.backends.devices import HOST
from shardopt.errors import HyperparamsError, PartitionError
from shardopt.layout.partition import ParamSpec
from shardopt.layout.state_spec import FULL, MIN_CODED_NUMEL, StateForm

BITS_KEY = "optim_bits"
"""The key of a param group whose value takes the place of the policy's."""


@dataclass(frozen=True, slots=True)
class FormRules:
    """The rules by which the state of new parameters is kept.

    Attributes:
        optim_bits: As in ``ShardPolicy``.
        master_weights: Likewise.
    """

    optim_bits: int = 32
    master_weights: bool | None = None

    def bits_of(self, group: Mapping[str, Any]) -> int:
        """Return the bits of moments that a param group asks for.

        Raises:
            HyperparamsError: There are no such moments.
        """
        bits = group.get(BITS_KEY)
        if bits is None:
            return self.optim_bits
        if type(bits) is not int or bits not in (8, 32):
            raise HyperparamsError(
                f"{BITS_KEY} of a param group must be 8 or 32; got {bits!r}. Leave it out for that "
                "of the policy."
            )
        return bits

    def form(self, spec: ParamSpec, bits: int, device: str) -> StateForm:
        """Return how the state of a new parameter is kept.

        Args:
            spec: The parameter.
            bits: Of its moments, as its group asks for.
            device: Where it is.

        Raises:
            PartitionError: Its state cannot be kept as asked for.
        """
        name, dtype = spec.name, spec.dtype
        bits = bits if spec.numel >= MIN_CODED_NUMEL else 32
        if bits == 8 and dtype == "float64":
            raise _wrong(name, "float32, bfloat16 or float16", "moments of 8 bits", dtype, _GROUP)
        if self.master_weights is False and dtype == "float16":
            remedy = "Leave master_weights out, as float16 has too small a range, or use bfloat16"
            raise _wrong(name, "bfloat16", "master_weights=False", dtype, remedy)
        form = StateForm(
            optim_bits=bits,
            has_masters=not (self.master_weights is False and dtype == "bfloat16"),
        )
        if form != FULL and device != HOST:
            what = "optim_bits=8" if form.optim_bits == 8 else "master_weights=False"
            raise _wrong(name, "on the CPU", what, device, "Leave it out of the policy")
        return form


_GROUP = f"Put it into a param group with {BITS_KEY}=32"


def _wrong(name: str, rule: str, what: str, got: str, remedy: str) -> PartitionError:
    return PartitionError(f"parameter {name!r} must be {rule} for {what}; got {got}. {remedy}.")


def require_same_form(name: str, form: StateForm, before: StateForm) -> None:
    """Refuse to keep the state of a parameter that is there already in another form.

    Raises:
        HyperparamsError: Its group asks for that.
    """
    if form != before:
        raise HyperparamsError(
            f"{BITS_KEY} of the group of parameter {name!r} must stay {before.optim_bits}, as when "
            f"it was added; got {form.optim_bits}. Put it into a group that has the same, or build "
            "a new optimizer and load the state of this one."
        )


def require_same_bits(index: int, group: Mapping[str, Any], before: object) -> None:
    """Refuse another number of bits for parameters that are there already.

    Args:
        index: Number of the group.
        group: As its user has it now.
        before: What it asked for when its parameters were added.

    Raises:
        HyperparamsError: It asks for something else.
    """
    if (bits := group.get(BITS_KEY)) != before:
        raise HyperparamsError(
            f"{BITS_KEY} of param_groups[{index}] must stay as it was when its parameters were "
            f"added, {before!r}; got {bits!r}. Build a new optimizer with it, and load the state "
            "of this one."
        )
