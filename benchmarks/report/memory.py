"""The table of a node's memory for each parameter, by setting, nodes and ranks; computed, exact."""

from collections.abc import Iterator, Mapping
from typing import Any

PART = "bytes"

NUM_NODES, NODE_SIZES = (1, 2, 8), (2, 4, 8)
_NUMEL, _NUM_TENSORS = 1_000_000_000, 256
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
    from shardopt.cli.plan.settings import written  # here: loads NumPy

    places = [(nodes, ranks) for nodes in NUM_NODES for ranks in NODE_SIZES]
    head = ["", *(f"{nodes} x {ranks}" for nodes, ranks in places)]
    rows = [head, ["---", *["---:"] * len(places)]]
    for dtype, policies in _ROWS.items():
        for settings in policies:
            named = written(settings)
            cells = _cells(dtype, settings, places)
            rows.append([f"{dtype}{named and f', `{named}`'}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (
        f"\n\nNodes x ranks of each; {_NUMEL:,} parameters in {_NUM_TENSORS} equal tensors, with "
        f"the ring, staging buffers and late gradients, as `shardopt plan` computes them. {_NONE}: "
        "refused. `python -m benchmarks tables --memory --into docs/memory.md` writes this table."
    )


def _cells(dtype: str, settings: Mapping[str, Any], places: list[tuple[int, int]]) -> Iterator[str]:
    from shardopt.cli.plan.settings import require_combination, with_forms
    from shardopt.errors import HyperparamsError
    from shardopt.planner.estimate import Layout, lay_out, memory_of
    from shardopt.planner.model import evenly
    from shardopt.policy import ShardPolicy

    model = evenly(_NUMEL, dtype, _NUM_TENSORS)
    for place in places:
        layout = Layout(*place, ShardPolicy(**settings))
        try:
            require_combination(model, layout)
        except HyperparamsError:
            yield _NONE
            continue
        partition = lay_out(with_forms(model, layout).specs, layout)
        yield f"{memory_of(partition, layout).node_nbytes / _NUMEL:.2f}"
