"""The manifest: what a checkpoint holds and where, as dataclasses and as text.

[Note: format version 1]
A checkpoint is a folder with ``manifest.json`` and for each rank that saved it a file like
``rank-00000-of-00004.safetensors``. Each is a valid safetensors file of flat slices, its header
padded to a multiple of 4096 bytes. The manifest's first line is ``{"sha256": "..."}`` of all that
follows, which is one JSON object. It says for every tensor (a parameter, or an array of its state)
which of its elements lie in which file at which byte; these slices tile the flattened tensor. It
has a digest, xxh3-128, of every ``CHUNK_NBYTES`` of every file. Within a version fields are only
ever added, and readers ignore those they do not know; what an older reader cannot read has a higher
``min_reader_version``. Added so far: ``model``, and the ``form`` of arrays.

Version 2 has parameters with ``optim_bits`` of 8, whose moments are blocks (see [Note: states of 8
bits]), and 16-bit ones without masters. Version 3 has states of other optimizers than NAdam, which
``optimizer`` names; readers of versions 1 and 2 take every state for NAdam's. A checkpoint is of
the lowest version that has all that is in it.

Nothing in a manifest is trusted: it may come from elsewhere, or be made to harm.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardopt.layout.dtypes import DTYPES
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm, StateSpec, state_specs
from shardopt.layout.state_spec import PARAM_KEY as PARAM_KEY

FORMAT = "shardopt"
VERSION = 3
MANIFEST_NAME = "manifest.json"
OLDEST_OPTIMIZER = "NAdam"
"""The optimizer whose states all versions have."""
CHUNK_NBYTES = 1 << 20
MAX_MANIFEST_NBYTES = 1 << 28
ARRAY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *DTYPES,
    *("complex64", "complex128"),
)

DIGEST_LENGTH = 32
_ITEMSIZES = {"bool": 1} | {
    name: int(re.sub(r"\D", "", name)) // 8 for name in ARRAY_DTYPES if name != "bool"
}


def itemsize(dtype: str) -> int:
    """Return the number of bytes of one element."""
    return _ITEMSIZES[dtype]


@dataclass(frozen=True, slots=True)
class ParamEntry:
    """A parameter as it was when it was saved.

    Attributes:
        name: Its name, unique in the checkpoint.
        dtype: NumPy's name for the type of its elements.
        shape: Its shape in its framework.
        group: Index of its param group.
        step: Number of steps it has taken.
        mu_product: Product of NAdam's momenta so far; 1 with other optimizers.
        form: How its state is kept.
        chance: The key of its random numbers, in hexadecimal digits, if anything rounds by chance:
            see ``rule.rounding.key_of``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    step: int
    mu_product: float
    form: StateForm = FULL
    chance: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The keys of its tensors: ``param``, and the names of the arrays of its state."""
        return (PARAM_KEY, *(spec.key for spec in state_specs(self.dtype, self.form)))

    def spec_of(self, key: str) -> StateSpec:
        """Return how one of ``tensors`` is kept."""
        if key == PARAM_KEY:
            return StateSpec(key, self.dtype)
        return next(spec for spec in state_specs(self.dtype, self.form) if spec.key == key)


@dataclass(frozen=True, slots=True, order=True)
class Slice(Span):
    """Elements of a flattened tensor, and where they lie.

    Attributes:
        file: Index of the file.
        offset: The byte of the file where they begin.
    """

    file: int
    offset: int

    def place(self, span: Span, spec: StateSpec) -> Span:
        """Return the bytes of the file that hold ``span``, which is within the slice."""
        return spec.bytes_of(span.shift(-self.start)).shift(self.offset)


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """An array of ``extra`` or of the model, which lies in one file from byte ``offset`` on.

    Attributes:
        dtype: NumPy's name for the type of its elements.
        shape: Its shape.
        offset: The byte of the file where it begins.
        form: What it was, such as ``torch.float32``; empty for an array of NumPy.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    form: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * itemsize(self.dtype)

    @property
    def place(self) -> Span:
        """The bytes of the file that hold it."""
        return Span(self.offset, self.offset + self.nbytes)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file.

    Attributes:
        name: Its name in the checkpoint's folder.
        nbytes: Its size.
        header_nbytes: Size of the header; data begin behind it.
        digests: The digests of its chunks, one after another, in hexadecimal digits.
        arrays: The arrays of ``extra`` and of the model that it holds.
    """

    name: str
    nbytes: int
    header_nbytes: int
    digests: str
    arrays: tuple[ArrayEntry, ...] = ()

    @property
    def num_chunks(self) -> int:
        """Number of chunks that have a digest; the last one may be short."""
        return -(-self.nbytes // CHUNK_NBYTES)

    def digest(self, chunk: int) -> str:
        """Return the digest of a chunk, in hexadecimal digits."""
        return self.digests[chunk * DIGEST_LENGTH : (chunk + 1) * DIGEST_LENGTH]


@dataclass(frozen=True)
class ModelEntry:
    """The values of the model that were saved besides the parameters of the optimizer.

    Attributes:
        values: Buffers, other parameters and further state by name, encoded; see ``values``.
        per_rank: Likewise for each rank, what it has saved as its own; None if nothing was.
        aliases: Further names of tied tensors, each with the name that the tensor has elsewhere.
        versions: What the framework wants to know when it loads the values, encoded.
    """

    values: Mapping[str, Any]
    per_rank: Sequence[Mapping[str, Any]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    versions: Any = None

    def values_of(self, rank: int) -> dict[str, Any]:
        """Return the values for a rank; for one that saved none of its own, those of rank 0."""
        if not self.per_rank:
            return dict(self.values)
        own = self.per_rank[rank if rank < len(self.per_rank) else 0]
        return {**self.values, **own}


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint, except for the elements of its tensors.

    Attributes:
        step: The step of the training run, as given to ``save``.
        world_size: Number of ranks that saved it.
        num_steps: Calls of the optimizer's ``step()`` so far.
        loss_scale: The loss scale of the last of them.
        params: The parameters, in the order of the param groups.
        slices: For each parameter the slices of each of its ``tensors``.
        groups: The values of each param group, encoded; see ``values``.
        extra: What the user added, encoded: ``replicated``, and ``per_rank``, which is None or has
            one entry for each rank.
        files: One for each rank.
        created: The time of the save in UTC, for people to read.
        attempt: Random digits that tell checkpoints of one step apart.
        writer: The versions of the software that wrote it, for people to read.
        model: What was saved of the model; None if no model was given.
        optimizer: The name of its update rule, as ``rule.rules`` has it.
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
    model: ModelEntry | None = None
    optimizer: str = OLDEST_OPTIMIZER

    @property
    def version(self) -> int:
        """The lowest version of the format that has all that is in it."""
        if self.optimizer != OLDEST_OPTIMIZER:
            return 3
        return 1 if all(param.form == FULL for param in self.params) else 2

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(file.nbytes for file in self.files)

    @property
    def param_numel(self) -> int:
        """Number of elements of all parameters together."""
        return sum(param.numel for param in self.params)


def to_text(manifest: Manifest) -> bytes:
    """Return a manifest as text: the same bytes for the same content."""
    slices = manifest.slices
    content = {
        "format": FORMAT,
        "version": manifest.version,
        "min_reader_version": manifest.version,
        "chunk_nbytes": CHUNK_NBYTES,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "attempt": manifest.attempt,
        "writer": dict(manifest.writer),
        "optimizer": {
            "name": manifest.optimizer,
            "num_steps": manifest.num_steps,
            "loss_scale": manifest.loss_scale,
            "groups": list(manifest.groups),
        },
        "params": [_param_json(param, slices[i]) for i, param in enumerate(manifest.params)],
        "files": [_file_json(file) for file in manifest.files],
        "extra": manifest.extra,
    }
    if manifest.model is not None:
        content["model"] = _model_json(manifest.model)
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return first_line(body) + b"\n" + body


def first_line(body: bytes) -> bytes:
    """Return the first line of a manifest, which has the digest of all others."""
    return json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()


def _file_json(file: FileEntry) -> dict[str, Any]:
    entry = asdict(file)
    for array in entry["arrays"]:
        if not array["form"]:
            del array["form"]
    return entry


def _model_json(model: ModelEntry) -> dict[str, Any]:
    """Return the entry of the model; names are not keys, as JSON's may have a meaning."""
    per_rank = model.per_rank
    return {
        "values": list(model.values.items()),
        "per_rank": None if per_rank is None else [list(each.items()) for each in per_rank],
        "aliases": list(model.aliases.items()),
        "versions": model.versions,
    }


def _param_json(param: ParamEntry, slices: Mapping[str, Sequence[Slice]]) -> dict[str, Any]:
    """Return the entry of a parameter; ``asdict`` would take ten times as long."""
    form = {}
    if param.form != FULL:
        form = {**asdict(param.form), "chance": param.chance}
    return {
        "name": param.name,
        "dtype": param.dtype,
        "shape": param.shape,
        "group": param.group,
        "step": param.step,
        "mu_product": param.mu_product,
        **form,
        "slices": {
            key: [(part.start, part.stop, part.file, part.offset) for part in slices[key]]
            for key in param.tensors
        },
    }
