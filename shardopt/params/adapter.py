"""How the core reads and binds a framework's parameters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from shardopt._typing import FloatArray
from shardopt.errors import CheckpointError, PartitionError
from shardopt.params.model import ModelContent
from shardopt.rule.hyperparams import Hyperparams
from shardopt.trace import Annotate

P = TypeVar("P", contravariant=True)


class ParamsListener(Protocol):
    """Waits for parameters that are about to be read, and knows which have got gradients."""

    def need(self, params: Sequence[Any]) -> None:
        """Wait for the parameters of a module, which are always given in the same sequence."""
        ...

    def finish(self) -> None:
        """Wait for all parameters."""
        ...

    def reach(self, param: Any) -> None:
        """Note that backward has computed a gradient of a parameter."""
        ...


class Adapter(Protocol[P]):
    """The bridge between the core and a framework's parameters; each framework has one.

    Arrays that ``data`` and ``grad`` return share memory with what the parameter holds, where its
    framework allows. A *view* is the framework's own object over shared memory.

    Attributes:
        grads_from_start: A parameter has a gradient of zeros from the start, to be added to; else
            it has none until its framework or its user sets one.
        reports_grads: The framework reports what backward has accumulated; see ``on_grad_ready``.
        reports_forward: The framework reports what forward needs; see ``on_params_needed``.
        shows_averages: A bound gradient is the average over all ranks, not this rank's own; see
            [Note: what p.grad is in stage 2].
        widens_grads: Averages of 16-bit gradients can be shown in float32.
        step_dtype: Of step counts in the state.
        annotate: Shows spans to the framework's profiler; None if it has none.
        copied_nbytes: Bytes of gradients that the adapter has copied into views since somebody set
            it to 0.
    """

    grads_from_start: bool
    reports_grads: bool
    reports_forward: bool
    shows_averages: bool
    widens_grads: bool
    step_dtype: str
    annotate: Annotate | None
    copied_nbytes: int

    def name(self, param: P) -> str | None:
        """Return the parameter's own name, or None."""
        ...

    def data(self, param: P, name: str) -> FloatArray:
        """Return its value; ``name`` is for messages.

        Raises:
            PartitionError: It is not a dense floating-point array in this machine's memory.
        """
        ...

    def grad(self, param: P, name: str) -> FloatArray | None:
        """Return its gradient, or None.

        Raises:
            PartitionError: It is not such an array.
        """
        ...

    def value(self, value: Any, name: str) -> FloatArray:
        """Return a value for a parameter, as its framework has it, in the form of ``data``.

        Raises:
            PartitionError: It is not such an array.
        """
        ...

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """Return a parameter's entry in a state dict, maybe the framework's own, as torch has it.

        Moments must be arrays, of real numbers in the form that ``data`` returns.
        """
        ...

    def device(self, param: P) -> str:
        """Return where the parameter is: ``cpu``, or a device such as ``cuda:0``."""
        ...

    def current_queue(self) -> int:
        """Return the queue that the framework's work on the device goes to now; 0 on the host."""
        ...

    def note_value(self, param: P) -> None:
        """Look for writes to the parameter's value from now on, where pages do not show them."""
        ...

    def was_written(self, param: P) -> bool:
        """Whether the framework has seen a write to the value since ``note_value``."""
        ...

    def requires_grad(self, param: P) -> bool:
        """Whether the framework computes gradients of it; others may still be given one."""
        ...

    def keeps_full_state(self, param: P) -> bool:
        """Whether its moments are to keep all their bits, whatever the policy says."""
        ...

    def from_array(self, array: FloatArray, like: P | None) -> Any:
        """Return the framework's own array over an array of the state.

        Args:
            array: Its memory, which the two share.
            like: A parameter of the kind that it has, as its form is that of ``data``; None if it
                is just real numbers.
        """
        ...

    def from_number(self, number: FloatArray) -> Any:
        """Return a step count, or the like, [] as it stands in state dicts."""
        ...

    def view(self, param: P, array: FloatArray) -> Any:
        """Return the object that ``param`` is to hold for ``array``, which has ``data``'s form."""
        ...

    def bind_data(self, param: P, view: Any) -> None:
        """Make a view the value."""
        ...

    def bind_grad(self, param: P, view: Any) -> None:
        """Make a view the gradient."""
        ...

    def clear_grad(self, param: P, view: Any) -> None:
        """Make it a parameter without a gradient.

        The view, which holds zeros, may stay bound if the adapter notices when it is written to,
        and should for a parameter that requires a gradient.
        """
        ...

    def unbind_grad(self, param: P) -> None:
        """Make it a parameter without a gradient that holds no view."""
        ...

    def holds_data(self, param: P, view: Any) -> bool:
        """Whether the value is still the view."""
        ...

    def holds_grad(self, param: P, view: Any) -> bool:
        """Whether the gradient is still the view."""
        ...

    def is_clear(self, param: P, view: Any) -> bool:
        """Whether a view that is bound has been cleared and not been written to since."""
        ...

    def bump_version(self, params: Sequence[P]) -> None:
        """Note that the values of some parameters have changed."""
        ...

    def on_grad_ready(self, listener: Callable[[Any], None]) -> None:
        """Call ``listener`` with each parameter whose gradient backward has accumulated into."""
        ...

    def on_params_needed(self, listener: ParamsListener | None) -> None:
        """Name a listener that is told of parameters before they are read; None ends that."""
        ...

    def on_backward(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` whenever backward has accumulated into a gradient, or no longer.

        It is called before ``on_grad_ready``'s, and before the gradient is moved anywhere.
        """
        ...

    def on_backward_ends(self, on_start: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Call listeners before a backward accumulates anything, and at its end."""
        ...

    def on_fault(self, listener: Callable[[Exception], None]) -> None:
        """Call ``listener`` with errors that steps are to raise on all ranks."""
        ...

    def on_grad_read(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when somebody uses an average that ``bind_grad`` has bound."""
        ...

    def note_averages(self, *, are_shown: bool) -> None:
        """Note whether averages that are bound can be used; if not, that raises."""
        ...

    def end_backward(self) -> None:
        """Report what a backward has left to report, as one that has raised does."""
        ...

    def own_grad(self, param: P, view: Any, *, zeros: bool) -> None:
        """Make the gradient a copy of a view, or zeros, in memory of its own."""
        ...

    def grad_factors(self) -> Mapping[int, tuple[Sequence[float], Sequence[float]]]:
        """Return by what averages have been multiplied.

        Returns:
            By the ``id`` of the parameter, the factors that have been written to its elements on
            this rank, in order; and those behind them that have not.
        """
        ...

    def forget_factors(self, param: P) -> None:
        """Note that its average has been multiplied, or is no more."""
        ...

    def grad_version(self, param: P) -> object:
        """Return an object that differs once the framework has seen a write to the gradient."""
        ...

    def were_grads_written(self, num_allowed: int) -> bool:
        """Whether a gradient was written to since the last backward that reached it.

        Only what has happened since the last call counts, as far as the framework sees it.

        Args:
            num_allowed: The number of writes to each gradient that do not count.
        """
        ...

    def detach(self, param: P) -> None:
        """Take away whatever the adapter attached to the parameter; its gradient stays."""
        ...

    def release(self, param: P) -> None:
        """Leave the parameter without a gradient and without anything the adapter attached."""
        ...

    def read_model(
        self, model: Any, params: Sequence[P], saved: Collection[str] | None
    ) -> ModelContent:
        """Return what a checkpoint needs of a model; its tensors are not copied.

        Args:
            model: The model.
            params: The parameters of the optimizer.
            saved: The names of the parameters in the checkpoint to be loaded; None for a save.

        Raises:
            CheckpointError: It is no model of this framework.
        """
        ...

    def load_model(
        self, model: Any, params: Sequence[P], content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        """Load values into a model.

        Args:
            model: The model.
            params: The parameters of the optimizer, which have been loaded.
            content: What ``read_model`` has returned, with the versions of the checkpoint.
            values: Tensors, arrays and others, by the names of ``content.values``.

        Returns:
            The model, a new one where models never change; and the names of the values that it did
            not take.
        """
        ...

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check those settings of a param group that only its framework knows.

        Raises:
            HyperparamsError: One asks for what a step cannot do.
        """
        ...


def array_error(role: str, name: str, *, rule: str, got: object, remedy: str) -> PartitionError:
    """Return the error for a value or gradient that is not an array the core can use.

    Args:
        role: ``data`` or ``grad``.
        name: The parameter's name.
        rule: The rest of "must be ...".
        got: The value, or its type.
        remedy: A sentence without its full stop.
    """
    return PartitionError(f"{role} of parameter {name!r} must be {rule}; got {got}. {remedy}.")


def model_error(rule: str, got: object, remedy: str) -> CheckpointError:
    """Return the error for a model that is none of the optimizer's framework."""
    return CheckpointError(f"model must be {rule}; got a {type(got).__name__}. {remedy}.")
