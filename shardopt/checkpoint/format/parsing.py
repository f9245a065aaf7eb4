"""Reading a manifest, of which nothing is trusted, into checked dataclasses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardopt.checkpoint.format.fields import Fields, damaged, parse_json
from shardopt.checkpoint.format.manifest import (
    ARRAY_DTYPES,
    CHUNK_NBYTES,
    DIGEST_LENGTH,
    FORMAT,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    OLDEST_OPTIMIZER,
    VERSION,
    ArrayEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    ParamEntry,
    Slice,
    first_line,
)
from shardopt.layout.dtypes import DTYPES
from shardopt.layout.state_spec import BLOCK_NUMEL, FULL, StateForm
from shardopt.rule.rules import RULES

_FILE_NAME = re.compile(r"rank-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors")


def from_text(text: bytes) -> Manifest:
    """Read a manifest and check everything that can be checked without the files.

    Raises:
        DamagedCheckpointError: The text has changed since it was written, or is not a manifest.
        CheckpointError: The manifest is of a newer format.
    """
    if len(text) > MAX_MANIFEST_NBYTES:
        raise damaged(MANIFEST_NAME, f"have at most {MAX_MANIFEST_NBYTES} bytes", len(text))
    first, _, body = text.partition(b"\n")
    expected = first_line(body)  # to the byte, so that no reader is more lenient than another
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
        model=_model(content.object("model"), world_size) if content.has("model") else None,
        optimizer=optimizer.choice("name", tuple(RULES))
        if optimizer.has("name")
        else OLDEST_OPTIMIZER,
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
        file.num_chunks * DIGEST_LENGTH
    ):
        rule = f"have {file.num_chunks} digests of {DIGEST_LENGTH} hexadecimal digits"
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
            *_form(entry),
        )
        if not param.group < num_groups:
            raise damaged(f"group of {param.name!r}", f"be below {num_groups}", param.group)
        if not 0.0 <= param.mu_product <= 1.0:
            raise damaged(f"mu_product of {param.name!r}", "lie in [0, 1]", param.mu_product)
        tensors = entry.object("slices")
        params.append(param)
        slices.append({key: _slices(tensors, param, key, num_files) for key in param.tensors})
    if len({param.name for param in params}) != len(params):
        raise damaged("params", "have different names", "a name twice")
    return tuple(params), tuple(slices)


def _form(entry: Fields) -> tuple[StateForm, str]:
    """Read how the state of a parameter is kept, and the key of its random numbers."""
    if not entry.has("optim_bits"):
        return FULL, ""
    bits, has_masters = entry.count("optim_bits"), entry.get("has_masters")
    if bits not in (8, 32):
        raise damaged(f"optim_bits of {entry.where}", "be 8 or 32", bits)
    if bits == 8 and entry.text("dtype") == "float64":
        raise damaged(f"optim_bits of {entry.where}", "be 32 for float64", bits)
    if type(has_masters) is not bool:
        raise damaged(f"has_masters of {entry.where}", "be true or false", has_masters)
    if not has_masters and entry.text("dtype") != "bfloat16":
        raise damaged(f"has_masters of {entry.where}", "be true except for bfloat16", has_masters)
    return StateForm(bits, has_masters), entry.text("chance")


def _slices(tensors: Fields, param: ParamEntry, key: str, num_files: int) -> list[Slice]:
    """Read the slices of one tensor, which must tile it."""
    where = f"slices of {key} of {param.name!r}"
    slices, reached = [], 0
    for value in tensors.array(key):
        numbers = Fields.counts(value, where)
        if len(numbers) != 4:
            raise damaged(where, "be [start, stop, file, offset] each", value)
        part = Slice(*numbers)
        if part.start != reached or not part:
            raise damaged(where, f"go on at element {reached}", f"[{part.start}, {part.stop})")
        if param.spec_of(key).codec is not None and part.start % BLOCK_NUMEL:
            raise damaged(where, f"begin at multiples of {BLOCK_NUMEL}", part.start)
        if not part.file < num_files:
            raise damaged(where, f"lie in one of {num_files} files", part.file)
        reached = part.stop
        slices.append(part)
    if reached != param.numel:
        raise damaged(where, f"reach element {param.numel}", reached)
    return slices


def _array(entry: Fields) -> ArrayEntry:
    dtype = entry.choice("dtype", ARRAY_DTYPES)
    form = entry.text("form") if entry.has("form") else ""
    return ArrayEntry(dtype, entry.shape("shape"), entry.count("offset"), form)


def _model(entry: Fields, world_size: int) -> ModelEntry:
    per_rank = entry.get("per_rank")
    if per_rank is not None:
        if not isinstance(per_rank, list) or len(per_rank) != world_size:
            rule = f"be null or {world_size} entries"
            raise damaged("per_rank of the model", rule, "something else")
        per_rank = [Fields.as_dict(each, "per_rank of the model") for each in per_rank]
    aliases = entry.pairs("aliases")
    if not all(type(name) is str for name in aliases.values()):
        raise damaged("aliases of the model", "be names", "something else")
    return ModelEntry(entry.pairs("values"), per_rank, aliases, entry.get("versions"))


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
    """Refuse files that slices and arrays do not tile: no byte may be unused, or used twice."""
    places = [[array.place for array in file.arrays if array.nbytes] for file in files]
    for param, tensors in zip(params, slices, strict=True):
        for key, parts in tensors.items():
            spec = param.spec_of(key)
            for part in parts:
                places[part.file].append(part.place(part, spec))
    for file, found in zip(files, places, strict=True):
        reached = file.header_nbytes
        for place in sorted(found, key=lambda place: place.start):
            if place.start != reached:
                raise damaged(file.name, f"have data from byte {reached} on", place.start)
            reached = place.stop
        if reached != file.nbytes:
            raise damaged(file.name, f"have data up to byte {file.nbytes}", reached)
