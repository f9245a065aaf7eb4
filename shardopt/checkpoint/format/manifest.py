"""The manifest: what a checkpoint holds, and where. Text in, checked dataclasses out, and back.

[Note: format version 1]
A checkpoint is a folder with ``manifest.json`` and for each rank that saved it a file like
``rank-00000-of-00004.safetensors``. Each is a valid safetensors file of flat slices, its header
padded to a multiple of 4096 bytes. The manifest's first line is ``{"sha256": "..."}`` of all that
follows, which is one JSON object. It says for every tensor (a parameter, or an array of its state)
which of its elements lie in which file at which byte; these slices tile the flattened tensor. It
has a digest, xxh3-128, of every ``CHUNK_NBYTES`` of every file. Within a version fields are only
ever added, and readers ignore those they do not know; what an older reader cannot read has a higher
``min_reader_version``.

Nothing in a manifest is trusted: it may come from elsewhere, or be made to harm.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from shardopt.checkpoint.format.fields import Fields, damaged, parse_json
from shardopt.layout.dtypes import DTYPES, compute_dtype, state_keys

FORMAT = "shardopt"
VERSION = 1
MANIFEST_NAME = "manifest.json"
CHUNK_NBYTES = 1 << 20
MAX_MANIFEST_NBYTES = 1 << 28
PARAM_KEY = "param"
ARRAY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *DTYPES,
    *("complex64", "complex128"),
)

_FILE_NAME = re.compile(r"rank-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors")
_DIGEST_LENGTH = 32
_ITEMSIZES = {"bool": 1} | {
    name: int(re.sub(r"\D", "", name)) // 8 for name in ARRAY_DTYPES if name != "bool"
}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return _ITEMSIZES[dtype]


def file_name(rank: int, world_size: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class ParamEntry:
    """A parameter as it was when it was saved.

    Attributes:
        name: Unique in the checkpoint.
        dtype: NumPy's name of it.
        shape: As its framework sees it.
        group: Index of its param group.
        step: Steps it has taken.
        mu_product: Product of NAdam's momenta so far.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    step: int
    mu_product: float

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[str, ...]:
        """What there is of it: ``param`` and the names of the arrays of its state."""
        return (PARAM_KEY, *state_keys(self.dtype))

    def dtype_of(self, key: str) -> str:
        """Dtype of one of ``tensors``."""
        return self.dtype if key == PARAM_KEY else compute_dtype(self.dtype)


class Slice(NamedTuple):
    """The elements [start, stop) of a flattened tensor, at a byte of a file."""

    start: int
    stop: int
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """An array of ``extra``, whole in one file at a byte of it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file.

    Attributes:
        name: Within the checkpoint's folder.
        nbytes: Its size.
        header_nbytes: Where data begins.
        digests: Of its chunks, one after another, in hexadecimal digits.
        arrays: Arrays of ``extra`` that it holds.
    """

    name: str
    nbytes: int
    header_nbytes: int
    digests: str
    arrays: tuple[ArrayEntry, ...] = ()

    @property
    def num_chunks(self) -> int:
        """Chunks that have a digest; the last one may be short."""
        return -(-self.nbytes // CHUNK_NBYTES)

    def digest(self, chunk: int) -> str:
        """Digest of a chunk, in hexadecimal digits."""
        return self.digests[chunk * _DIGEST_LENGTH : (chunk + 1) * _DIGEST_LENGTH]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself.

    Attributes:
        step: Of the training run, as given to ``save``.
        world_size: Ranks that saved it.
        num_steps: Calls of the optimizer's ``step()``.
        loss_scale: Of the last of them.
        params: In the order of the param groups.
        slices: For each parameter the slices of each of its ``tensors``.
        groups: Encoded values of each param group; see ``values``.
        extra: Encoded; ``replicated``, and ``per_rank`` with an entry a rank, or None.
        files: One for each rank.
        created: When, in UTC; for people.
        attempt: Tells checkpoints of one step apart.
        writer: Versions of what wrote it; for people.
    """

    step: int
    world_size: int
    num_steps: int
    loss_scale: float
    params: tuple[ParamEntry, ...]
    slices: tuple[Mapping[str, Sequence[Slice]], ...]
    groups: Sequence[Any]
    extra: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    created: str = ""
    attempt: str = ""
    writer: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def param_numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel for param in self.params)


def to_text(manifest: Manifest) -> bytes:
    """Write a manifest: the same bytes for the same content."""
    slices = manifest.slices
    content = {
        "format": FORMAT,
        "version": VERSION,
        "min_reader_version": VERSION,
        "chunk_nbytes": CHUNK_NBYTES,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "attempt": manifest.attempt,
        "writer": dict(manifest.writer),
        "optimizer": {
            "name": "NAdam",
            "num_steps": manifest.num_steps,
            "loss_scale": manifest.loss_scale,
            "groups": list(manifest.groups),
        },
        "params": [_param_json(param, slices[i]) for i, param in enumerate(manifest.params)],
        "files": [asdict(file) for file in manifest.files],
        "extra": manifest.extra,
    }
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return _first_line(body) + b"\n" + body


def _first_line(body: bytes) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()


def _param_json(param: ParamEntry, slices: Mapping[str, Sequence[Slice]]) -> dict[str, Any]:
    """As ``asdict`` would, which takes ten times as long: there may be many of them."""
    return {
        "name": param.name,
        "dtype": param.dtype,
        "shape": param.shape,
        "group": param.group,
        "step": param.step,
        "mu_product": param.mu_product,
        "slices": {key: slices[key] for key in param.tensors},
    }


def from_text(text: bytes) -> Manifest:
    """Read a manifest and check everything that can be checked without the files.

    Raises:
        DamagedCheckpointError: It was changed since it was written, or never was a manifest.
        CheckpointError: It is of a newer format.
    """
    if len(text) > MAX_MANIFEST_NBYTES:
        raise damaged(MANIFEST_NAME, f"have at most {MAX_MANIFEST_NBYTES} bytes", len(text))
    first, _, body = text.partition(b"\n")
    expected = _first_line(body)  # to the byte: no reader is to be kinder than another
    if first != expected:
        raise damaged(MANIFEST_NAME, f"begin with its SHA-256, {expected.decode()}", first)
    content = Fields(parse_json(body, MANIFEST_NAME), MANIFEST_NAME)
    content.require_version(FORMAT, VERSION)
    if content.count("chunk_nbytes") != CHUNK_NBYTES:
        raise damaged("chunk_nbytes", f"be {CHUNK_NBYTES}", content.count("chunk_nbytes"))
    files = tuple(map(_file, content.objects("files")))
    if len({file.name for file in files}) != len(files):
        raise damaged("files", "have different names", [file.name for file in files])
    optimizer = content.object("optimizer")
    groups = optimizer.array("groups")
    params, slices = _params(content, len(files), len(groups))
    world_size = content.count("world_size")
    if len(files) != world_size:
        raise damaged("files", f"be {world_size}, one for each rank", len(files))
    _require_filled(files, params, slices)
    return Manifest(
        step=content.count("step"),
        world_size=world_size,
        num_steps=optimizer.count("num_steps"),
        loss_scale=optimizer.number("loss_scale"),
        params=params,
        slices=slices,
        groups=groups,
        extra=_extra(content.object("extra"), world_size),
        files=files,
        created=content.text("created"),
        attempt=content.text("attempt"),
        writer=content.object("writer").texts(),
    )


def _file(entry: Fields) -> FileEntry:
    file = FileEntry(
        entry.text("name"),
        entry.count("nbytes"),
        entry.count("header_nbytes"),
        entry.text("digests"),
        tuple(map(_array, entry.objects("arrays"))),
    )
    if not _FILE_NAME.fullmatch(file.name):
        raise damaged(entry.where, "have a name like rank-00000-of-00004.safetensors", file.name)
    if not file.header_nbytes <= file.nbytes:
        raise damaged(file.name, "have a header within it", file.header_nbytes)
    if not re.fullmatch("[0-9a-f]*", file.digests) or len(file.digests) != (
        file.num_chunks * _DIGEST_LENGTH
    ):
        rule = f"have {file.num_chunks} digests of {_DIGEST_LENGTH} hexadecimal digits"
        raise damaged(file.name, rule, f"{len(file.digests)} characters")
    return file


def _params(
    content: Fields, num_files: int, num_groups: int
) -> tuple[tuple[ParamEntry, ...], tuple[Mapping[str, Sequence[Slice]], ...]]:
    params, slices = [], []
    for entry in content.objects("params"):
        param = ParamEntry(
            entry.text("name"),
            entry.choice("dtype", DTYPES),
            entry.shape("shape"),
            entry.count("group"),
            entry.count("step"),
            entry.number("mu_product"),
        )
        if not param.group < num_groups:
            raise damaged(f"group of {param.name!r}", f"be below {num_groups}", param.group)
        if not 0.0 <= param.mu_product <= 1.0:
            raise damaged(f"mu_product of {param.name!r}", "lie in [0, 1]", param.mu_product)
        runs = entry.object("slices")
        params.append(param)
        slices.append({key: _slices(runs, param, key, num_files) for key in param.tensors})
    if len({param.name for param in params}) != len(params):
        raise damaged("params", "have different names", "a name twice")
    return tuple(params), tuple(slices)


def _slices(runs: Fields, param: ParamEntry, key: str, num_files: int) -> list[Slice]:
    """Read the slices of one tensor, which must tile it."""
    where = f"slices of {key} of {param.name!r}"
    slices, reached = [], 0
    for run in runs.array(key):
        numbers = Fields.counts(run, where)
        if len(numbers) != 4:
            raise damaged(where, "be [start, stop, file, offset] each", run)
        part = Slice(*numbers)
        if part.start != reached or part.stop <= part.start:
            raise damaged(where, f"go on at element {reached}", f"[{part.start}, {part.stop})")
        if not part.file < num_files:
            raise damaged(where, f"lie in one of {num_files} files", part.file)
        reached = part.stop
        slices.append(part)
    if reached != param.numel:
        raise damaged(where, f"reach element {param.numel}", reached)
    return slices


def _array(entry: Fields) -> ArrayEntry:
    dtype = entry.choice("dtype", ARRAY_DTYPES)
    return ArrayEntry(dtype, entry.shape("shape"), entry.count("offset"))


def _extra(entry: Fields, world_size: int) -> Mapping[str, Any]:
    per_rank = entry.get("per_rank")
    if per_rank is not None and (not isinstance(per_rank, list) or len(per_rank) != world_size):
        raise damaged("per_rank of extra", f"be null or {world_size} entries", "something else")
    return {"replicated": entry.get("replicated"), "per_rank": per_rank}


def _require_filled(
    files: Sequence[FileEntry],
    params: Sequence[ParamEntry],
    slices: Sequence[Mapping[str, Sequence[Slice]]],
) -> None:
    """Slices and arrays must tile each file: so nothing lies beyond it, twice, or unknown in it."""
    runs: list[list[tuple[int, int]]] = [
        [(array.offset, array.nbytes) for array in file.arrays if array.nbytes] for file in files
    ]
    for param, tensors in zip(params, slices, strict=True):
        for key, parts in tensors.items():
            size = itemsize(param.dtype_of(key))
            for part in parts:
                runs[part.file].append((part.offset, (part.stop - part.start) * size))
    for file, found in zip(files, runs, strict=True):
        reached = file.header_nbytes
        for offset, nbytes in sorted(found):
            if offset != reached:
                raise damaged(file.name, f"have data from byte {reached} on", offset)
            reached += nbytes
        if reached != file.nbytes:
            raise damaged(file.name, f"have data up to byte {file.nbytes}", reached)
