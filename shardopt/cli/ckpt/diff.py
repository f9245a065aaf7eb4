"""``shardopt ckpt diff``."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardopt.checkpoint.format.manifest import Manifest
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.compare import array_bytes_equal, compare
from shardopt.cli.ckpt.contents import (
    StoredArray,
    abbreviate,
    decode_extra,
    decode_groups,
    decode_model,
    flatten,
)
from shardopt.cli.ckpt.find import require_one
from shardopt.cli.ckpt.pieces import Tensor, model_tensors, param_tensor

_ABSENT = object()
_FIELDS = ("dtype", "shape", "group", "step", "mu_product")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="checkpoint")
    parser.add_argument(
        "b", type=Path, metavar="B", help="another checkpoint, saved by any number of ranks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Compare two checkpoints."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(_open(path)) for path in (options.a, options.b))
        values = [*_differing_values(a, b), *_differing_params(a.manifest, b.manifest)]
        pairs = dict(_pairs(a.manifest, b.manifest))
        distances = compare(a, b, pairs)
    tensors = [
        {"name": tensor.name, "numel": tensor.numel, **asdict(distance)}
        for tensor, distance in distances.items()
        if distance.different
    ]
    equal = not values and not tensors
    if options.json:
        counts = {"equal": equal, "compared": len(pairs)}
        text.print_json({**counts, "values": values, "tensors": tensors})
    else:
        _report(values, tensors, len(pairs))
    return Exit.FINE if equal else Exit.PROBLEMS


def _open(path: Path) -> Reader:
    reader = Reader(path, read_manifest(require_one(path)))
    reader.require_files()  # opens no file
    return reader


def _pairs(a: Manifest, b: Manifest) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors that both checkpoints have, in equal shapes."""
    indices = {param.name: index for index, param in enumerate(b.params)}
    for index, param in enumerate(a.params):
        other = indices.get(param.name)
        if other is not None and b.params[other].shape == param.shape:
            for key in param.tensors:
                if key in b.params[other].tensors:
                    yield param_tensor(a, index, key), param_tensor(b, other, key)
    theirs = {tensor.name: tensor for tensor in model_tensors(b)}
    for tensor in model_tensors(a):
        if tensor.name in theirs and theirs[tensor.name].shape == tensor.shape:
            yield tensor, theirs[tensor.name]


def _differing_values(a: Reader, b: Reader) -> Iterator[dict[str, Any]]:
    """Yield the differing values outside of parameters, as None where one has no such value."""
    ours, theirs = _values(a.manifest), _values(b.manifest)
    for name in ours | theirs:
        x, y = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
        same = repr(x) == repr(y)  # tells 1 from 1.0, and makes NaN equal to NaN
        if same and isinstance(x, StoredArray) and isinstance(y, StoredArray):
            if not array_bytes_equal(a, x, b, y):
                yield {"name": name, "a": str(x), "b": "other numbers"}
        elif not same:
            yield {"name": name, "a": _shown(x), "b": _shown(y)}


def _differing_params(a: Manifest, b: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the differing fields of parameters; those with the same difference share an entry."""
    ours, theirs = ({param.name: param for param in m.params} for m in (a, b))
    found: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name in ours | theirs:
        pair = ours.get(name), theirs.get(name)
        for field in _FIELDS if None not in pair else ("shape",):
            x, y = (None if p is None else abbreviate(getattr(p, field)) for p in pair)
            if x != y:
                found.setdefault((field, x, y), []).append(name)
    for (field, x, y), names in found.items():
        yield {"name": field, "params": names, "a": x, "b": y}


def _values(manifest: Manifest) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": manifest.step,
        "optimizer": manifest.optimizer,
        "optimizer steps": manifest.num_steps,
        "loss scale": manifest.loss_scale,
    }
    values.update(flatten(decode_groups(manifest), "param_groups"))
    values.update(flatten(decode_extra(manifest), "extra"))
    tensors = {tensor.name for tensor in model_tensors(manifest)}
    for name, value in decode_model(manifest).items():
        # The elements of tensors are compared by ``compare``.
        values.update([(name, value.form)] if name in tensors else flatten(value, name))
    return values


def _shown(value: Any) -> str | None:
    return None if value is _ABSENT else abbreviate(value)


def _report(values: list[dict[str, Any]], tensors: list[dict[str, Any]], compared: int) -> None:
    if values:
        rows = ((_label(v), v["a"] or "-", v["b"] or "-") for v in values)
        print(text.table(("value", "A", "B"), rows), end="\n\n")
    if tensors:
        heads = ("tensor", ">different", ">of", ">NaN in one", ">max abs", ">max rel")
        print(text.table(heads, map(_row, tensors)), end="\n\n")
    print(f"{compared - len(tensors)} of {compared} tensors are equal, {len(values)} values differ")


def _label(value: dict[str, Any]) -> str:
    names = value.get("params")
    return f"{value['name']} of {text.some(names, 3)}" if names else str(value["name"])


def _row(tensor: dict[str, Any]) -> tuple[str, ...]:
    counts = (tensor["different"], tensor["numel"], tensor["nan_in_one"])
    sizes = (tensor["max_abs"], tensor["max_rel"])
    return (tensor["name"], *map(str, counts), *(f"{size:.3g}" for size in sizes))


COMMAND = Command(
    name="diff",
    summary="compare two checkpoints",
    details=(
        "Compares steps, hyperparameters, extra, and every parameter, state array and tensor of\n"
        "the model, no matter how many ranks saved them. NaN equals NaN. 'max rel' is relative\n"
        "to the larger of the two numbers. Files with equal digests are not read: 'verify' does\n"
        "that."
    ),
    example="shardopt ckpt diff runs/a/step-000000012000 runs/b/step-000000012000",
    exit_codes=("they are equal", "they differ, or one is damaged"),
    add_arguments=add_arguments,
    run=run,
)
