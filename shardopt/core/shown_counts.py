"""Step counts as users see them, in memory that they may write to."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shardopt._typing import FloatArray
from shardopt.params.writes import Written
from shardopt.rule.coefficients import StepCount

_GONE = -1


class _Chunk:
    """The counts of parameters that came together.

    Args:
        params: The number of each parameter.
        dtypes: Of the counts, by key.

    Attributes:
        params: As given; ``_GONE`` for one that has left.
        values: By key, [num_params] each, as users see and change them.
        shown: The same as they were shown.
    """

    def __init__(self, params: Sequence[int], dtypes: Mapping[str, str]) -> None:
        self.params = list(params)
        self.values: dict[str, FloatArray]
        self.shown: dict[str, FloatArray]
        self.values, self.shown = (
            {key: np.zeros(len(params), dtype) for key, dtype in dtypes.items()} for _ in range(2)
        )

    def show(self, counts: Sequence[StepCount]) -> None:
        """Show other values where users have not changed them."""
        for key in self.values:
            pairs = zip(self.params, self.shown[key].tolist(), strict=True)
            new = [old if param == _GONE else getattr(counts[param], key) for param, old in pairs]
            is_shown = self.values[key] == self.shown[key]
            self.shown[key][:] = new
            self.values[key][is_shown] = self.shown[key][is_shown]


class ShownCounts:
    """The step counts of all parameters; their memory stays where it is when parameters move.

    Args:
        step_dtype: Of the number of steps.
        keys: The keys of a count: see ``Hyperparams.count_keys``.
    """

    def __init__(self, step_dtype: str, keys: Sequence[str]) -> None:
        self._dtypes = {key: step_dtype if key == "step" else "float64" for key in keys}
        self._chunks: list[_Chunk] = []
        self._places: dict[int, tuple[_Chunk, int]] = {}  # by number of the parameter

    def show(self, counts: Sequence[StepCount]) -> None:
        """Show the step count of each parameter where users have not changed it."""
        new = [index for index in range(len(counts)) if index not in self._places]
        if new:
            self._add(_Chunk(new, self._dtypes))
        for chunk in self._chunks:
            chunk.show(counts)

    def values(self, index: int) -> dict[str, FloatArray]:
        """Return the count of a parameter by key, [] each, to read and to write."""
        chunk, offset = self._places[index]
        return {key: chunk.values[key][offset, ...] for key in self._dtypes}

    def edited(self) -> Iterator[Written]:
        """Yield what users have changed, parameter by parameter."""
        found = [
            Written(chunk.params[offset], key)
            for chunk in self._chunks
            for key in self._dtypes
            for offset in np.flatnonzero(chunk.values[key] != chunk.shown[key]).tolist()
        ]
        yield from sorted(edit for edit in found if edit.param != _GONE)

    def forget(self, index: int) -> None:
        """Drop what users have changed of a parameter."""
        chunk, offset = self._places[index]
        for key in self._dtypes:
            chunk.values[key][offset] = chunk.shown[key][offset]

    def rearrange(self, moves: Mapping[int, int]) -> None:
        """Follow parameters to their new numbers; counts of those that leave stay as they are.

        Args:
            moves: The new number of each parameter that stays, by the number so far.
        """
        chunks, self._chunks, self._places = self._chunks, [], {}
        for chunk in chunks:
            chunk.params = [moves.get(param, _GONE) for param in chunk.params]
            if any(param != _GONE for param in chunk.params):
                self._add(chunk)

    def _add(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        for offset, param in enumerate(chunk.params):
            if param != _GONE:
                self._places[param] = chunk, offset
