"""The arrays in a checkpoint's files, by the manifest and by the files' own headers."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardopt.checkpoint.format.fields import Fields, damaged, parse_json
from shardopt.checkpoint.format.image import SAFETENSORS_DTYPES
from shardopt.checkpoint.format.manifest import Manifest
from shardopt.checkpoint.format.names import extra_name, tensor_name
from shardopt.errors import DamagedCheckpointError
from shardopt.layout.span import Span

MAX_HEADER_NBYTES = 100_000_000  # safetensors' own limit
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, order=True)
class FileSpan(Span):
    """The bytes of a flat array in a file.

    Attributes:
        name: Name of the tensor that the array is part of.
        dtype: safetensors' name of its dtype.
    """

    name: str
    dtype: str


def layout(manifest: Manifest) -> list[list[FileSpan]]:
    """Return the arrays of each file, in order."""
    files: list[list[FileSpan]] = [[] for _ in manifest.files]
    for param, tensors in zip(manifest.params, manifest.slices, strict=True):
        for key, parts in tensors.items():
            name, spec = tensor_name(param.name, key), param.spec_of(key)
            for part in parts:
                place = part.place(part, spec)
                dtype = SAFETENSORS_DTYPES[spec.dtype]
                array = FileSpan(place.start, place.stop, name, dtype)
                files[part.file].append(array)
    for rank, (file, arrays) in enumerate(zip(manifest.files, files, strict=True)):
        for index, entry in enumerate(file.arrays):
            if entry.nbytes:
                name, dtype = extra_name(rank, index), SAFETENSORS_DTYPES[entry.dtype]
                stop = entry.offset + entry.nbytes
                arrays.append(FileSpan(entry.offset, stop, name, dtype))
        arrays.sort()
    return files


def touched(arrays: Sequence[FileSpan], span: Span) -> list[str]:
    """Return the names of the tensors that a span of a file's bytes belongs to.

    Args:
        arrays: The arrays of the file, in order and without overlaps.
        span: Bytes of the file.
    """
    index = max(0, bisect_right(arrays, span.start, key=lambda array: array.start) - 1)
    names: dict[str, None] = {} if span.start else {"the header": None}
    while index < len(arrays) and arrays[index].start < span.stop:
        if arrays[index].intersect(span):
            names[arrays[index].name] = None
        index += 1
    return list(names)


def read_header(path: Path) -> tuple[int, list[FileSpan]]:
    """Read the header of a safetensors file, whoever wrote it.

    Returns:
        The position of the first data byte, and the arrays of the file in order.

    Raises:
        DamagedCheckpointError: The file has no such header.
        OSError: The file cannot be read.
    """
    name = f"header of file {path.name}"
    if not path.is_file():  # opening a pipe would wait for its other end
        raise damaged(f"file {path.name}", "be a file", "something else")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_NBYTES:
            raise damaged(name, f"have at most {MAX_HEADER_NBYTES} bytes", length)
        nbytes = os.fstat(file.fileno()).st_size  # read() allocates all it is asked for
        text = file.read(min(length, nbytes))
    if len(text) < max(2, length):
        raise damaged(name, f"have {length} bytes", len(text))
    content, start = parse_json(text, name), 8 + length
    if not isinstance(content, dict):
        raise damaged(name, "be an object", type(content).__name__)
    content.pop(METADATA, None)
    arrays = (_locate(tensor, Fields(content[tensor], name), start) for tensor in content)
    return start, sorted(array for array in arrays if array)


def _locate(name: str, entry: Fields, start: int) -> FileSpan:
    where = f"data_offsets of {name!r} in the {entry.where}"
    offsets = Fields.counts(entry.get("data_offsets"), where)
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise damaged(where, "be [start, stop]", offsets)
    return FileSpan(start + offsets[0], start + offsets[1], name, entry.text("dtype"))


def require_same(path: Path, header_nbytes: int, expected: Sequence[FileSpan]) -> None:
    """Check that a file's header agrees with the manifest.

    Raises:
        DamagedCheckpointError: It does not.
    """
    start, found = read_header(path)
    name = f"header of file {path.name}"
    if start != header_nbytes:
        raise damaged(name, f"end at byte {header_nbytes}", start)
    if len(found) != len(expected):
        raise damaged(name, f"have {len(expected)} arrays with data", len(found))
    for ours, theirs in zip(expected, found, strict=True):
        # A part of a tensor has its range after the name, "weight[0:1000]".
        named = theirs.name == ours.name or theirs.name.startswith(f"{ours.name}[")
        place = (ours.start, ours.stop, ours.dtype)
        if not named or place != (theirs.start, theirs.stop, theirs.dtype):
            rule = f"have {ours.name!r}, {ours.dtype}, at bytes {ours.start} to {ours.stop}"
            got = f"{theirs.name!r}, {theirs.dtype}, at {theirs.start} to {theirs.stop}"
            raise damaged(name, rule, got)


def header_problem(path: Path, header_nbytes: int, expected: Sequence[FileSpan]) -> str | None:
    """Describe how a file's header contradicts the manifest, or return None if it agrees."""
    try:
        require_same(path, header_nbytes, expected)
    except DamagedCheckpointError as error:
        return str(error)
    return None
