"""The report of a load, and the place where training goes on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from shardopt.checkpoint.model import NAMES_REMEDY

_NUM_SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """The report of a load.

    Attributes:
        loaded: The names of the parameters, buffers and other values that were loaded.
        missing: The names of those that are not in the checkpoint, and stay as they are.
        surplus: The names in the checkpoint that nothing here has.
        reshaped: The names of those that have another shape or dtype in the checkpoint and stay as
            they are, with the shapes and dtypes here and there.
        matched_by_order: The number of parameters that were matched by their order, as they have no
            names here or there.
        notes: Sentences about all else that is not as it was saved.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    reshaped: Mapping[str, str] = field(default_factory=dict)
    matched_by_order: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_perfect(self) -> bool:
        """Whether all of the checkpoint was loaded into all that there is, by name."""
        imperfect = self.missing, self.surplus, self.reshaped, self.matched_by_order, self.notes
        return not any(imperfect)

    def without(self, refused: Sequence[str]) -> Self:
        """Return the report if the model does not take some of the values."""
        loaded = tuple(name for name in self.loaded if name not in refused)
        return replace(self, loaded=loaded, surplus=(*self.surplus, *refused))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"loaded {len(self.loaded)} parameters, buffers and other values"
        if self.matched_by_order:
            yield (
                f"  matched by their order: {self.matched_by_order} of the parameters, as they "
                f"have no names here or in the checkpoint. {NAMES_REMEDY}."
            )
        if self.missing:
            yield f"  not in the checkpoint, stay as they are: {_some(self.missing)}"
        if self.surplus:
            yield f"  only in the checkpoint, not loaded: {_some(self.surplus)}"
        if self.reshaped:
            differences = [f"{name} ({each})" for name, each in self.reshaped.items()]
            yield f"  of another shape or dtype, stay as they are: {_some(differences)}"
        for note in self.notes:
            yield f"  {note}"


@dataclass(frozen=True)
class Restored:
    """Where training goes on.

    Attributes:
        step: The step that was given to ``save``.
        extra: What was given to ``save``; its ``per_rank`` is a list with an entry for each rank.
        path: The checkpoint.
        model: The model that was given, with what was loaded: a new pytree for JAX; None if no
            model was given.
        report: What was loaded and what was not; empty if nothing has been loaded yet.
    """

    step: int
    extra: dict[str, Any] | None
    path: Path
    model: Any = None
    report: LoadReport = LoadReport(())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_SHOWN])
    more = len(names) - _NUM_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
