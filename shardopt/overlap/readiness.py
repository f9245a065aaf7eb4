"""Which buckets have all their gradients: counting, without MPI, threads or arrays."""

from collections.abc import Sequence


class Readiness:
    """Counts how often backward has accumulated into each gradient.

    Nobody can tell whether more will be accumulated, so each rank goes by its last step: a
    parameter is *ready* once backward has reached it as often as then. So micro-batches count, and
    parameters that are not used do not hold up others. A bucket is ready when all its parameters
    are; buckets are announced in order, so only a prefix of them counts.

    Attributes:
        is_counting: Whether a gradient has been counted since ``start_step``.
    """

    def __init__(self) -> None:
        self.is_counting = False
        self._count: list[int] = []
        self._expected: list[int] = []
        self._buckets_of: list[list[int]] = []
        self._num_missing: list[int] = []  # for each bucket, parameters that are not ready
        self._unused: list[list[int]] = []  # for each bucket, what starts in it and is not expected

    def extend(self, params_of: Sequence[Sequence[int]], num_params: int) -> None:
        """Take over another layout; counts stay.

        Args:
            params_of: For each bucket, in the order in which they are sent, its parameters.
            num_params: Number of all parameters, those counted so far being the first of them.
        """
        self._count += [0] * (num_params - len(self._count))
        self._buckets_of = [[] for _ in range(num_params)]
        for bucket, params in enumerate(params_of):
            for param in params:
                self._buckets_of[param].append(bucket)
        self._num_missing = [0] * len(params_of)

    def start_step(self) -> None:
        """Expect as many gradients of each parameter as in the step that has just ended."""
        self._expected, self._count = self._count, [0] * len(self._count)
        self.is_counting = False
        self._num_missing = [0] * len(self._num_missing)
        self._unused = [[] for _ in self._num_missing]
        for param, buckets in enumerate(self._buckets_of):
            if self._expected[param]:
                for bucket in buckets:
                    self._num_missing[bucket] += 1
            elif buckets:
                self._unused[buckets[0]].append(param)

    def knows(self, param: int) -> bool:
        """Whether the parameter is in the layout; one that was just added may not be yet."""
        return param < len(self._buckets_of)

    def count(self, param: int) -> int:
        """Count a gradient that backward has accumulated.

        Returns:
            How many are still expected: 0 if this was the last one, negative if it is surplus.
        """
        self.is_counting = True
        self._count[param] += 1
        return self._expected[param] - self._count[param]

    def mark_ready(self, param: int) -> None:
        """Note that the last gradient of a parameter is where it will be sent from."""
        for bucket in self._buckets_of[param]:
            self._num_missing[bucket] -= 1

    def num_ready(self, first: int = 0) -> int:
        """Return how many buckets are ready without a gap, if the first ``first`` are."""
        stop = first
        while stop < len(self._num_missing) and not self._num_missing[stop]:
            stop += 1
        return stop

    def unused_in(self, bucket: int) -> Sequence[int]:
        """Return the parameters that start in a bucket and that no gradient is expected of."""
        return self._unused[bucket]

    def buckets_of(self, param: int) -> Sequence[int]:
        """Return the buckets that a parameter is in."""
        return self._buckets_of[param]

    def params_before(self, stop: int) -> Sequence[int]:
        """Return the parameters with a part in the first ``stop`` buckets."""
        if not stop:
            return ()
        # Each list is in ascending order.
        return [param for param, b in enumerate(self._buckets_of) if b and b[0] < stop]

    def mask_of(self, param: int, stop: int) -> int:
        """Return the bit mask of the first ``stop`` buckets that a parameter is in."""
        return sum(1 << bucket for bucket in self._buckets_of[param] if bucket < stop)
