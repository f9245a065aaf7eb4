"""The table of a node's memory for each parameter, by setting, nodes and ranks; computed, exact."""

from collections.abc import Iterator, Mapping
from typing import Any

PART = "bytes"

NUM_NODES, NODE_SIZES = (1, 2, 8), (2, 4, 8)
_NUMEL = 1_000_000_000
_NONE = "–"
_ROWS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "float32": (
        {},
        {"stage": 2},
        {"stage": 2, "accumulate": "node"},
        {"stage": 2, "update_in_backward": True},
        {"stage": 2, "optim_bits": 8},
    ),
    "bfloat16": (
        {},
        {"optim_bits": 8, "master_weights": False},
        {"stage": 2},
        {"stage": 2, "optim_bits": 8, "master_weights": False},
        {"stage": 2, "update_in_backward": True, "optim_bits": 8, "master_weights": False},
    ),
}


def bytes_text() -> str:
    """Write bytes per node and parameter as a table in Markdown."""
    from benchmarks.contenders.internals import written  # here: loads NumPy

    places = [(nodes, ranks) for nodes in NUM_NODES for ranks in NODE_SIZES]
    head = ["", *(f"{nodes} x {ranks}" for nodes, ranks in places)]
    rows = [head, ["---", *["---:"] * len(places)]]
    for dtype, policies in _ROWS.items():
        for settings in policies:
            named = written(settings)
            cells = _cells(dtype, settings, places)
            rows.append([f"{dtype}{named and f', `{named}`'}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (
        f"\n\nNodes x ranks of each; {_NUMEL:,} parameters in 256 equal tensors, with "
        f"the ring, staging buffers and late gradients, as `shardopt plan` computes them. {_NONE}: "
        "refused. `python -m benchmarks tables --memory --into docs/memory.md` writes this table."
    )


def _cells(dtype: str, settings: Mapping[str, Any], places: list[tuple[int, int]]) -> Iterator[str]:
    from benchmarks.contenders.internals import planned_memory  # here: loads NumPy
    from shardopt import ShardPolicy

    for place in places:
        report = planned_memory(_NUMEL, dtype, *place, ShardPolicy(**settings))
        yield _NONE if report is None else f"{report.node_nbytes / _NUMEL:.2f}"
