"""``shardopt ckpt merge``."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardopt.checkpoint.format.disk import sync_folder
from shardopt.checkpoint.format.image import SAFETENSORS_DTYPES
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, itemsize
from shardopt.checkpoint.format.names import is_position, tensor_name
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.contents import decode_model
from shardopt.cli.ckpt.find import require_one
from shardopt.cli.ckpt.layout import MAX_HEADER_NBYTES, METADATA
from shardopt.cli.ckpt.pieces import Tensor, batches, model_tensors, param_tensor, read_batch
from shardopt.cli.progress import progress
from shardopt.errors import CheckpointError
from shardopt.layout.dtypes import DTYPES
from shardopt.layout.span import Span

_MASTER = "master"
_FLOAT8 = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
_LEFT_OUT = (
    "{count} values of the model are no tensors, and are not in the file: {names}. Set them "
    "yourself, and load with strict=False."
)
_POSITIONS = (
    "{count} names are positions (param0 ...), because the checkpoint has no names: a model's "
    "load_state_dict will not know them. Add --names FILE, or save with model= or with an "
    "optimizer that has names."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the merged file.

    Attributes:
        name: Its name.
        dtype: NumPy's name of the dtype of its elements as they are written.
        label: The name of its dtype in the header.
        shape: Its shape.
        span: Its bytes, counted from the end of the header.
    """

    name: str
    dtype: str
    label: str
    shape: tuple[int, ...]
    span: Span


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="checkpoint")
    add("out", type=Path, metavar="OUT", help="file to write, NAME.safetensors")
    add("--state", action="store_true", help="include the state, as NAME::exp_avg and so on")
    masters_help = "write 16-bit parameters as their float32 masters, under the parameters' names"
    add("--masters", action="store_true", help=masters_help)
    add("--dtype", choices=DTYPES, help="convert the model's real numbers, but not the state")
    names_help = "names of the parameters, for a checkpoint without: a JSON list, or one a line"
    add("--names", type=Path, metavar="FILE", help=names_help)
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Merge a checkpoint's files into one."""
    out: Path = options.out
    _require_free(out, options.force)
    path = require_one(options.path)
    manifest = read_manifest(path)
    if options.names is not None:
        manifest = _named(manifest, options.names)
    positions = sum(is_position(p.name, i) for i, p in enumerate(manifest.params))
    tensors = {tensor.name for tensor in model_tensors(manifest)}
    left_out = [name for name in decode_model(manifest) if name not in tensors]
    entries = _plan(manifest, options.state, options.masters, options.dtype)
    header = _header(manifest, entries)
    nbytes = len(header) + max((entry.span.stop for entry in entries.values()), default=0)
    with Reader(path, manifest) as reader:
        reader.require_files()
        with _new_file(out, options.force) as fd:
            _write(fd, header, 0)
            overflows = _copy(reader, entries, fd, len(header))
    if options.json:
        report = {"path": str(out), "tensors": len(entries), "nbytes": nbytes}
        report = {**report, "step": manifest.step, "overflows": overflows}
        text.print_json({**report, "positions": positions, "left_out": left_out})
    else:
        print(text.printable(f"{out}: {len(entries)} tensors, {text.nbytes(nbytes)}"))
    if positions:
        print(_POSITIONS.format(count=positions), file=sys.stderr)
    if left_out:
        names = text.some([text.printable(name) for name in left_out])
        print(_LEFT_OUT.format(count=len(left_out), names=names), file=sys.stderr)
    if overflows:
        print(f"{overflows} numbers overflow {options.dtype} and became inf", file=sys.stderr)
    return Exit.FINE


def _require_free(out: Path, force: bool) -> None:
    if out.exists() and not (force and out.is_file()):
        remedy = (
            "Choose another name, or add --force" if out.is_file() else "Pass the name of a file"
        )
        raise CheckpointError(f"OUT must not exist; got {str(out)!r}. {remedy}.")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(
            f"OUT must be in a folder that exists; got {str(out)!r}. Create the folder first."
        )


def _named(manifest: Manifest, file: Path) -> Manifest:
    """Return the manifest with the names of parameters in a file."""
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"--names must be a file of text; got {str(file)!r}: {error}. Write one name a line."
        ) from None
    try:
        names = json.loads(content)
    except ValueError:
        names = [line.strip() for line in content.splitlines() if line.strip()]
    count = len(manifest.params)
    texts = {name for name in names if isinstance(name, str)} if isinstance(names, list) else ()
    if len(texts) != count or len(names) != count:
        got = f"{len(texts)} in {str(file)!r}"
        raise CheckpointError(
            f"--names must be {count} different names, one for each parameter in order; got {got}. "
            "Write those of model.named_parameters()."
        )
    params = [replace(p, name=name) for p, name in zip(manifest.params, names, strict=True)]
    new = {old.name: param.name for old, param in zip(manifest.params, params, strict=True)}
    model = manifest.model
    if model is not None:
        aliases = {alias: new.get(name, name) for alias, name in model.aliases.items()}
        model = replace(model, aliases=aliases)
    return replace(manifest, params=tuple(params), model=model)


def _plan(manifest: Manifest, state: bool, masters: bool, dtype: str | None) -> dict[Tensor, Entry]:
    """Lay out the merged file, with wide dtypes first so that all tensors are aligned."""
    chosen: list[tuple[Tensor, str, str]] = []  # the tensor, its name and its dtype in the file
    for index, param in enumerate(manifest.params):
        replaced = masters and _MASTER in param.tensors
        for key in param.tensors if state else (PARAM_KEY,):
            if replaced and key == _MASTER:
                continue
            source = _MASTER if replaced and key == PARAM_KEY else key
            tensor = param_tensor(manifest, index, source)
            kind = dtype or tensor.dtype if key == PARAM_KEY else tensor.dtype
            chosen.append((tensor, tensor_name(param.name, key), kind))
    for tensor in model_tensors(manifest):
        kind = dtype or tensor.dtype if tensor.dtype in DTYPES else tensor.dtype
        chosen.append((tensor, tensor.name, kind))
    chosen += _tied(manifest, chosen)
    entries, position = {}, 0
    for tensor, name, kind in sorted(chosen, key=lambda item: -itemsize(item[2])):
        span = Span(position, position + tensor.numel * itemsize(kind))
        shape = (*tensor.shape, 2) if kind.startswith("complex") else tensor.shape
        entries[tensor] = Entry(name, kind, _label(tensor, kind), shape, span)
        position = span.stop
    return entries


def _label(tensor: Tensor, dtype: str) -> str:
    """Return the name of a dtype in the header: float8 is written as the bytes that are stored.

    Raises:
        CheckpointError: Files of safetensors have no such elements.
    """
    kind = tensor.form.rpartition(".")[2]
    if not kind.startswith("float8"):
        return SAFETENSORS_DTYPES[dtype]
    if kind not in _FLOAT8:
        raise CheckpointError(
            f"{tensor.name!r} must be of a dtype that safetensors has; got {kind}. Convert it "
            "before it is saved."
        )
    return _FLOAT8[kind]


def _tied(
    manifest: Manifest, chosen: Sequence[tuple[Tensor, str, str]]
) -> Iterator[tuple[Tensor, str, str]]:
    """Yield tied tensors under their further names, as copies: a model asks for all names."""
    first = {name: (tensor, kind) for tensor, name, kind in chosen}
    for alias, name in (manifest.model.aliases if manifest.model else {}).items():
        if name in first:
            tensor, kind = first[name]
            yield replace(tensor), alias, kind


def _header(manifest: Manifest, entries: dict[Tensor, Entry]) -> bytes:
    content: dict[str, Any] = {METADATA: {"format": "pt", "step": str(manifest.step)}}
    for entry in entries.values():
        if entry.name in content:
            raise CheckpointError(
                f"names of tensors must be unique in a file; got {entry.name!r} twice. Omit "
                "--state, or rename the parameter before it is saved."
            )
        content[entry.name] = {
            "dtype": entry.label,
            "shape": entry.shape,
            "data_offsets": [entry.span.start, entry.span.stop],
        }
    try:
        raw = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"names of tensors must be Unicode; got {error.object[error.start : error.end]!r} in "
            "one. Rename the parameter before it is saved."
        ) from None
    size = -(-len(raw) // 8) * 8
    if size > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"a safetensors header must have at most {MAX_HEADER_NBYTES} bytes; got {size}. Omit "
            "--state."
        )
    return size.to_bytes(8, "little") + raw.ljust(size)


def _copy(reader: Reader, entries: dict[Tensor, Entry], fd: int, header_nbytes: int) -> int:
    """Copy all data, and return how many finite numbers became infinite."""
    overflows = 0
    with progress("merging", sum(tensor.nbytes for tensor in entries)) as advance:
        for batch in batches(entries):
            arrays = read_batch(reader, batch, advance)
            for piece, array in zip(batch, arrays, strict=True):
                entry = entries[piece.tensor]
                with np.errstate(over="ignore", invalid="ignore"):
                    converted = array.astype(entry.dtype, copy=False)
                if converted is not array:
                    overflows += int(np.sum(np.isinf(converted) & ~np.isinf(array)))
                offset = entry.span.start + piece.span.start * itemsize(entry.dtype)
                _write(fd, converted.view(np.uint8).data, header_nbytes + offset)
    return overflows


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


@contextmanager
def _new_file(out: Path, force: bool) -> Iterator[int]:
    """Write a file that gets its name only once all of it is on disk."""
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        _require_free(out, force)  # again: writing took a while
        os.rename(part, out)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_folder(out.absolute().parent)


COMMAND = Command(
    name="merge",
    summary="write a checkpoint's model into one safetensors file",
    details=(
        "The file holds the parameters in their shapes, and the model's buffers and frozen\n"
        "parameters if it was saved with model=, for model.load_state_dict(load_file(OUT)) and\n"
        "other programs that use safetensors. Complex numbers are pairs of real ones. Everything\n"
        "that is read is verified. OUT appears only once it is complete."
    ),
    example="shardopt ckpt merge runs/7b/step-000000012000 7b.safetensors --dtype bfloat16",
    exit_codes=("OUT was written", "the checkpoint is damaged; OUT was not written"),
    add_arguments=add_arguments,
    run=run,
)
