"""The picture of how a job scales."""

from shardopt.cli import text
from shardopt.cli.plan.contents import Plan
from shardopt.planner.chart import Chart, Series, draw
from shardopt.planner.estimate import BAND, MEASURED_NODES
from shardopt.planner.scaling import EXCHANGES, Scaling

_NAMES = {"lanes": "shardopt", "direct": "rank to rank", "ring": "ring of nodes"}
_COLORS = {"lanes": 0, "direct": 1, "ring": 2}


def draw_scaling(plan: Plan, scaling: Scaling) -> str:
    """Return step time and memory by number of nodes as an SVG document."""
    points, layout = scaling.points, plan.estimate.layout
    nodes = [point.num_nodes for point in points]
    steps = _steps(scaling)
    memory = [
        Series(name, nodes, [p.peers_nbytes[name] for p in points], color=1 + i, is_thin=True)
        for i, name in enumerate(points[0].peers_nbytes)
    ]
    memory.append(Series("shardopt", nodes, [point.node_nbytes for point in points]))
    x_name = f"nodes of {layout.node_size} ranks"
    first, last = BAND
    return draw(
        f"{text.number(plan.numel)} parameters, {layout.node_size} ranks per node: simulated",
        [
            Chart(
                "Time of a step, simulated",
                x_name,
                steps,
                text.seconds,
                MEASURED_NODES,
                f"extrapolated beyond {MEASURED_NODES} nodes",
            ),
            Chart("Memory of a node", x_name, memory, lambda value: text.nbytes(round(value))),
        ],
        [
            "Step times are simulated, not measured; the limit is that of links or of memory.",
            f"Beyond {MEASURED_NODES} nodes they are extrapolated: bands are latency and cost per "
            f"message x {first:g} to {last:g}.",
            "Memory of shardopt is exact; that of others (dashed) is by formula.",
        ],
    )


def _steps(scaling: Scaling) -> list[Series]:
    points = scaling.points
    nodes = [point.num_nodes for point in points]
    ordered = sorted(EXCHANGES, key=lambda name: -_COLORS[name])  # the product's in front
    steps = [
        Series(
            _NAMES[name],
            nodes,
            [point.step_s[name] for point in points],
            color=_COLORS[name],
            low=[point.low_s[name] for point in points],
            high=[point.high_s[name] for point in points],
        )
        for name in ordered
    ]
    limit = Series("limit", nodes, [p.limit_s for p in points], color=4, is_thin=True)
    return [limit, *steps]
