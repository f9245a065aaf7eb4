"""Confidence intervals of medians, with no assumption about the distribution of the samples."""

from collections.abc import Sequence
from math import comb

Interval = tuple[float, float]


def interval_of_median(samples: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return the confidence interval of a median: two of the samples.

    Each sample is below the median with a probability of one half, so the number of samples below
    it has a binomial distribution.

    Args:
        samples: They must be independent.
        confidence: The least probability that the median is between the two.

    Returns:
        The lower and the upper end; None if there are too few samples.
    """
    ordered, count = sorted(samples), len(samples)
    num_below, outside = 0, 2 * comb(count, 0) / 2**count
    while outside <= 1 - confidence:
        num_below += 1
        outside += 2 * comb(count, num_below) / 2**count
    return (ordered[num_below - 1], ordered[-num_below]) if num_below else None
