"""``shardopt ckpt merge``."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardopt.checkpoint.format.disk import sync_folder
from shardopt.checkpoint.format.image import SAFETENSORS_DTYPES
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, itemsize
from shardopt.checkpoint.format.names import tensor_name
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.ckpt.find import require_one
from shardopt.cli.ckpt.layout import MAX_HEADER_NBYTES, METADATA
from shardopt.cli.ckpt.pieces import Tensor, batches, read_batch
from shardopt.cli.progress import progress
from shardopt.errors import CheckpointError
from shardopt.layout.dtypes import DTYPES, has_master
from shardopt.layout.span import Span

_MASTER = "master"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the merged file.

    Attributes:
        name: Its name.
        dtype: NumPy's name of its dtype.
        shape: Its shape.
        span: Its bytes, counted from the end of the header.
    """

    name: str
    dtype: str
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
    add("--dtype", choices=DTYPES, help="convert the parameters, but not the state")
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Merge a checkpoint's files into one."""
    out: Path = options.out
    _require_free(out, options.force)
    path = require_one(options.path)
    manifest = read_manifest(path)
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
        text.print_json({**report, "step": manifest.step, "overflows": overflows})
    else:
        print(text.printable(f"{out}: {len(entries)} tensors, {text.nbytes(nbytes)}"))
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


def _plan(manifest: Manifest, state: bool, masters: bool, dtype: str | None) -> dict[Tensor, Entry]:
    """Lay out the merged file, with wide dtypes first so that all tensors are aligned."""
    chosen = []
    for index, param in enumerate(manifest.params):
        replaced = masters and has_master(param.dtype)
        for key in param.tensors if state else (PARAM_KEY,):
            if replaced and key == _MASTER:
                continue
            source = _MASTER if replaced and key == PARAM_KEY else key
            kept = param.dtype_of(source)
            name = tensor_name(param.name, key)
            chosen.append(
                (Tensor(index, source), name, dtype or kept if key == PARAM_KEY else kept)
            )
    entries, position = {}, 0
    for tensor, name, kind in sorted(chosen, key=lambda item: -itemsize(item[2])):
        param = manifest.params[tensor.param]
        span = Span(position, position + param.numel * itemsize(kind))
        entries[tensor] = Entry(name, kind, param.shape, span)
        position = span.stop
    return entries


def _header(manifest: Manifest, entries: dict[Tensor, Entry]) -> bytes:
    content: dict[str, Any] = {METADATA: {"format": "pt", "step": str(manifest.step)}}
    for entry in entries.values():
        if entry.name in content:
            raise CheckpointError(
                f"names of tensors must be unique in a file; got {entry.name!r} twice. Omit "
                "--state, or rename the parameter before it is saved."
            )
        content[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
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
    params = reader.manifest.params
    total = sum(params[t.param].numel * itemsize(params[t.param].dtype_of(t.key)) for t in entries)
    with progress("merging", total) as advance:
        for batch in batches(reader.manifest, entries):
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
    summary="write a checkpoint's parameters into one safetensors file",
    details=(
        "The file holds the parameters in their shapes, for inference or other programs that use\n"
        "safetensors.torch.load_file. Everything that is read is verified. OUT appears only once\n"
        "it is complete."
    ),
    example="shardopt ckpt merge runs/7b/step-000000012000 7b.safetensors --dtype bfloat16",
    exit_codes=("OUT was written", "the checkpoint is damaged; OUT was not written"),
    add_arguments=add_arguments,
    run=run,
)
