"""The model to plan for: the shapes and dtypes of its parameters, and where they come from."""

import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from shardopt.errors import PlanError
from shardopt.layout.dtypes import DTYPES
from shardopt.layout.partition import ParamSpec

_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_FRAMEWORKS = {"torch", "jax", "jaxlib", "lucid", "numpy", "cupy"}
_MAX_HEADER_NBYTES = 100 << 20  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class Model:
    """The parameters of a model.

    Attributes:
        source: Where they come from, for people.
        specs: Their shapes and dtypes, in order.
        trained: Whether each is trained.
        embeddings: Names of those that are weights of embeddings, as far as that is known.
        framework: The package of its arrays, such as ``torch``; None if nobody knows.
    """

    source: str
    specs: tuple[ParamSpec, ...]
    trained: tuple[bool, ...]
    embeddings: frozenset[str] = frozenset()
    framework: str | None = None

    @property
    def has_hooks(self) -> bool:
        """Whether its framework reports gradients and reads of parameters, if nobody knows it."""
        return self.framework in (None, "torch")

    @property
    def shows_averages(self) -> bool:
        """Whether its framework can show averages in the place of gradients, if nobody knows it."""
        return self.has_hooks or self.framework in ("jax", "jaxlib", "lucid")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(spec.numel for spec in self.specs)

    @property
    def coded_numel(self) -> int:
        """Number of elements with moments of 8 bits."""
        return sum(spec.numel for spec in self.trained_specs if spec.form.optim_bits == 8)

    @property
    def trained_specs(self) -> list[ParamSpec]:
        """The parameters that are trained."""
        return [spec for spec, trains in zip(self.specs, self.trained, strict=True) if trains]


def evenly(numel: int, dtype: str, num_tensors: int) -> Model:
    """Return a model of ``num_tensors`` parameters that are equally large but for one element.

    Raises:
        PlanError: The dtype is not one of parameters.
    """
    num_tensors = min(num_tensors, numel)
    cuts = [numel * i // num_tensors for i in range(num_tensors + 1)]
    shapes = [(f"p{i}", (cuts[i + 1] - cuts[i],), dtype, True) for i in range(num_tensors)]
    return _make(f"{numel:,} parameters in {num_tensors} equal tensors", shapes)


def read_safetensors(paths: Sequence[Path]) -> Model:
    """Read the shapes in the headers of files of one model; no tensor is read.

    The format is that of https://github.com/huggingface/safetensors: eight bytes with the length
    of the header, little-endian, and the header as JSON.

    Raises:
        PlanError: A file has another format, or tensors of a dtype that cannot be trained.
        OSError: A file cannot be read.
    """
    shapes = []
    for path in paths:
        for name, entry in _read_header(path).items():
            dtype = _SAFETENSORS.get(entry["dtype"], entry["dtype"])
            shapes.append((name, tuple(entry["shape"]), dtype, True))
    return _make(", ".join(path.name for path in paths), shapes)


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        body = file.read(length) if length <= _MAX_HEADER_NBYTES else b""
    try:
        header = {k: entry for k, entry in json.loads(body).items() if k != "__metadata__"}
        sizes = [size for entry in header.values() for size in entry["shape"]]
        is_valid = all(type(size) is int and size >= 0 for size in sizes)
        is_valid = is_valid and all(type(entry["dtype"]) is str for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise PlanError(
            f"--safetensors must name files in the format safetensors; got {str(path)!r}. Its "
            "header cannot be read."
        )
    return header


def load_model(target: str) -> Model:
    """Run a script and take the shapes of what one of its functions returns.

    No parameter is allocated where the framework can do without: modules of PyTorch are made on
    the device ``meta``, and where the script imports JAX, its function is only traced.

    Args:
        target: ``script.py:make_model``. The function takes no arguments and returns a module, or
            arrays in dicts, lists and tuples.

    Raises:
        PlanError: There is no such script or function, or it returns no parameters.
    """
    path, _, name = target.rpartition(":")
    if not path or not Path(path).is_file():
        raise PlanError(
            f"--model must be script.py:function; got {target!r}. Name a file and a function in it."
        )
    folder, before = str(Path(path).resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)  # a script may import its neighbours, as when it is started
    try:
        names = runpy.run_path(path)
        uses_jax = "jax" not in before or any(map(_is_of_jax, names.values()))
        made = _call(_function(path, name, names.get(name)), uses_jax=uses_jax)
    finally:
        sys.path.remove(folder)
    model = _make(target, list(_shapes_of(made)))
    embeddings = frozenset(_embeddings_of(made))
    return replace(model, embeddings=embeddings, framework=_framework_of(made))


def _function(path: str, name: str, found: object) -> Callable[[], Any]:
    if callable(found):
        return found
    raise PlanError(
        f"--model must name a function in {path}; got {name!r}. There is none of that name."
    )


def _is_of_jax(value: Any) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(module).partition(".")[0] == "jax"


def _call(make: Callable[[], Any], *, uses_jax: bool) -> Any:
    """Call the function without allocating what it makes, as far as its framework can do that."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax") if uses_jax else None
    with ExitStack() as stack:
        if torch is not None:
            stack.enter_context(torch.device("meta"))
        if jax is not None:
            try:
                return jax.eval_shape(make)
            except TypeError:  # it returns something that JAX does not know
                pass
        return make()


def _shapes_of(model: Any, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...], str, bool]]:
    """Yield name, shape, dtype and whether it is trained, of each parameter."""
    if hasattr(model, "named_parameters"):
        for name, param in model.named_parameters():
            yield name, tuple(param.shape), _dtype_name(param.dtype), bool(param.requires_grad)
        return
    if hasattr(model, "shape") and hasattr(model, "dtype"):
        yield prefix or "param", tuple(model.shape), _dtype_name(model.dtype), True
        return
    if isinstance(model, Mapping):
        items = [(str(key), value) for key, value in model.items()]
    elif isinstance(model, list | tuple):
        items = [(str(index), value) for index, value in enumerate(model)]
    elif hasattr(model, "data") and hasattr(model.data, "dtype"):
        items = [("", model.data)]
    else:
        raise PlanError(
            "--model must return a module, or arrays in dicts, lists and tuples; got "
            f"{type(model).__name__}{f' at {prefix}' if prefix else ''}. Return its parameters."
        )
    for key, value in items:
        yield from _shapes_of(value, f"{prefix}.{key}".strip("."))


def _framework_of(model: Any) -> str | None:
    """Return the package that the first of some arrays comes from, or None if nobody knows.

    For an object of a user's own class that is the package of a class that it extends, or of the
    array that it holds.
    """
    if hasattr(model, "named_parameters"):
        model = [param for _, param in model.named_parameters()]
    elif isinstance(model, Mapping):
        model = list(model.values())
    if isinstance(model, list | tuple):
        return next(filter(None, map(_framework_of, model)), None)
    packages = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    found = next((package for package in packages if package in _FRAMEWORKS), None)
    if found is None and hasattr(model, "data") and hasattr(model.data, "dtype"):
        return _framework_of(model.data)
    return found


def _embeddings_of(model: Any) -> Iterator[str]:
    """Yield the names of weights of embeddings, which ``shardopt.torch`` keeps moments of apart."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        return
    kinds = torch.nn.Embedding, torch.nn.EmbeddingBag
    weights = {id(each.weight) for each in model.modules() if isinstance(each, kinds)}
    for name, param in model.named_parameters():
        if id(param) in weights:
            yield name


def _dtype_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def _make(source: str, shapes: Sequence[tuple[str, tuple[int, ...], str, bool]]) -> Model:
    for name, _, dtype, _ in shapes:
        if dtype not in DTYPES:
            raise PlanError(
                f"parameters must be {', '.join(DTYPES)}; got {dtype} for {name!r}. Leave out what "
                "is not trained."
            )
    if not any(math.prod(shape) for _, shape, _, _ in shapes):
        raise PlanError(f"a model must have parameters; got none from {source}. Name another one.")
    specs = tuple(ParamSpec(name, shape, dtype, 0) for name, shape, dtype, _ in shapes)
    return Model(source, specs, tuple(trained for *_, trained in shapes))
