"""The memory of a node by setting, as bars: computed by the formulas that training itself uses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.contenders.internals import planned_memory
from shardopt import ShardPolicy

NUMEL, NODE_SIZE, NUM_NODES = 10**9, 8, 8
_LABELS, _PANEL, _GAP = 290, 320, 16  # widths: of the names of settings, of bars, between them
_TOP, _ROW, _BAR, _GROUP = 104, 27, 17, 34  # heights: above, of a row, of its bar, of a heading
_FOOT = 64

_PARTS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("parameters", "params", ("params_node_nbytes",)),
    ("gradients", "grads", ("grads_node_nbytes",)),
    ("ring, late gradients", "ring", ("ring_node_nbytes", "late_node_nbytes")),
    ("sums and staging buffers", "travel", ("travel_node_nbytes",)),
    ("moments", "moments", ("moments_node_nbytes",)),
    ("float32 masters", "masters", ("masters_node_nbytes",)),
)
"""Each part of a bar: its name, its class in the style, and what it consists of."""

_LOW: Mapping[str, Mapping[str, Any]] = {
    "float32": {"optim_bits": 8},
    "bfloat16": {"optim_bits": 8, "master_weights": False},
}
_NAMES = {
    "float32": "optim_bits=8",
    "bfloat16": "optim_bits=8, master_weights=False",
}

_STYLE = """
  svg { color-scheme: light dark; font: 12px system-ui, sans-serif; }
  .page { fill: #ffffff; } text { fill: #24292f; } .pale { fill: #57606a; }
  .grid { stroke: #d8dee4; } .heading { font-weight: 600; font-size: 15px; }
  .title { font-weight: 600; font-size: 13px; } .value { font-weight: 600; }
  .params { fill: #0b7a75; } .grads { fill: #c2410c; } .ring { fill: #d4a72c; }
  .travel { fill: #0550ae; } .moments { fill: #8250df; } .masters { fill: #8c959f; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } text { fill: #e6edf3; } .pale { fill: #9198a1; }
    .grid { stroke: #30363d; }
    .params { fill: #39c5bb; } .grads { fill: #ff9b6a; } .ring { fill: #e3b341; }
    .travel { fill: #6cb6ff; } .moments { fill: #c297ff; } .masters { fill: #656c76; }
  }
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: its name, and the bytes of each part for a parameter, by number of nodes.

    The bytes are None where the setting is refused.
    """

    name: str
    parts: Mapping[int, Sequence[float] | None]


def rows(dtype: str) -> list[Row]:
    """Compute the memory of each setting.

    Args:
        dtype: Of the parameters.
    """
    found = []
    stages: Mapping[str, Mapping[str, Any]] = {
        "stage=1": {"stage": 1},
        "stage=2": {"stage": 2},
        "stage=2, update_in_backward": {"stage": 2, "update_in_backward": True},
    }
    for name, stage in stages.items():
        for more, low in (("", {}), (_NAMES[dtype], _LOW[dtype])):
            policy = ShardPolicy(**stage, **low)
            parts = {num_nodes: _parts(dtype, num_nodes, policy) for num_nodes in (1, NUM_NODES)}
            found.append(Row(f"+ {more}" if more else name, parts))
    return found


def _parts(dtype: str, num_nodes: int, policy: ShardPolicy) -> list[float] | None:
    report = planned_memory(NUMEL, dtype, num_nodes, NODE_SIZE, policy)
    if report is None:
        return None
    return [sum(getattr(report, name) for name in names) / NUMEL for *_, names in _PARTS]


def draw_choosing() -> str:
    """Return the bars of all settings as an SVG document."""
    groups = {dtype: rows(dtype) for dtype in _LOW}
    most = max(sum(p) for g in groups.values() for row in g for p in row.parts.values() if p)
    scale = (_PANEL - 50) / most
    width = _LABELS + 2 * (_PANEL + _GAP)
    height = _TOP + sum(_GROUP + _ROW * len(group) for group in groups.values()) + _FOOT
    heading = f"Memory of a node of {NODE_SIZE} ranks, bytes for each parameter"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(heading)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        _text(16, 26, heading, "heading"),
        *_legend(),
    ]
    for number, title in enumerate(("on one node", f"on each of {NUM_NODES} nodes")):
        parts.append(_text(_LABELS + number * (_PANEL + _GAP), _TOP - 8, title, "title"))
    y = _TOP
    for dtype, group in groups.items():
        parts.append(_text(16, y + 23, f"{dtype} parameters", "title"))
        y += _GROUP
        for row in group:
            indent = 28 if row.name.startswith("+") else 16
            parts.append(_text(indent, y + 13, row.name, ""))
            for number, bar in enumerate(row.parts.values()):
                parts += _draw_bar(_LABELS + number * (_PANEL + _GAP), y, bar, scale)
            y += _ROW
    notes = (
        "10⁹ parameters in 256 equal tensors, so that 16.3 means 16.3 GB. Computed by the formulas "
        "of opt.memory_report(), which count no activations.",
        "Late gradients are counted at their most: what ranks keep while the ring is full.",
    )
    parts += [_text(16, y + 24 + 16 * i, note, "pale") for i, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>\n"])


def _legend() -> list[str]:
    parts, x = [], 16.0
    for name, kind, _ in _PARTS:
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="46" width="12" height="12"/>')
        parts.append(_text(x + 18, 56, name, ""))
        x += 40 + 6.1 * len(name)
    return parts


def _draw_bar(x: float, y: float, values: Sequence[float] | None, scale: float) -> list[str]:
    if values is None:
        return [_text(x, y + 13, "refused on several nodes", "pale")]
    parts = []
    for (_, kind, _), value in zip(_PARTS, values, strict=True):
        if value:
            place = f'x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="{_BAR}"'
            parts.append(f'<rect class="{kind}" {place}/>')
        x += value * scale
    return [*parts, _text(x + 6, y + 13, f"{sum(values):.1f}", "value")]


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
