"""Loading: every rank reads what it is going to own, from wherever that lies in the checkpoint.

[Note: nothing changes before all is verified]
A damaged checkpoint must leave the optimizer as it was, but there is no memory for a second state.
The moments of an optimizer that has never stepped are zero, unless somebody has written them, and
can be zeroed again: they are read into place and verified as they arrive (``overwrite``). Whether
they are zero is known if nobody on any rank has had an array of the state (``is_untouched``). Else
they are looked through, which takes half as long as to read them. What cannot be restored, the
parameters above all, is verified first (``verify_first``), by way of a buffer, and read again once
all ranks have found everything undamaged; by then it comes from the page cache. The second reading
is verified, too: if the checkpoint has changed in the meantime, all ranks raise, and the optimizer
must be loaded from another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardopt.checkpoint.conversion import Conversion, form_notes
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, Slice
from shardopt.checkpoint.format.parsing import from_text
from shardopt.checkpoint.format.reader import Reader, read_manifest_text
from shardopt.checkpoint.format.requests import Wanted, wanted_slices
from shardopt.checkpoint.format.values import Array, array_place
from shardopt.checkpoint.matching import (
    LoadOptions,
    Match,
    Rename,
    Source,
    match,
    read_saved,
)
from shardopt.checkpoint.model import NamedModel, name_params
from shardopt.checkpoint.report import LoadReport, Restored
from shardopt.checkpoint.scalars import require_rule, restored_scalars
from shardopt.checkpoint.tensors import Reviver
from shardopt.comm.consensus import attempt
from shardopt.core.sharded import Scalars, Sharded, TensorShard
from shardopt.core.sharded_optimizer import HasCore, sharded_of
from shardopt.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError
from shardopt.layout.state_spec import StateSpec
from shardopt.report import tell

_CALL = "load()"
_MASTER_KEY = "master"


def load(
    path: str | Path,
    opt: HasCore,
    *,
    model: Any = None,
    strict: bool = True,
    only: str | None = None,
    rename: Rename | None = None,
    other_optimizer: bool = False,
) -> Restored:
    """Load a checkpoint, saved on any number of ranks with any framework.

    Each rank reads only what it needs, straight into place, and verifies all of it. With JAX, take
    the new parameters from ``opt.params`` or from the returned ``model``; elsewhere they are where
    they were. If not all of the checkpoint was loaded into all that there is, by name, then rank 0
    prints the report as a warning.

    Collective: every rank.

    Args:
        path: A checkpoint.
        opt: An optimizer of any framework, with parameters of the same names, shapes and dtypes in
            the same groups. If either side has positions instead of names, parameters are matched
            in order.
        model: The model: a module of torch or lucid, or a pytree of JAX. Its buffers and all else
            that was saved of the model are loaded, and names are those of the model.
        strict: Refuse a checkpoint that is not of this optimizer and model. With False, all that
            fits is loaded, and the rest stays as it is.
        only: "params" loads the parameters, and the rest of the model, but no moments, step counts
            and hyperparameters: moments and step counts start anew.
        rename: Other names for what is in the checkpoint: ``{"old": "new"}``, or a function from a
            name to the new one.
        other_optimizer: Take over the state of a checkpoint that another optimizer has saved, such
            as NAdam's into AdamW: moments and step counts. Hyperparameters are not: those of
            ``opt`` stay. NAdam's ``mu_product`` is computed from the step counts, or dropped.

    Returns:
        Where training goes on: the ``extra`` that was saved, the model, and a report.

    Raises:
        DamagedCheckpointError: The checkpoint is not what was saved; the message names file and
            chunk. Optimizer and model are as they were, unless the message says that the checkpoint
            changed while it was loaded; on every rank.
        CheckpointError: The checkpoint is of another model or optimizer; likewise.
        RankMismatchError: Ranks have different arguments; likewise.
    """
    sharded, path = sharded_of(opt), Path(path).absolute()
    options = LoadOptions(strict, only, rename, other_optimizer)
    sharded.take_over_groups(_CALL)
    manifest = _share_manifest(sharded, path)
    is_untouched = all(sharded.allgather(sharded.is_state_untouched, _CALL))
    with Reader(path, manifest) as reader:
        content, error = attempt(
            lambda: _match(sharded, reader, model, options, is_untouched=is_untouched)
        )
        sharded.agree(_CALL, content.description if content else {}, error)
        assert content is not None
        scalars = _settle(sharded, content)
        _read(sharded, reader, content)
    for array in content.fresh:
        array[...] = 0
    sharded.restore(scalars)
    if not any(content.stays):
        sharded.mend()
    loaded, report = _load_model(sharded, model, content, strict=bool(strict))
    if not report.is_perfect:
        tell(CheckpointWarning(f"{path.name}: {report}"), aloud=sharded.rank == 0)
    return Restored(manifest.step, content.extra, path, loaded, report)


def _read(sharded: Sharded, reader: Reader, content: "_Content") -> None:
    """Read all tensors, and verify those first that could not be restored. Collective."""
    num_threads = sharded.num_cores
    first_pass = [*_headers(sharded, reader.manifest), *content.first_pass()]
    _, error = attempt(lambda: reader.read(first_pass, num_threads))
    try:
        sharded.agree(_CALL, {}, error)
    except Exception:
        content.undo_first_pass()
        raise
    _, error = attempt(lambda: content.second_pass(reader, num_threads))
    sharded.agree(_CALL, {}, error and _changed_meanwhile(error))


def _settle(sharded: Sharded, content: "_Content") -> Scalars:
    """Keep what users have done to parameters that stay as they are. Collective.

    Returns:
        What the optimizer goes on from, besides tensors.
    """
    if not any(content.stays):
        return content.scalars
    changes, error = attempt(sharded.find_changes)
    sharded.agree(_CALL, {}, error)
    sharded.settle(changes)
    counts = zip(
        content.stays, sharded.scalars().step_counts, content.scalars.step_counts, strict=True
    )
    settled = [here if stays else loaded for stays, here, loaded in counts]
    return replace(content.scalars, step_counts=settled)


def _load_model(
    sharded: Sharded, model: Any, content: "_Content", *, strict: bool
) -> tuple[Any, LoadReport]:
    """Load the rest of the model. Collective if there is a model.

    Returns:
        The model, and the report of all that was loaded.
    """
    named = content.named.content
    if named is None:
        return None, content.report

    def load_values() -> tuple[Any, Sequence[str]]:
        loaded, refused = sharded.load_model(model, named, content.values)
        if refused and strict:
            raise ValueError(f"its load_state_dict() does not know {refused[0]!r}")
        return loaded, refused

    done, error = attempt(load_values)
    sharded.agree(_CALL, {}, error and _model_failed(error))
    assert done is not None
    return done[0], content.report.without(done[1])


def _share_manifest(sharded: Sharded, path: Path) -> Manifest:
    """Read the manifest on rank 0, and parse it on all ranks. Collective."""
    text, error = None, None
    if sharded.rank == 0:
        text, error = attempt(lambda: read_manifest_text(path))
    sharded.agree(_CALL, {"path": str(path)}, error)
    shared = sharded.allgather(text, _CALL)[0]
    assert shared is not None
    manifest, error = attempt(lambda: from_text(shared))
    sharded.agree(_CALL, {}, error)
    assert manifest is not None
    return manifest


@dataclass(frozen=True)
class _Content:
    """The part of a checkpoint that this rank takes.

    Attributes:
        scalars: What the optimizer goes on from, besides tensors.
        extra: What the user has saved with it.
        named: The names here, and the model.
        values: What the model is to get.
        report: What is loaded and what is not.
        description: What must be equal on all ranks.
        verify_first: Where the shards of this rank lie in the files and where they belong: those
            that must be verified before they are read.
        overwrite: Likewise, those that may be read at once; see
            [Note: nothing changes before all is verified].
        converted: Likewise, those that are kept in another form here.
        fresh: The state that starts anew.
        stays: For each parameter whether it stays as it is.
    """

    scalars: Scalars
    extra: dict[str, Any] | None
    named: NamedModel
    values: dict[str, Any]
    report: LoadReport
    description: dict[str, object]
    stays: Sequence[bool]
    verify_first: list[Wanted] = field(default_factory=list)
    overwrite: list[Wanted] = field(default_factory=list)
    converted: list[Conversion] = field(default_factory=list)
    fresh: list[Any] = field(default_factory=list)

    def first_pass(self) -> list[Wanted]:
        """Return all requests, none of which overwrites what cannot be restored."""
        later = [*self.verify_first, *(w for each in self.converted for w in each.wanted())]
        verify = [Wanted(each.start, each.stop, each.file) for each in later]
        return [*verify, *self.overwrite]

    def second_pass(self, reader: Reader, num_threads: int) -> None:
        """Read what has been verified."""
        reader.read(self.verify_first, num_threads)
        for each in self.converted:
            each.read(reader, num_threads)

    def undo_first_pass(self) -> None:
        """Zero what the first pass has overwritten."""
        for each in self.overwrite:
            if each.target is not None:
                each.target[:] = 0


def _headers(sharded: Sharded, manifest: Manifest) -> list[Wanted]:
    """Return requests to verify this rank's share of the files' headers."""
    files = range(sharded.rank, len(manifest.files), sharded.world_size)
    return [Wanted(0, manifest.files[file].header_nbytes, file) for file in files]


def _match(
    sharded: Sharded, reader: Reader, model: Any, options: LoadOptions, *, is_untouched: bool
) -> _Content:
    """Check that a checkpoint fits optimizer and model, and find what this rank needs of it.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    options.require_valid()
    reader.require_files()
    manifest, scalars = reader.manifest, sharded.scalars()
    require_rule(scalars.rule, manifest, options)
    saved = read_saved(manifest, options.rename, sharded.rank)
    named = name_params(sharded, scalars.params, model, frozenset(saved.names))
    found = match(saved, named, scalars.params, options)
    revive = Reviver()
    values = {name: _read_value(reader, source, revive) for name, source in found.values.items()}
    versions = reader.decode(manifest.model.versions, revive) if manifest.model else None
    if named.content is not None:
        named = replace(named, content=replace(named.content, versions=versions))
    extra = reader.extra(revive)
    notes = [*found.report.notes, *_notes(sharded, manifest, model), *revive.notes]
    if (problem := named.problem) is not None:
        notes.append(problem)
    restored, notes_of_scalars = restored_scalars(scalars, reader, found, options)
    if options.only is None:
        notes += form_notes(manifest, found, scalars)
    content = _Content(
        scalars=restored,
        extra=extra,
        named=named,
        values=values,
        report=replace(found.report, notes=(*notes, *notes_of_scalars)),
        description={
            "strict": bool(options.strict),
            "only": options.only,
            "other_optimizer": bool(options.other_optimizer),
            "the names changed by rename": saved.renamed,
            **named.description(),
        },
        stays=[source is None for source in found.params],
    )
    everything = options.only is None
    _plan_reads(sharded, manifest, found, content, everything=everything, is_untouched=is_untouched)
    return content


def _plan_reads(
    sharded: Sharded,
    manifest: Manifest,
    found: Match,
    content: _Content,
    *,
    everything: bool,
    is_untouched: bool,
) -> None:
    """Find where the shards of this rank lie in the files, and which start anew."""
    never_stepped = all(count.step == 0 for count in sharded.scalars().step_counts)
    sharded.open()  # what is not loaded stays as it is
    tensors = sharded.tensors()
    for shard, array in zip(tensors, sharded.arrays(tensors), strict=True):
        source = found.params[shard.param]
        if source is None:
            continue
        spec, slices = _slices(manifest, source, shard)
        is_value = shard.key in (PARAM_KEY, _MASTER_KEY)
        if slices is None or not (everything or is_value):
            content.fresh.append(array)  # a master of zero follows the parameter
            continue
        if spec.codec != shard.array.codec:
            content.converted.append(Conversion(slices, shard.span, spec, shard.array, array))
            continue
        may_overwrite = shard.key != PARAM_KEY and (
            is_untouched or (never_stepped and _is_zero(array))
        )
        requests = content.overwrite if may_overwrite else content.verify_first
        requests += wanted_slices(slices, shard.span, spec, array)


def _is_zero(array: Array) -> bool:
    """Whether all bits are zero: a user may have written moments before the first step."""
    return not array.view(np.uint8).max(initial=0)


def _slices(
    manifest: Manifest, source: Source, shard: TensorShard
) -> tuple[StateSpec, Sequence[Slice] | None]:
    """Return how a tensor is kept, and where it lies; None if the checkpoint does not have it."""
    key, here = shard.key, shard.array
    if source.param is not None:
        entry = manifest.params[source.param]
        if key not in entry.tensors:
            return here, None
        return entry.spec_of(key), manifest.slices[source.param][key]
    place = array_place(source.value)
    if key != PARAM_KEY or place is None:
        return here, None
    file, index = place
    array = manifest.files[file].arrays[index]
    return here, [Slice(0, array.numel, file, array.offset)]


def _read_value(reader: Reader, source: Source, revive: Reviver) -> Any:
    """Read a value of the model, whether the optimizer held it when it was saved or not."""
    if source.param is None:
        return reader.decode(source.value, revive)
    return reader.tensor(source.param)


def _notes(sharded: Sharded, manifest: Manifest, model: Any) -> list[str]:
    """Return what there is to say of buffers that each rank has saved."""
    if model is None or manifest.model is None or not manifest.model.per_rank:
        return []
    saved, here = len(manifest.model.per_rank), sharded.world_size
    if saved == here:
        return []
    what = f"ranks from {saved} on have the buffers of rank 0"
    if here < saved:
        what = f"those of ranks from {here} on were not loaded"
    return [f"{saved} ranks have saved buffers of their own, and {here} ranks load them: {what}"]


def _changed_meanwhile(error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"could not load the checkpoint, as it changed while it was loaded: {error} The optimizer "
        "holds parts of it now: load another."
    )


def _model_failed(error: Exception) -> CheckpointError:
    failure = CheckpointError(
        f"could not load all of the model: {type(error).__name__}: {error}. The optimizer holds "
        "the checkpoint now, and the model parts of it: load again."
    )
    failure.__cause__ = error
    return failure
