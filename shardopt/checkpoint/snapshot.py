"""A rank's part of a checkpoint: what goes into its file, under which names, and where."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._version import __version__
from shardopt.checkpoint.format.disk import Image
from shardopt.checkpoint.format.image import FileImage, FileLayout, Item
from shardopt.checkpoint.format.manifest import (
    ArrayEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    ParamEntry,
    Slice,
)
from shardopt.checkpoint.format.messages import must
from shardopt.checkpoint.format.names import extra_name, file_name, tensor_name
from shardopt.checkpoint.format.values import Array, Encoder, Stored
from shardopt.checkpoint.model import NamedModel, encode_model
from shardopt.checkpoint.staging import StagedImage
from shardopt.checkpoint.tensors import store
from shardopt.core.sharded import Scalars, Sharded, TensorShard
from shardopt.errors import CheckpointError, CheckpointWarning
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.report import tell
from shardopt.rule.rounding import key_of

PER_RANK = "per_rank"

Place = tuple[int, str, int, int, int]
"""(param, key, start, stop, offset in the file) of a shard, as rank 0 gets it from all ranks."""


@dataclass(frozen=True)
class Encoded:
    """``extra``, the param groups and the model as JSON.

    Attributes:
        arrays: The arrays that this rank's JSON refers to.
        names: The names of the parameters.
        per_rank: This rank's ``extra["per_rank"]``.
        replicated: All else in ``extra``; None except on rank 0.
        groups: The values of each param group; empty except on rank 0.
        model: The entry of the model; None except on rank 0.
        own_values: The values of the model that this rank saves as its own; None if no rank does.
    """

    arrays: list[Stored]
    names: tuple[str, ...]
    per_rank: Any
    replicated: Any
    groups: list[Any]
    model: ModelEntry | None
    own_values: list[tuple[str, Any]] | None


def encode_all(
    extra: Mapping[str, Any] | None,
    named: NamedModel,
    scalars: Scalars,
    rank: int,
    *,
    per_rank_buffers: bool = False,
) -> Encoded:
    """Encode what this rank saves besides the optimizer's tensors and step counts.

    Raises:
        CheckpointError: Something in it, which the message names, cannot be saved.
    """
    if extra is not None and not isinstance(extra, Mapping):
        got, remedy = type(extra).__name__, "Write {'name': value}"
        raise CheckpointError(must("extra", "be a dict", got, remedy))
    encoder, rest = Encoder(rank, store), dict(extra or {})
    per_rank = encoder.encode(rest.pop(PER_RANK, None), f"extra[{PER_RANK!r}]")
    replicated, groups = None, list[Any]()
    if rank == 0:
        replicated = encoder.encode(rest, "extra") if extra is not None else None
        saved, left_out = scalars.saved_groups()
        if left_out:
            tell(_left_out_warning(left_out), aloud=True)
        groups = [
            encoder.encode(group, f"param_groups[{index}]") for index, group in enumerate(saved)
        ]
    entry, own = None, None
    if named.content is not None:
        entry, own = encode_model(named.content, encoder, rank, per_rank_buffers=per_rank_buffers)
    return Encoded(encoder.arrays, named.names, per_rank, replicated, groups, entry, own)


def _left_out_warning(left_out: Mapping[str, str]) -> CheckpointWarning:
    """Return the warning that values of param groups are not saved."""
    got = ", ".join(f"{name}, a {kind}," for name, kind in left_out.items())
    return CheckpointWarning(
        f"the checkpoint leaves out {got} as files hold only None, numbers, text, arrays, and "
        "lists, tuples and dicts of them. A restore leaves the group's own: set it again before "
        "or after, or save what it holds as extra={...}."
    )


@dataclass(frozen=True)
class Layout:
    """The layout of a rank's file: the same in every checkpoint until parameters are added.

    Attributes:
        token: The ``Sharded.layout`` that it belongs to.
        names: The names of the parameters.
        forms: (dtype, elements) of each array besides the tensors.
        tensors: What this rank owns.
        places: Where each of ``tensors`` lies.
        file: The layout of the file.
    """

    token: object
    names: Sequence[str]
    forms: list[tuple[str, int]]
    tensors: list[TensorShard]
    places: list[Place]
    file: FileLayout


class Layouts:
    """Lays out a rank's file, and keeps the layout for the next save.

    To lay out many small tensors takes longer than to copy them.
    """

    def __init__(self) -> None:
        self._last: Layout | None = None

    def lay_out(self, sharded: Sharded, names: Sequence[str], arrays: Sequence[Stored]) -> Layout:
        """Return the layout of this rank's file.

        Args:
            sharded: The state to be saved.
            names: The names of its parameters.
            arrays: Arrays that are saved besides its tensors.

        Raises:
            CheckpointError: Two tensors would have the same name.
        """
        forms, last = [(each.array.dtype.name, each.array.size) for each in arrays], self._last
        wanted = names, forms
        if last is None or last.token is not sharded.layout or (last.names, last.forms) != wanted:
            self._last = last = _lay_out(sharded, names, forms)
        return last


def _lay_out(sharded: Sharded, names: Sequence[str], forms: list[tuple[str, int]]) -> Layout:
    tensors = sharded.tensors()
    items = [_item(shard, names[shard.param]) for shard in tensors]
    for index, (dtype, numel) in enumerate(forms):
        items.append(Item(extra_name(sharded.rank, index), dtype, Span(0, numel)))
    file = FileLayout(items)
    places = [
        (shard.param, shard.key, shard.span.start, shard.span.stop, offset)
        for shard, offset in zip(tensors, file.offsets[: len(tensors)], strict=True)
    ]
    return Layout(sharded.layout, names, forms, tensors, places, file)


def _item(shard: TensorShard, param: str) -> Item:
    """Name a shard: a rank may own several parts of a parameter that is larger than a bucket."""
    bucket = shard.bucket_span
    part = None if bucket == Span(0, shard.spec.numel) else bucket
    name = tensor_name(param, shard.key, part)
    span = shard.span.within(bucket)
    if shard.array.codec is not None:
        span = shard.array.bytes_of(span)
    return Item(name, shard.array.dtype, span)


@dataclass(frozen=True)
class Written:
    """A file that has been written, as rank 0 gets it from each rank.

    Attributes:
        file: The file.
        places: Where each of the rank's shards lies in it.
        per_rank: JSON of the rank's ``extra["per_rank"]``.
        own_values: The values of the model that the rank has saved as its own, or None.
    """

    file: FileEntry
    places: list[Place]
    per_rank: Any
    own_values: list[tuple[str, Any]] | None


@dataclass(frozen=True)
class Snapshot:
    """Everything that a rank is going to write.

    Attributes:
        image: The content of its file, copied or where it lives.
        written: What will have been written, except for digests.
        draft: The manifest, except for what ``complete`` adds; used on rank 0 only.
    """

    image: Image
    written: Written
    draft: Manifest


def take_snapshot(
    sharded: Sharded, layouts: Layouts, encoded: Encoded, staged: StagedImage | None
) -> Snapshot:
    """Describe all that this rank saves.

    Args:
        sharded: The state.
        layouts: Lays out the file.
        encoded: What is saved besides tensors and step counts.
        staged: The memory that everything is copied to; None for no copy.

    Raises:
        CheckpointError: Two tensors would have the same name.
    """
    layout = layouts.lay_out(sharded, encoded.names, encoded.arrays)
    scalars = sharded.scalars()
    sharded.open()
    values: list[Array] = [*sharded.arrays(layout.tensors)]
    offsets = layout.file.offsets[len(values) :]
    arrays = zip(encoded.arrays, offsets, strict=True)
    image = FileImage(layout.file, [*values, *(array.reshape(-1) for array, _ in encoded.arrays)])
    if staged is not None:
        staged.copy(image, sharded.num_cores)
    file = FileEntry(
        name=file_name(sharded.rank, sharded.world_size),
        nbytes=layout.file.nbytes,
        header_nbytes=layout.file.header.size,
        digests="",
        arrays=tuple(ArrayEntry(a.dtype.name, a.shape, o, form) for (a, form), o in arrays),
    )
    draft = Manifest(
        step=scalars.num_steps,
        world_size=sharded.world_size,
        num_steps=scalars.num_steps,
        loss_scale=scalars.loss_scale,
        params=_param_entries(encoded.names, scalars),
        slices=(),
        groups=encoded.groups,
        extra={"replicated": encoded.replicated, PER_RANK: None},
        files=(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        writer=_versions(),
        model=encoded.model,
        optimizer=scalars.rule.name,
    )
    written = Written(file, layout.places, encoded.per_rank, encoded.own_values)
    return Snapshot(staged or image, written, draft)


def complete(draft: Manifest, written: Sequence[Written], step: int, attempt: str) -> Manifest:
    """Complete the manifest, once all ranks have written.

    Args:
        draft: The manifest so far.
        written: What each rank has written.
        step: The step of the training run.
        attempt: Random digits that tell checkpoints of one step apart.
    """
    per_rank = [each.per_rank for each in written]
    some = any(value is not None for value in per_rank)
    own = [dict(each.own_values) for each in written if each.own_values is not None]
    return replace(
        draft,
        step=step,
        attempt=attempt,
        files=tuple(each.file for each in written),
        slices=_merge([param.tensors for param in draft.params], [w.places for w in written]),
        extra={**draft.extra, PER_RANK: per_rank if some else None},
        model=draft.model and replace(draft.model, per_rank=own or None),
    )


def _merge(
    keys: Sequence[Sequence[str]], places: Sequence[Sequence[Place]]
) -> tuple[dict[str, list[Slice]], ...]:
    """Arrange the shards of all files by parameter and key.

    Args:
        keys: For each parameter the keys of its tensors.
        places: For each file the places of the shards in it.
    """
    slices: tuple[dict[str, list[Slice]], ...] = tuple({key: [] for key in each} for each in keys)
    for file, found in enumerate(places):
        for param, key, start, stop, offset in found:
            slices[param][key].append(Slice(start, stop, file, offset))
    for tensors in slices:
        for parts in tensors.values():
            parts.sort(key=lambda part: part.start)
    return slices


def _param_entries(names: Sequence[str], scalars: Scalars) -> tuple[ParamEntry, ...]:
    return tuple(
        ParamEntry(
            name,
            spec.dtype,
            spec.shape,
            spec.group,
            count.step,
            count.mu_product,
            spec.form,
            chance_of(spec, scalars.seed),
        )
        for name, spec, count in zip(names, scalars.params, scalars.step_counts, strict=True)
    )


def chance_of(spec: ParamSpec, seed: int) -> str:
    """Return ``ParamEntry.chance`` of a parameter."""
    return f"{key_of(spec.name, seed):016x}" if spec.form.rounds_by_chance else ""


def _versions() -> dict[str, str]:
    vendor, version = MPI.get_vendor()
    return {
        "shardopt": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "mpi": f"{vendor} {'.'.join(map(str, version))}",
    }
