"""Tensors of frameworks in what users save: as arrays on the way out, as tensors on the way back.

A framework's front end knows its tensors, and is loaded by name when one is met. So a checkpoint
can be read where the framework is not installed; its tensors are NumPy arrays then.
"""

from importlib import import_module
from typing import Any

import numpy as np

from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.values import Array

_FRONT_ENDS = {
    "torch": "shardopt.torch.tensors",
    "jax": "shardopt.jax.arrays",
    "lucid": "shardopt.lucid",
}
_PACKAGES = {"torch": "torch", "jax": "jax", "jaxlib": "jax", "lucid": "lucid"}


def store(value: Any) -> tuple[Array, str] | None:
    """Return a tensor's array and form, or None if it is no framework's tensor.

    Raises:
        TypeError: It is a tensor that cannot be saved; likewise ``ValueError``, ``RuntimeError``.
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return None
    for kind in type(value).__mro__:
        framework = _PACKAGES.get(kind.__module__.partition(".")[0])
        if framework is not None:
            stored: tuple[Array, str] = import_module(_FRONT_ENDS[framework]).to_stored(value)
            return stored
    return None


def dtype_and_shape(value: Any) -> tuple[str | None, tuple[int, ...] | None]:
    """Return what is stored of a value if it is an array or tensor, or None twice.

    Raises:
        TypeError: It is a tensor that cannot be saved; likewise ``ValueError``, ``RuntimeError``.
    """
    if isinstance(value, np.generic) or not hasattr(value, "shape"):
        return None, None
    array, form = store(value) or (value, "")
    return dtype_of(array.dtype.name, form), tuple(array.shape)


def dtype_of(dtype: str, form: str) -> str:
    """Return the name of a tensor's dtype, given its form and that of the array it is stored as."""
    return form.rpartition(".")[2] or dtype


class Reviver:
    """Makes tensors of arrays, by their forms.

    Attributes:
        notes: What could not be revived, and why.
    """

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}

    def __call__(self, array: Array, form: str) -> Any:
        """Return the tensor that was saved; the array itself if it was one.

        Raises:
            DamagedCheckpointError: The array is not of that form.
        """
        framework = form.partition(".")[0]
        if not form:
            return array
        try:
            front_end = import_module(_FRONT_ENDS[framework])
        except (ImportError, KeyError):
            text = f"tensors of {framework}, which cannot be imported, came back as NumPy arrays"
            self.notes[text] = None
            return array
        try:
            return front_end.from_stored(array, form)
        except NotImplementedError as error:
            self.notes[f"{error}, came back as NumPy arrays"] = None
            return array
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise damaged("an array", f"be of the form {form}", str(error)) from error
