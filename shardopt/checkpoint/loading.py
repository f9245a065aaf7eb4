"""Loading: every rank reads what it is going to own, wherever in the checkpoint that is.

[Note: nothing changes before all is verified]
A checkpoint that turns out to be damaged must leave the optimizer as it was, but there is no memory
for a second state. The moments of an optimizer that has never stepped are zero, and can be made so
again: they are read into place and verified as they land. What cannot be had back, parameters
above all, is verified first, into a buffer, and read a second time once all ranks have found
everything well; then it comes from the page cache. It is verified again: were it changed in the
meantime, all ranks would say that the optimizer must be loaded from another checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, ParamEntry, from_text
from shardopt.checkpoint.format.reader import Reader, Wanted, read_manifest_text, wanted_slices
from shardopt.checkpoint.saving import HasCore, core_of
from shardopt.checkpoint.snapshot import owned_parts, part_arrays
from shardopt.comm.consensus import attempt
from shardopt.core.optimizer import Optimizer
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.layout.partition import ParamSpec
from shardopt.params.groups import Group, group_values
from shardopt.report import StepReport
from shardopt.rule.nadam import Hyperparams, StepCount


def load(path: str | Path, opt: HasCore) -> dict[str, Any] | None:
    """Load a checkpoint that any number of ranks, with any face, has saved.

    Each rank reads only what it needs, straight into place, and verifies all of it. JAX users take
    the new parameters from ``opt.params`` afterwards; all others find them where they were.

    Collective: every rank.

    Args:
        path: A checkpoint.
        opt: A NAdam of any face, with parameters of the same names, shapes and dtypes in the same
            groups. Where either side has no names but positions, order takes the place of names.

    Returns:
        What was saved as ``extra``. ``extra["per_rank"]`` is a list of what each rank had.

    Raises:
        DamagedCheckpointError: The checkpoint is not what was saved; names file and chunk. The
            optimizer is as it was, unless the message says that the checkpoint changed while it
            was loaded; on every rank.
        CheckpointError: It is of another model; likewise.
    """
    core, path = core_of(opt), Path(path).absolute()
    manifest = _share_manifest(core, path)
    with Reader(path, manifest) as reader:
        content, error = attempt(lambda: _match(core, reader))
        _agree(core, error)
        assert content is not None
        _, error = attempt(lambda: reader.read(content.first_pass(core, manifest), core.num_cores))
        try:
            _agree(core, error)
        except Exception:
            content.blank()
            raise
        _, error = attempt(lambda: reader.read(content.precious, core.num_cores))
        _agree(core, error and _changed_meanwhile(error))
    core.take_over(
        content.groups,
        content.step_counts,
        StepReport(step=manifest.num_steps, loss_scale=manifest.loss_scale),
    )
    core.take_over_params()
    return content.extra


def _share_manifest(core: Optimizer[Any], path: Path) -> Manifest:
    """Let rank 0 read the manifest, and give it to all. Collective."""
    text, error = None, None
    if core.topology.rank == 0:
        text, error = attempt(lambda: read_manifest_text(path))
    core.enter_call("load()", {"path": str(path)}, error)
    everyones = core.collectives.gather(text, core.last_step.step, "load()")[0]
    assert everyones is not None
    manifest, error = attempt(lambda: from_text(everyones))
    _agree(core, error)
    assert manifest is not None
    return manifest


@dataclass(frozen=True)
class _Content:
    """What of a checkpoint this rank takes over.

    Attributes:
        groups: Values for each param group.
        step_counts: For each parameter.
        extra: As it was saved.
        precious: Where what this rank owns is in the files, and where it belongs: what must be
            verified before it is read.
        disposable: What may be read at once, likewise; see
            [Note: nothing changes before all is verified].
    """

    groups: list[Group]
    step_counts: list[StepCount]
    extra: dict[str, Any] | None
    precious: list[Wanted]
    disposable: list[Wanted]

    def first_pass(self, core: Optimizer[Any], manifest: Manifest) -> list[Wanted]:
        """Verify what is precious, and this rank's share of the headers; read the disposable."""
        files = range(core.topology.rank, len(manifest.files), core.topology.world_size)
        headers = [Wanted(i, 0, manifest.files[i].header_nbytes, None) for i in files]
        return [*headers, *(run._replace(target=None) for run in self.precious), *self.disposable]

    def blank(self) -> None:
        """Undo the first pass."""
        for run in self.disposable:
            if run.target is not None:
                run.target[:] = 0


def _match(core: Optimizer[Any], reader: Reader) -> _Content:
    """Check that a checkpoint fits the optimizer, and find what this rank needs of it.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    reader.require_files()
    manifest = reader.manifest
    saved_index = match_params([param.spec for param in core.partition.params], manifest.params)
    entries = [manifest.params[index] for index in saved_index]
    never_stepped = all(clock.step == 0 for clock in core.step_counts)
    precious: list[Wanted] = []
    disposable: list[Wanted] = []
    parts = list(owned_parts(core.partition, core.buffers))
    for part, array in zip(parts, part_arrays(parts, core.buffers), strict=True):
        slices = manifest.slices[saved_index[part.param]][part.key]
        pile = disposable if never_stepped and part.key != PARAM_KEY else precious
        pile += wanted_slices(slices, part.start, part.stop, array)
    return _Content(
        groups=_read_groups(core.param_groups, reader),
        step_counts=[StepCount(entry.step, entry.mu_product) for entry in entries],
        extra=reader.extra(),
        precious=precious,
        disposable=disposable,
    )


def match_params(specs: Sequence[ParamSpec], entries: Sequence[ParamEntry]) -> list[int]:
    """Find each parameter of an optimizer among those of a checkpoint.

    Raises:
        CheckpointError: They are not the same; names the first that is another.
    """
    names, saved = [spec.name for spec in specs], [entry.name for entry in entries]
    if len(names) != len(saved):
        raise _misfit("the model", f"have {len(saved)} parameters", len(names))
    positional = [f"param{index}" for index in range(len(names))]
    if sorted(names) == sorted(saved):
        place = {name: index for index, name in enumerate(saved)}
        found = [place[name] for name in names]
    elif positional in (names, saved):
        found = list(range(len(names)))
    else:
        missing = next(name for name in saved if name not in names)
        surplus = next(name for name in names if name not in saved)
        raise _misfit("the model", f"have a parameter {missing!r}", f"{surplus!r} instead")
    for spec, index in zip(specs, found, strict=True):
        entry = entries[index]
        for what in ("shape", "dtype", "group"):
            here, there = getattr(spec, what), getattr(entry, what)
            if here != there:
                raise _misfit(f"{what} of {spec.name!r}", f"be {there}", here)
    return found


def _read_groups(groups: Sequence[Group], reader: Reader) -> list[Group]:
    saved = reader.manifest.groups
    if len(saved) != len(groups):
        raise _misfit("param_groups", f"be {len(saved)}", len(groups))
    read: list[Group] = []
    for index, (group, value) in enumerate(zip(groups, saved, strict=True)):
        values = reader.decode(value)
        if not isinstance(values, dict):
            raise damaged(f"param_groups[{index}]", "be a dict", type(values).__name__)
        values = group_values({**group, **values})
        try:
            hyper = Hyperparams.from_group(values)
            _ = bool(hyper.maximize), bool(hyper.decays_decoupled)
        except (TypeError, ValueError) as error:  # HyperparamsError, or of arrays
            raise damaged(f"param_groups[{index}]", "be valid", str(error)) from None
        read.append(values)
    return read


def _misfit(what: str, rule: str, got: object) -> CheckpointError:
    return CheckpointError(
        f"{what} must {rule}, as in the checkpoint; got {got}. Load it into the optimizer of the "
        "model it was saved from."
    )


def _changed_meanwhile(error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"a checkpoint must not change while it is loaded; got, at the second reading: {error} "
        "The optimizer holds parts of it now: load another."
    )


def _agree(core: Optimizer[Any], error: Exception | None) -> None:
    core.enter_call("load()", {}, error)
