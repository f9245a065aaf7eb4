"""Which part of a checkpoint goes where: by name, or by order where there are no names.

Nothing is read here except the manifest.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from shardopt.checkpoint.format.manifest import Manifest, ModelEntry
from shardopt.checkpoint.format.messages import must, require
from shardopt.checkpoint.format.names import is_position, plain_name
from shardopt.checkpoint.format.values import stored_array
from shardopt.checkpoint.model import NamedModel
from shardopt.checkpoint.report import LoadReport
from shardopt.checkpoint.tensors import dtype_and_shape, dtype_of
from shardopt.errors import CheckpointError
from shardopt.layout.partition import ParamSpec

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class LoadOptions:
    """How to load; see ``load``."""

    strict: bool = True
    only: str | None = None
    rename: Rename | None = None
    other_optimizer: bool = False

    def require_valid(self) -> None:
        """Check the values.

        Raises:
            CheckpointError: One of them is none of those that there are.
        """
        is_known = self.only in (None, "params")
        require(is_known, "only", "be None or 'params'", repr(self.only), "Leave it out for all")
        is_rename = self.rename is None or callable(self.rename) or isinstance(self.rename, Mapping)
        rule, remedy = "be a dict or a function", "Write {'old': 'new'}"
        require(is_rename, "rename", rule, type(self.rename).__name__, remedy)


@dataclass(frozen=True)
class Source:
    """A tensor, or another value, in a checkpoint.

    Attributes:
        name: Its name, renamed.
        dtype: NumPy's name for the type of its elements; None if it is no tensor.
        shape: Its shape; None if it is no tensor.
        param: Index of the parameter; None if it is a value of the model.
        group: Index of its param group; likewise.
        value: The value of the model, encoded.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None
    param: int | None = None
    group: int | None = None
    value: Any = None


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint by name, renamed.

    Attributes:
        params: The parameters, in order.
        values: The values of the model for this rank, by name.
        renamed: The names that ``rename`` has changed, with what they are now.
        aliases: Further names, each with the first name of the same tensor.
    """

    params: Sequence[Source]
    values: Mapping[str, Source]
    aliases: Mapping[str, str]
    renamed: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The names of the parameters."""
        return [source.name for source in self.params]

    @cached_property
    def by_name(self) -> dict[str, Source]:
        """Every parameter and value by each of its names."""
        found = {source.name: source for source in self.params} | dict(self.values)
        return found | {name: found[to] for name, to in self.aliases.items() if to in found}


@dataclass(frozen=True)
class Match:
    """The source of everything that is loaded.

    Attributes:
        params: For each parameter of the optimizer its source, or None if it stays as it is.
        values: For values of the model, by name, the source.
        report: A report of it.
    """

    params: Sequence[Source | None]
    values: Mapping[str, Source]
    report: LoadReport


def read_saved(manifest: Manifest, rename: Rename | None, rank: int) -> Saved:
    """Return the content of a checkpoint with the names that it is to have.

    Raises:
        CheckpointError: ``rename`` names what is not there, or gives a name twice.
    """
    model = manifest.model or ModelEntry({})
    encoded = model.values_of(rank)
    names = [*(entry.name for entry in manifest.params), *encoded, *model.aliases]
    renamed = _renamed(names, rename)
    params = [
        Source(renamed[entry.name], entry.dtype, entry.shape, index, entry.group)
        for index, entry in enumerate(manifest.params)
    ]
    values = {}
    for name, value in encoded.items():
        array = stored_array(manifest, value)
        dtype, shape = (dtype_of(array.dtype, array.form), array.shape) if array else (None, None)
        values[renamed[name]] = Source(renamed[name], dtype, shape, value=value)
    aliases = {renamed[name]: renamed.get(to, to) for name, to in model.aliases.items()}
    changed = {old: new for old, new in renamed.items() if old != new}
    return Saved(params, values, aliases, changed)


def match(
    saved: Saved, named: NamedModel, specs: Sequence[ParamSpec], options: LoadOptions
) -> Match:
    """Find the sources of everything that is here.

    Args:
        saved: The content of the checkpoint.
        named: The names here.
        specs: The parameters of the optimizer.
        options: How to load.

    Raises:
        CheckpointError: The checkpoint is of another model, and not all of it was to be loaded.
    """
    sources, by_order = _match_params(named.names, saved)
    if options.strict:
        _require_same_params(named.names, specs, sources, saved, with_group=options.only is None)
    tally = _Tally()
    params = [
        tally.take(name, source, spec.dtype, spec.shape)
        for name, spec, source in zip(named.names, specs, sources, strict=True)
    ]
    here = {} if named.content is None else named.content.values
    sources = _find(list(here), saved)
    found = {
        name: tally.take(name, source, *_form_of(name, value))
        for (name, value), source in zip(here.items(), sources, strict=True)
    }
    everything = [*saved.names, *saved.values]
    surplus = [name for name in everything if name not in tally.used]
    if options.strict and named.content is not None:
        _require_same_values(here, surplus, tally)
    values = {name: source for name, source in found.items() if source is not None}
    notes = []
    if named.content is None and saved.values:
        notes.append(f"{len(saved.values)} buffers and other values of the model: pass model=")
    report = LoadReport(
        tuple(tally.loaded),
        tuple(tally.missing),
        tuple(surplus),
        tally.reshaped,
        by_order,
        tuple(notes),
    )
    return Match(params, values, report)


class _Tally:
    """Counts what is loaded and what is not."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.missing: list[str] = []
        self.reshaped: dict[str, str] = {}
        self.used: set[str] = set()

    def take(
        self,
        name: str,
        source: Source | None,
        dtype: str | None,
        shape: tuple[int, ...] | None,
    ) -> Source | None:
        """Return the source if it fits."""
        if source is None:
            self.missing.append(name)
            return None
        self.used.add(source.name)
        if (dtype, shape) == (source.dtype, source.shape):
            self.loaded.append(name)
            return source
        here, there = _form(dtype, shape), _form(source.dtype, source.shape)
        self.reshaped[name] = f"{here} here, {there} in the checkpoint"
        return None


def _match_params(names: Sequence[str], saved: Saved) -> tuple[list[Source | None], int]:
    """Return the source of each parameter, and how many were found by order."""
    both = names, saved.names
    has_positions = any(all(map(is_position, each, range(len(each)))) for each in both)
    if has_positions and len(names) == len(saved.names):
        return list(saved.params), len(names)
    sources = _find(names, saved)
    positions = (is_position(name, index) for index, name in enumerate(names))
    matched = zip(positions, sources, strict=True)
    return sources, sum(positional and source is not None for positional, source in matched)


def _find(names: Sequence[str], saved: Saved) -> list[Source | None]:
    """Return the source of each name."""
    found = saved.by_name
    sources = [found.get(name) for name in names]
    if None in sources:  # the model, or the one that was saved, may have been wrapped
        plain = _plain_names(found)
        wanted = _plain_names(names)
        if len(plain) == len(found) and len(wanted) == len(names):
            by_plain = {key: found[name] for key, name in plain.items()}
            sources = [by_plain.get(key) for key in wanted]
    return sources


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return names by what they are without the prefixes of torch's wrappers."""
    return {plain_name(name): name for name in names}


def _require_same_params(
    names: Sequence[str],
    specs: Sequence[ParamSpec],
    sources: Sequence[Source | None],
    saved: Saved,
    *,
    with_group: bool,
) -> None:
    """Refuse parameters that are not those of the checkpoint, one for one."""
    if len(names) != len(saved.params):
        raise other_model("the model", f"have {len(saved.params)} parameters", len(names))
    taken = {source.name for source in sources if source is not None and source.param is not None}
    missing = [name for name in saved.names if name not in taken]
    if missing:
        surplus = next(
            name for name, s in zip(names, sources, strict=True) if s is None or s.param is None
        )
        raise other_model("the model", f"have a parameter {missing[0]!r}", f"{surplus!r} instead")
    for name, spec, source in zip(names, specs, sources, strict=True):
        assert source is not None
        for what in ("shape", "dtype", "group") if with_group else ("shape", "dtype"):
            here, there = getattr(spec, what), getattr(source, what)
            if here != there:
                raise other_model(f"{what} of {name!r}", f"be {there}", here)


def _require_same_values(here: Mapping[str, Any], surplus: Sequence[str], tally: _Tally) -> None:
    """Refuse a model that has not the buffers and other values of the checkpoint."""
    missing = [name for name in tally.missing if name in here]
    if missing:
        raise CheckpointError(
            must(
                "the checkpoint",
                f"hold {missing[0]!r}, as the model does",
                f"no value for {len(missing)} names",
                f"Save it with model=, or {_PARTLY}",
            )
        )
    if surplus:
        raise other_model("the model", f"have {surplus[0]!r}", "nothing of that name")
    for name, difference in tally.reshaped.items():
        raise other_model(f"{name!r}", "have the same shape and dtype", difference)


def other_model(what: str, rule: str, got: object) -> CheckpointError:
    """Return the error for a checkpoint of another model."""
    remedy = f"Load it into the optimizer of the model it was saved from, or {_PARTLY}"
    return CheckpointError(must(what, f"{rule}, as in the checkpoint", got, remedy))


_PARTLY = "pass strict=False to load what fits"


def _form_of(name: str, value: Any) -> tuple[str | None, tuple[int, ...] | None]:
    """Return dtype and shape of a value of the model, as they would be saved."""
    try:
        return dtype_and_shape(value)
    except (RuntimeError, TypeError, ValueError) as error:
        rule, got = "be a tensor that can be saved", f"{type(value).__name__} ({error})"
        remedy = "Load into a dense tensor, and convert it after that"
        raise CheckpointError(must(f"{name!r} of the model", rule, got, remedy)) from error


def _form(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"{shape} {dtype}"


def _renamed(names: Sequence[str], rename: Rename | None) -> dict[str, str]:
    """Return the new name of each name."""
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        unknown = next(iter(rename.keys() - set(names)), None)
        rule, remedy = "hold names of the checkpoint", "Look with: shardopt ckpt show"
        require(unknown is None, "rename", rule, repr(unknown), remedy)
        renamed = {name: rename.get(name, name) for name in names}
    else:
        renamed = {name: rename(name) for name in names}
    for new, count in Counter(renamed.values()).items():
        require(type(new) is str, "rename", "give text", repr(new), "Return the new name")
        rule, got = "give each name once", f"{new!r} {count} times"
        require(count == 1, "rename", rule, got, "Choose another name")
    return renamed
