"""What lies where in the files: as the manifest has it, and as the files themselves say."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardopt.checkpoint.format.fields import Fields, damaged, parse_json
from shardopt.checkpoint.format.image import SAFETENSORS_DTYPES
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, itemsize
from shardopt.errors import DamagedCheckpointError

MAX_HEADER_NBYTES = 100_000_000  # safetensors' own limit
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """A flat array in a file.

    Attributes:
        start: Its first byte in the file.
        stop: One past its last.
        name: Of the tensor that it is a part of.
        dtype: As safetensors calls it.
    """

    start: int
    stop: int
    name: str
    dtype: str


def tensor_name(param: str, key: str) -> str:
    """Name a parameter's array: its own for the parameter itself."""
    return param if key == PARAM_KEY else f"{param}::{key}"


def layout(manifest: Manifest) -> list[list[Region]]:
    """Say for each file what lies in it, in order."""
    files: list[list[Region]] = [[] for _ in manifest.files]
    for param, tensors in zip(manifest.params, manifest.slices, strict=True):
        for key, parts in tensors.items():
            name, dtype = tensor_name(param.name, key), param.dtype_of(key)
            for part in parts:
                stop = part.offset + (part.stop - part.start) * itemsize(dtype)
                region = Region(part.offset, stop, name, SAFETENSORS_DTYPES[dtype])
                files[part.file].append(region)
    for rank, (file, regions) in enumerate(zip(manifest.files, files, strict=True)):
        for index, array in enumerate(file.arrays):
            name, dtype = f"extra/rank-{rank:05d}/{index}", SAFETENSORS_DTYPES[array.dtype]
            if array.nbytes:
                regions.append(Region(array.offset, array.offset + array.nbytes, name, dtype))
        regions.sort()
    return files


def touched(regions: Sequence[Region], start: int, stop: int) -> list[str]:
    """Name the tensors that bytes [start, stop) are of; regions are in order and do not overlap."""
    index = max(0, bisect_right(regions, start, key=lambda region: region.start) - 1)
    names: dict[str, None] = {} if start else {"the header": None}
    for region in _until(regions, index, stop):
        if region.stop > start:
            names[region.name] = None
    return list(names)


def _until(regions: Sequence[Region], index: int, stop: int) -> Iterator[Region]:
    while index < len(regions) and regions[index].start < stop:
        yield regions[index]
        index += 1


def read_header(path: Path) -> tuple[int, list[Region]]:
    """Read a safetensors file's header, whoever wrote it.

    Returns:
        Where data begins, and what lies in the file, in order.

    Raises:
        DamagedCheckpointError: It is no such header.
        OSError: It cannot be read.
    """
    name = f"header of file {path.name}"
    if not path.is_file():  # to open a pipe would be to wait for its other end
        raise damaged(f"file {path.name}", "be a file", "something else")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_NBYTES:
            raise damaged(name, f"have at most {MAX_HEADER_NBYTES} bytes", length)
        nbytes = os.fstat(file.fileno()).st_size  # read() makes room for what it is asked for
        text = file.read(min(length, nbytes))
    if len(text) < max(2, length):
        raise damaged(name, f"have {length} bytes", len(text))
    content, start = parse_json(text, name), 8 + length
    if not isinstance(content, dict):
        raise damaged(name, "be an object", type(content).__name__)
    content.pop(METADATA, None)
    entries = (_region(tensor, Fields(content[tensor], name), start) for tensor in content)
    return start, sorted(entry for entry in entries if entry.stop > entry.start)


def _region(name: str, entry: Fields, start: int) -> Region:
    where = f"data_offsets of {name!r} in the {entry.where}"
    offsets = Fields.counts(entry.get("data_offsets"), where)
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise damaged(where, "be [start, stop]", offsets)
    return Region(start + offsets[0], start + offsets[1], name, entry.text("dtype"))


def require_same(path: Path, header_nbytes: int, expected: Sequence[Region]) -> None:
    """See that a file's header says what the manifest says.

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
        # A part of a tensor has its elements behind its name, "weight[0:1000]".
        named = theirs.name == ours.name or theirs.name.startswith(f"{ours.name}[")
        place = (ours.start, ours.stop, ours.dtype)
        if not named or place != (theirs.start, theirs.stop, theirs.dtype):
            rule = f"have {ours.name!r}, {ours.dtype}, at bytes {ours.start} to {ours.stop}"
            got = f"{theirs.name!r}, {theirs.dtype}, at {theirs.start} to {theirs.stop}"
            raise damaged(name, rule, got)


def header_problem(path: Path, header_nbytes: int, expected: Sequence[Region]) -> str | None:
    """Say in what a file's header differs from the manifest, if it does."""
    try:
        require_same(path, header_nbytes, expected)
    except DamagedCheckpointError as error:
        return str(error)
    return None
