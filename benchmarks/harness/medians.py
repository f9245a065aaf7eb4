"""Intervals of medians, without any assumption about the distribution of the samples."""

from collections.abc import Sequence
from math import comb

Interval = tuple[float, float]


def interval_of_median(samples: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return two of the samples between which the median of their distribution is.

    Each sample is below it with a probability of one half, so the number of those that are is
    binomial.

    Args:
        samples: Independent ones.
        confidence: The least probability that the median is between the two.

    Returns:
        The two; None if there are too few samples for any to be as likely.
    """
    ordered, count = sorted(samples), len(samples)
    num_below, outside = 0, 2 * comb(count, 0) / 2**count
    while outside <= 1 - confidence:
        num_below += 1
        outside += 2 * comb(count, num_below) / 2**count
    return (ordered[num_below - 1], ordered[-num_below]) if num_below else None
