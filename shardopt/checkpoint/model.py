"""The model beside the optimizer: the names of parameters, and what else is saved of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardopt.checkpoint.format.manifest import ModelEntry
from shardopt.checkpoint.format.messages import must
from shardopt.checkpoint.format.names import is_position
from shardopt.checkpoint.format.values import Encoder
from shardopt.comm.consensus import digest_of
from shardopt.core.sharded import Sharded
from shardopt.errors import CheckpointError, CheckpointWarning
from shardopt.layout.partition import ParamSpec
from shardopt.params.model import ModelContent


@dataclass(frozen=True)
class NamedModel:
    """The parameters of an optimizer by the names of a model, and the model.

    Attributes:
        names: A name for each parameter: the model's if it has the parameter, else its own.
        content: The model; None if no model was given.
    """

    names: tuple[str, ...]
    content: ModelContent | None

    @property
    def problem(self) -> str | None:
        """The reason to think that this is another model, or None."""
        if self.content is None or any(name is not None for name in self.content.names):
            return None
        return (
            "the model has none of the optimizer's parameters. Pass model= the model that is "
            "trained; with JAX, a pytree that holds opt.params as they are now"
        )

    def description(self) -> dict[str, object]:
        """Return what must be equal on all ranks."""
        content = self.content
        if content is None:
            return {"whether there is a model": False}
        everything = self.names, list(content.values), sorted(content.aliases.items())
        return {
            "whether there is a model": True,
            "the number of buffers and other values of the model": len(content.values),
            "the names in the model (a digest of them)": digest_of(everything),
        }


def name_params(
    sharded: Sharded,
    specs: Sequence[ParamSpec],
    model: Any,
    saved: frozenset[str] | None = None,
) -> NamedModel:
    """Find the names of parameters in a model.

    Args:
        sharded: The optimizer.
        specs: Its parameters.
        model: The model, or None.
        saved: The names of parameters in the checkpoint to be loaded; None for a save.

    Raises:
        CheckpointError: It is no model of the optimizer's framework, or a name occurs twice.
    """
    if model is None:
        return NamedModel(tuple(spec.name for spec in specs), None)
    content = sharded.read_model(model, saved)
    pairs = zip(content.names, specs, strict=True)
    names = tuple(spec.name if name is None else name for name, spec in pairs)
    _require_unique([*names, *content.values, *content.aliases])
    return NamedModel(names, content)


def encode_model(
    content: ModelContent, encoder: Encoder, rank: int, *, per_rank_buffers: bool
) -> tuple[ModelEntry | None, list[tuple[str, Any]] | None]:
    """Encode what a rank saves of the model.

    Returns:
        The entry of the manifest, on rank 0; and this rank's own values, if each saves its own.

    Raises:
        CheckpointError: A value, which the message names, cannot be saved.
    """

    def encode(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: encoder.encode(value, f"{name!r} of the model") for name, value in values.items()
        }

    values = content.values
    own = {n: v for n, v in values.items() if per_rank_buffers and n not in content.params}
    encoded_own = list(encode(own).items()) if per_rank_buffers else None
    if rank != 0:
        return None, encoded_own
    shared = encode({name: value for name, value in values.items() if name not in own})
    versions = encoder.encode(content.versions, "the versions of the model")
    return ModelEntry(shared, None, content.aliases, versions), encoded_own


def order_warning(names: Sequence[str]) -> CheckpointWarning | None:
    """Return the warning that a save has no names for parameters, or None if it has."""
    count = sum(is_position(name, index) for index, name in enumerate(names))
    if count == 0:
        return None
    return CheckpointWarning(
        f"{count} of {len(names)} parameters have no names: the checkpoint has their positions "
        f"instead, and they will be matched by order. {NAMES_REMEDY}."
    )


NAMES_REMEDY = (
    "Pass model= to save and restore, or build the optimizer with names: its params may be "
    "model.named_parameters()"
)


def _require_unique(names: Sequence[str]) -> None:
    seen = set[str]()
    for name in names:
        if name in seen:
            rule = "be unique in the optimizer and the model"
            remedy = (
                "Pass the model that the optimizer trains, whose parameters are other ones after "
                "load_state_dict(assign=True), or rename the parameter that it does not have"
            )
            raise CheckpointError(must("names", rule, f"{name!r} twice", remedy))
        seen.add(name)
