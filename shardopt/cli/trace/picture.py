"""``shardopt trace picture``."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.trace.reading import Event, Run, add_run_argument, choose_run, time_ns
from shardopt.errors import TraceError

_LEFT, _WIDTH, _TOP, _LINE, _GAP = 168, 980, 52, 19, 7
_TEXT = 6.2  # width of a character
_COLORS = {
    **dict.fromkeys(("step", "agree", "reduce", "finish"), 0),
    **dict.fromkeys(("consensus", "wait"), 1),
    **dict.fromkeys(("update",), 2),
    **dict.fromkeys(("reduce_scatter", "sum"), 3),
    **dict.fromkeys(("all_gather",), 4),
}
_STYLE = """
  svg { color-scheme: light dark; font: 11px system-ui, sans-serif; }
  .page { fill: #ffffff; } text { fill: #24292f; } .pale { fill: #57606a; }
  .heading { font-weight: 600; font-size: 14px; } rect { stroke: #ffffff; stroke-width: .6; }
  .grid { stroke: #d8dee4; } .c0 { fill: #d0d7de; } .c1 { fill: #ffc9a3; } .c2 { fill: #9be3dc; }
  .c3 { fill: #d8c2ff; } .c4 { fill: #b6d7ff; } .c5 { fill: #f0d98c; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } text { fill: #e6edf3; } .pale { fill: #9198a1; }
    rect { stroke: #0d1117; } .grid { stroke: #30363d; } .c0 { fill: #3d444d; }
    .c1 { fill: #8f4415; } .c2 { fill: #0b6b66; } .c3 { fill: #553098; } .c4 { fill: #1f4f8f; }
    .c5 { fill: #735c0f; }
  }
"""


@dataclass
class _Row:
    """A row of the picture.

    Attributes:
        title: Left of it.
        lines: Spans by line: those of a thread by how deep they are, flights where there is room.
    """

    title: str
    lines: list[list[tuple[int, int, Event]]] = field(default_factory=list)

    def add(self, start_ns: int, end_ns: int, event: Event) -> None:
        """Put a span on the first line on which nothing overlaps it."""
        for line in self.lines:
            if all(end <= start_ns or start >= end_ns for start, end, _ in line):
                line.append((start_ns, end_ns, event))
                return
        self.lines.append([(start_ns, end_ns, event)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a trace")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.svg", help="to draw")
    parser.add_argument("--step", type=int, metavar="N", help="(default: one in the middle)")
    add_run_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Draw a step."""
    chosen, _, _ = choose_run(options.folder, options.number)
    options.out.write_text(draw_step(chosen, options.step), encoding="utf-8")
    return Exit.FINE


def draw_step(run: Run, step: int | None = None) -> str:
    """Return a step of all ranks as an SVG document.

    Args:
        run: The job.
        step: Its number; None takes one in the middle of those that all ranks have traced.

    Raises:
        TraceError: No rank has traced the step.
    """
    steps: dict[int, list[tuple[int, int]]] = {}
    for start_ns, end_ns, event in _events(run):
        if event["name"] == "step":
            steps.setdefault(event["args"]["step"], []).append((start_ns, end_ns))
    most = max(map(len, steps.values()), default=0)
    whole = [number for number, found in steps.items() if len(found) == most]
    if step not in steps and (step is not None or not whole):
        traced = text.ranges(steps) or "none"
        raise TraceError(f"--step must be a step of the trace; got {step}. It has {traced}.")
    chosen = whole[len(whole) // 2] if step is None else step
    first = min(start for start, _ in steps[chosen])
    last = max(end for _, end in steps[chosen])
    heading = f"Step {chosen} on {len(run.ranks)} ranks, {text.seconds((last - first) / 1e9)}"
    return _draw(heading, _rows(run, first, last), first, last)


def _events(run: Run) -> Iterator[tuple[int, int, Event]]:
    """Yield spans and flights with their beginning and end by the clock of the run."""
    for file, align in zip(run.files, run.alignments, strict=True):
        begun: dict[str, Event] = {}
        for event in file.events():
            if event["ph"] == "X":
                start_ns = time_ns(event)
                yield align(start_ns), align(start_ns + time_ns(event, "dur")), event
            elif event["ph"] == "b":
                begun[event["id"]] = event
            elif event["ph"] == "e" and event["id"] in begun:
                begin = begun.pop(event["id"])
                yield align(time_ns(begin)), align(time_ns(event)), begin


def _rows(run: Run, first: int, last: int) -> list[_Row]:
    titles = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for file in run.files
        for event in file.events()
        if event["name"] == "thread_name"
    }
    found: dict[tuple[int, bool, int], list[tuple[int, int, Event]]] = {}
    for start, end, event in _events(run):
        if end > first and start < last:
            flies = event["ph"] == "b"
            key = event["pid"], flies, 0 if flies else event["tid"]
            found.setdefault(key, []).append((max(start, first), min(end, last), event))
    rows = []
    for (rank, flies, thread), spans in sorted(found.items(), key=lambda item: item[0]):
        what = "between nodes" if flies else titles[rank, thread]
        row = _Row(f"rank {rank}, {what}")
        for start, end, event in sorted(spans, key=lambda span: (span[0], -span[1])):
            row.add(start, end, event)
        rows.append(row)
    return rows


def _draw(heading: str, rows: Sequence[_Row], first: int, last: int) -> str:
    scale = (_WIDTH - _LEFT - 12) / max(1, last - first)
    height = _TOP + sum(len(row.lines) * _LINE + _GAP for row in rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">',
        f"<title>{escape(heading)}</title><style>{_STYLE}</style>",
        f'<path class="page" d="M0 0H{_WIDTH}V{height}H0Z"/>',
        f'<text class="heading" x="12" y="22">{escape(heading)}</text>',
    ]
    for tick in range(5):
        x = _LEFT + tick / 4 * (_WIDTH - _LEFT - 12)
        label = text.seconds((last - first) * tick / 4 / 1e9) if tick else "0"
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP - 6}V{height - 8}"/>')
        anchor = "start" if not tick else "end" if tick == 4 else "middle"
        parts.append(
            f'<text class="pale" x="{x:.1f}" y="{_TOP - 10}" text-anchor="{anchor}">{label}</text>'
        )
    y = _TOP
    for row in rows:
        parts.append(f'<text x="12" y="{y + 13}">{escape(row.title)}</text>')
        for line in row.lines:
            for start, end, event in line:
                x, width = _LEFT + (start - first) * scale, max(0.5, (end - start) * scale)
                parts.append(_bar(x, y, width, event))
            y += _LINE
        y += _GAP
    return "\n".join([*parts, "</svg>\n"])


def _bar(x: float, y: int, width: float, event: Event) -> str:
    name, args = event["name"], event.get("args", {})
    label = f"{name} {args['bucket']}" if "bucket" in args else name
    told = label + "".join(f", {key} {value}" for key, value in args.items() if key != "bucket")
    color = _COLORS.get(name, 5) if event["cat"] != "phase" else 0
    shape = f'<rect class="c{color}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_LINE - 1}">'
    bar = f"{shape}<title>{escape(told)}</title></rect>"
    for words in (label, str(args.get("bucket", ""))):
        if words and len(words) * _TEXT + 6 <= width:
            return f'{bar}<text x="{x + 4:.1f}" y="{y + 13}">{escape(words)}</text>'
    return bar


COMMAND = Command(
    name="picture",
    summary="draw a step of all ranks",
    details="An SVG with a row per rank and thread, readable on light and on dark pages.",
    example="shardopt trace picture traces -o step.svg --step 100",
    exit_codes=("drawn", "never"),
    add_arguments=add_arguments,
    run=run,
)
