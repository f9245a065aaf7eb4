"""Loading: every rank reads what it is going to own, from wherever that lies in the checkpoint.

[Note: nothing changes before all is verified]
A damaged checkpoint must leave the optimizer as it was, but there is no memory for a second state.
The moments of an optimizer that has never stepped are zero, and can be zeroed again: they are read
into place and verified as they arrive (``overwrite``). What cannot be restored, the parameters
above all, is verified first (``verify_first``), by way of a buffer, and read again once all ranks
have found everything undamaged; by then it comes from the page cache. The second reading is
verified, too: if the checkpoint has changed in the meantime, all ranks raise, and the optimizer
must be loaded from another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, ParamEntry
from shardopt.checkpoint.format.messages import must
from shardopt.checkpoint.format.parsing import from_text
from shardopt.checkpoint.format.reader import Reader, read_manifest_text
from shardopt.checkpoint.format.requests import Wanted, wanted_slices
from shardopt.comm.consensus import attempt
from shardopt.core.sharded import HasCore, Scalars, Sharded, sharded_of
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.layout.partition import ParamSpec
from shardopt.rule.nadam import Hyperparams, StepCount

_CALL = "load()"


def load(path: str | Path, opt: HasCore) -> dict[str, Any] | None:
    """Load a checkpoint, saved on any number of ranks with any framework.

    Each rank reads only what it needs, straight into place, and verifies all of it. With JAX, take
    the new parameters from ``opt.params`` afterwards; elsewhere they are where they were.

    Collective: every rank.

    Args:
        path: A checkpoint.
        opt: A NAdam of any framework, with parameters of the same names, shapes and dtypes in the
            same groups. If either side has positions instead of names, parameters are matched in
            order.

    Returns:
        The ``extra`` that was saved; its ``per_rank`` is a list with an entry for each rank.

    Raises:
        DamagedCheckpointError: The checkpoint is not what was saved; the message names file and
            chunk. The optimizer is as it was, unless the message says that the checkpoint changed
            while it was loaded; on every rank.
        CheckpointError: The checkpoint is of another model; likewise.
    """
    sharded, path = sharded_of(opt), Path(path).absolute()
    manifest = _share_manifest(sharded, path)
    num_threads = sharded.num_cores
    with Reader(path, manifest) as reader:
        content, error = attempt(lambda: _match(sharded, reader))
        sharded.agree(_CALL, {}, error)
        assert content is not None
        first_pass = [*_headers(sharded, manifest), *content.first_pass()]
        _, error = attempt(lambda: reader.read(first_pass, num_threads))
        try:
            sharded.agree(_CALL, {}, error)
        except Exception:
            content.undo_first_pass()
            raise
        _, error = attempt(lambda: reader.read(content.verify_first, num_threads))
        sharded.agree(_CALL, {}, error and _changed_meanwhile(error))
    sharded.restore(content.scalars)
    return content.extra


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
        verify_first: Where the shards of this rank lie in the files and where they belong: those
            that must be verified before they are read.
        overwrite: Likewise, those that may be read at once; see
            [Note: nothing changes before all is verified].
    """

    scalars: Scalars
    extra: dict[str, Any] | None
    verify_first: list[Wanted]
    overwrite: list[Wanted]

    def first_pass(self) -> list[Wanted]:
        """Return all requests, none of which overwrites what cannot be restored."""
        verify = [Wanted(each.start, each.stop, each.file) for each in self.verify_first]
        return [*verify, *self.overwrite]

    def undo_first_pass(self) -> None:
        """Zero what the first pass has overwritten."""
        for each in self.overwrite:
            if each.target is not None:
                each.target[:] = 0


def _headers(sharded: Sharded, manifest: Manifest) -> list[Wanted]:
    """Return requests to verify this rank's share of the files' headers."""
    files = range(sharded.rank, len(manifest.files), sharded.world_size)
    return [Wanted(0, manifest.files[file].header_nbytes, file) for file in files]


def _match(sharded: Sharded, reader: Reader) -> _Content:
    """Check that a checkpoint fits the optimizer, and find what this rank needs of it.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    reader.require_files()
    manifest, scalars = reader.manifest, sharded.scalars()
    saved_index = match_params(scalars.params, manifest.params)
    never_stepped = all(count.step == 0 for count in scalars.step_counts)
    verify_first: list[Wanted] = []
    overwrite: list[Wanted] = []
    tensors = sharded.tensors()
    for shard, array in zip(tensors, sharded.arrays(tensors), strict=True):
        slices = manifest.slices[saved_index[shard.param]][shard.key]
        may_overwrite = never_stepped and shard.key != PARAM_KEY
        requests = overwrite if may_overwrite else verify_first
        requests += wanted_slices(slices, shard.span, array)
    entries = [manifest.params[index] for index in saved_index]
    saved = Scalars(
        params=scalars.params,
        step_counts=[StepCount(entry.step, entry.mu_product) for entry in entries],
        groups=_read_groups(scalars, reader),
        num_steps=manifest.num_steps,
        loss_scale=manifest.loss_scale,
    )
    return _Content(saved, reader.extra(), verify_first, overwrite)


def match_params(specs: Sequence[ParamSpec], entries: Sequence[ParamEntry]) -> list[int]:
    """Find each parameter of an optimizer among those of a checkpoint.

    Raises:
        CheckpointError: They are not the same; the message names the first difference.
    """
    names, saved = [spec.name for spec in specs], [entry.name for entry in entries]
    if len(names) != len(saved):
        raise _other_model("the model", f"have {len(saved)} parameters", len(names))
    positional = [f"param{index}" for index in range(len(names))]
    if sorted(names) == sorted(saved):
        place = {name: index for index, name in enumerate(saved)}
        found = [place[name] for name in names]
    elif positional in (names, saved):
        found = list(range(len(names)))
    else:
        missing = next(name for name in saved if name not in names)
        surplus = next(name for name in names if name not in saved)
        raise _other_model("the model", f"have a parameter {missing!r}", f"{surplus!r} instead")
    for spec, index in zip(specs, found, strict=True):
        entry = entries[index]
        for what in ("shape", "dtype", "group"):
            here, there = getattr(spec, what), getattr(entry, what)
            if here != there:
                raise _other_model(f"{what} of {spec.name!r}", f"be {there}", here)
    return found


def _read_groups(scalars: Scalars, reader: Reader) -> list[dict[str, Any]]:
    """Read the values of each param group; those that were not saved stay as they are."""
    saved = reader.manifest.groups
    if len(saved) != len(scalars.groups):
        raise _other_model("param_groups", f"be {len(saved)}", len(scalars.groups))
    read: list[dict[str, Any]] = []
    for index, (group, value) in enumerate(zip(scalars.groups, saved, strict=True)):
        values = reader.decode(value)
        if not isinstance(values, dict):
            raise damaged(f"param_groups[{index}]", "be a dict", type(values).__name__)
        values = {**group, **values}
        try:
            hyper = Hyperparams.from_group(values)
            _ = bool(hyper.maximize), bool(hyper.decays_decoupled)
        except (TypeError, ValueError) as error:  # HyperparamsError, or of arrays
            raise damaged(f"param_groups[{index}]", "be valid", str(error)) from None
        read.append(values)
    return read


def _other_model(what: str, rule: str, got: object) -> CheckpointError:
    remedy = "Load it into the optimizer of the model it was saved from"
    return CheckpointError(must(what, f"{rule}, as in the checkpoint", got, remedy))


def _changed_meanwhile(error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"could not load the checkpoint, as it changed while it was loaded: {error} The optimizer "
        "holds parts of it now: load another."
    )
