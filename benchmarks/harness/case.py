"""Cases: what a benchmark measures, the ratios it comes down to, and the targets they must meet.

[Note: a case says it once]
A target is written in the ``Case`` that measures it and nowhere else. The tables that a run prints,
the verdict in the JSON line, ``python -m benchmarks`` and the table in README.md all read it there.
So that they can, a case is declared in the ``__init__`` of its package, which loads neither MPI nor
Numba; what measures it is in the ``measure`` module beside it.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from benchmarks.harness.medians import Interval, interval_of_median
from benchmarks.harness.result import Result


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a ratio: exactly one of ``at_least`` and ``at_most``.

    Attributes:
        at_least: The lowest value that meets it.
        at_most: The highest value that meets it.
        with_mpi: Bounds that hold instead with some MPI libraries, by the beginning of their name.
    """

    at_least: float | None = None
    at_most: float | None = None
    with_mpi: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(
                "a target must have one bound; got "
                f"at_least={self.at_least}, at_most={self.at_most}. Give one of them."
            )

    @property
    def more_is_better(self) -> bool:
        """True if the bound is a lower one."""
        return self.at_least is not None

    def bound(self, mpi: str = "") -> float:
        """Return the bound that holds with an MPI library."""
        usual = self.at_least if self.at_most is None else self.at_most
        assert usual is not None
        matching = (bound for name, bound in self.with_mpi.items() if mpi.startswith(name))
        return next(matching, usual)

    def is_met(self, value: float, mpi: str = "") -> bool:
        """Return whether ``value`` meets the target."""
        bound = self.bound(mpi)
        return value >= bound if self.more_is_better else value <= bound

    def __str__(self) -> str:
        """Return the bound in words."""
        words = f"at {'least' if self.more_is_better else 'most'} {self.bound():.6g}"
        rest = ", ".join(f"{name}: {bound:g}" for name, bound in self.with_mpi.items())
        return f"{words} ({rest})" if rest else words


@dataclass(frozen=True, slots=True)
class Ratio:
    """One number that a case comes down to, and its target.

    Attributes:
        name: Its key in results; ``{ranks}`` in it stands for their number.
        reads: Keys of samples and figures that it is made of: it is left out where one is missing.
        compute: Computes it from a result that has them; None leaves it out.
        target: The bound it must meet, or None if it is only reported.
        follows: Keys of two samples to the quotient of whose medians it is proportional within a
            run; empty where there are none, as for a count.
        better: The side that is better, if no target says so.
        of_rounds: Computes the values in each round of which it is the median, if it is one.
    """

    name: str
    reads: tuple[str, ...]
    compute: Callable[[Result], float | None]
    target: Target | None = None
    follows: tuple[str, ...] = ()
    better: Literal["more", "less"] | None = None
    of_rounds: Callable[[Result], Sequence[float]] | None = None

    @property
    def more_is_better(self) -> bool | None:
        """True or False where one side is better, None where neither is."""
        if self.target is not None:
            return self.target.more_is_better
        return None if self.better is None else self.better == "more"

    def of(self, result: Result) -> float | None:
        """Return its value in a result, or None if that does not have it."""
        return self.compute(result) if all(map(result.has, self.reads)) else None

    def interval(self, result: Result) -> Interval | None:
        """Return its 95 % confidence interval, or None if there are too few rounds for one."""
        if self.of_rounds is None or not all(map(result.has, self.reads)):
            return None
        return interval_of_median(self.of_rounds(result))


def quotient(
    over: str,
    under: str,
    target: Target | None = None,
    *,
    name: str | None = None,
    follows: tuple[str, str] | None = None,
    better: Literal["more", "less"] | None = None,
) -> Ratio:
    """Make the ratio of two samples' medians, or of two figures.

    Args:
        over: Key of the dividend.
        under: Key of the divisor.
        target: The bound it must meet.
        name: Its name, unless it is called ``over / under``.
        follows: See ``Ratio``; None takes ``over`` and ``under``.
        better: See ``Ratio``.
    """

    def compute(result: Result) -> float | None:
        divisor = result.value(under)
        return result.value(over) / divisor if divisor else None

    return Ratio(
        name or f"{over} / {under}",
        (over, under),
        compute,
        target,
        follows=follows or (over, under),
        better=better,
    )


def paired_quotient(
    over: str,
    under: str,
    target: Target | None = None,
    *,
    better: Literal["more", "less"] | None = None,
) -> Ratio:
    """Make a ratio with an interval: the median of the quotients of two samples in each round.

    Speeds that change from round to round, such as those of a shared machine, cancel out in it.

    Args:
        over: Key of the dividend.
        under: Key of the divisor, of which each round has a sample, too.
        target: The bound it must meet.
        better: See ``Ratio``.
    """

    def of_rounds(result: Result) -> list[float]:
        samples = result.samples_s
        return [mine / other for mine, other in zip(samples[over], samples[under], strict=True)]

    return Ratio(
        f"{over} / {under}",
        (over, under),
        lambda result: float(median(of_rounds(result))),
        target,
        follows=(over, under),
        better=better,
        of_rounds=of_rounds,
    )


def figure(name: str, target: Target | None = None) -> Ratio:
    """Make a ratio of a measured figure that has a target by itself."""
    return Ratio(name, (name,), lambda result: result.value(name), target)


@dataclass(frozen=True, slots=True)
class Claim:
    """The setting that targets are for; runs with other settings are only reported.

    Attributes:
        numel: Parameters in the model; None allows any number.
        dtype: Of the parameters; None allows any.
        min_ranks: MPI ranks at least.
        settings: Further settings; results recorded without one of them had it as it is here.
    """

    numel: int | None
    dtype: str | None = "float32"
    min_ranks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def covers(self, result: Result) -> bool:
        """Return whether a result was measured with these settings."""
        return (
            self.numel in (None, result.numel)
            and self.dtype in (None, result.dtype)
            and self.min_ranks <= result.ranks
            and all(
                result.settings.get(key, value) == value for key, value in self.settings.items()
            )
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The value of a ratio in one result, beside its target.

    Attributes:
        name: Of the ratio.
        value: As measured.
        target: What it must meet; None where nothing is claimed.
        bound: The target's bound for the MPI library in use.
        met: Whether it meets the target; None where nothing is claimed.
        more_is_better: Whether the ratio's target, claimed or not, is a lower bound.
        interval: The 95 % confidence interval of the ratio; None if it is not known.
    """

    name: str
    value: float
    target: Target | None
    bound: float | None
    met: bool | None
    more_is_better: bool
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields of an entry of ``ratios`` in a line of a results file."""
        return {
            "name": self.name,
            "value": self.value,
            "target": self.bound,
            "at_least": self.more_is_better,
            "met": self.met,
            "interval": self.interval,
        }


@dataclass(frozen=True, slots=True)
class Quick:
    """The small version of a case, which shows in seconds that it works, and nothing more.

    Attributes:
        words: Its options, as on the command line.
        ranks: MPI ranks.
        modules: Modules without which it is left out.
    """

    words: tuple[str, ...]
    ranks: int = 1
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One benchmark; see [Note: a case says it once].

    Attributes:
        name: On the command line, and of its file of results.
        package: Its package, in which the module ``measure`` measures it.
        measures: What it measures, in a sentence.
        start: How it is started, for example ``mpirun -n 2 python -m benchmarks step``.
        options: A dataclass of its options; see ``benchmarks.harness.options``.
        claim: The setting that the targets are for.
        ratios: What results come down to, with the targets.
        quick: Its small version, or the reason why there is none.
        page: The module whose ``page(results)`` writes one page about all results of a run; None
            for a table of each result.
    """

    name: str
    package: str
    measures: str
    start: str
    options: type[Any]
    claim: Claim
    ratios: tuple[Ratio, ...]
    quick: Quick | str = "no small version is declared"
    page: str | None = None

    def measure(self, options: Any) -> Iterator[Result]:
        """Measure, and yield the results on rank 0. Collective: every rank exhausts it."""
        module = importlib.import_module(f"{self.package}.measure")
        results: Iterator[Result] = module.measure(options)
        return results

    def judge(self, result: Result, *, anyway: bool = False) -> list[Verdict]:
        """Compute the ratios of a result and compare them with their targets.

        Args:
            result: Of this case.
            anyway: Compare even if the targets are not for its setting.
        """
        values = [(ratio, ratio.of(result)) for ratio in self.ratios]
        claimed = anyway or self.claim.covers(result)
        return [
            _verdict(ratio, value, result, claimed) for ratio, value in values if value is not None
        ]


def _verdict(ratio: Ratio, value: float, result: Result, claimed: bool) -> Verdict:
    target, mpi = ratio.target if claimed else None, result.origin.mpi
    return Verdict(
        name=ratio.name.replace("{ranks}", str(result.ranks)),
        value=value,
        target=target,
        bound=None if target is None else target.bound(mpi),
        met=None if target is None else target.is_met(value, mpi),
        more_is_better=ratio.target is None or ratio.target.more_is_better,
        interval=ratio.interval(result),
    )
