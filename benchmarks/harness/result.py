"""The result of one run of a case: its samples and figures, and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from benchmarks.harness.machine import Origin, this_run

Samples = dict[str, list[float]]

QUIET = 0.05
"""Share of the cores that other jobs may take; beyond it, times say more about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of one case.

    Attributes:
        case: Name of the case.
        ranks: MPI ranks.
        threads: Threads of each rank.
        dtype: Of the parameters.
        numel: Parameters in the model.
        title: Heading of the table; "" in results that were recorded without one.
        samples_s: Seconds of each round, by key; on several ranks the slowest one's.
        figures: Other measured numbers, by key.
        curves: Measured numbers of which each round has another, such as losses, by key.
        settings: Further settings that tell this run from others of the case.
        left_out: Contenders that could not be measured, and why.
        others: Share of the cores that other jobs took meanwhile; None where no time was measured.
        origin: Where and when it was measured.
    """

    case: str
    ranks: int
    threads: int
    dtype: str
    numel: int
    title: str = ""
    samples_s: Samples = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    others: float | None = None
    origin: Origin = field(default_factory=this_run)

    @property
    def is_quiet(self) -> bool:
        """True if other jobs took so little of the machine that its times count."""
        return (self.others or 0.0) <= QUIET

    def has(self, key: str) -> bool:
        """Return whether something was measured under ``key``."""
        return key in self.samples_s or key in self.figures

    def value(self, key: str) -> float:
        """Return the median of the samples under ``key``, or the figure."""
        if key in self.samples_s:
            return float(median(self.samples_s[key]))
        return self.figures[key]

    def with_figures(self, figures: Mapping[str, float]) -> "Result":
        """Return the same result with figures that were computed from it."""
        return replace(self, figures={**self.figures, **figures})

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a line of a results file; ``case`` goes by ``benchmark`` there."""
        return {
            "benchmark": self.case,
            "title": self.title,
            "date": self.origin.date,
            "commit": self.origin.commit,
            "machine": dict(self.origin.machine),
            "others": None if self.others is None else round(self.others, 3),
            "mpi": self.origin.mpi,
            "versions": dict(self.origin.versions),
            "ranks": self.ranks,
            "threads": self.threads,
            "dtype": self.dtype,
            "numel": self.numel,
            "samples_s": {
                key: [round(value, 9) for value in values] for key, values in self.samples_s.items()
            },
            "figures": dict(self.figures),
            "curves": {key: list(values) for key, values in self.curves.items()},
            "settings": dict(self.settings),
            "left_out": dict(self.left_out),
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Result":
        """Read a line of a results file, also one of an earlier version."""
        kept = ("ranks", "threads", "dtype", "numel", "samples_s", "figures", "settings", "others")
        origin = Origin(
            **{key: line[key] for key in ("date", "commit", "machine", "mpi", "versions")}
        )
        return cls(
            case=line["benchmark"],
            title=line.get("title", ""),
            curves=line.get("curves", {}),
            left_out=line.get("left_out", {}),
            origin=origin,
            **{key: line[key] for key in kept},
        )
