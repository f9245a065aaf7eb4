"""The report of an examination as text, 100 columns wide."""

import textwrap
from collections.abc import Iterator, Sequence

from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Speeds
from shardopt.cli.doctor.finding import Finding, Level

_WIDTH = 100
_MAX_ROWS = 32  # of a table; the findings name the slowest of all
_NODE_HEADS = (
    *("node", "host", "ranks", ">cores", "binding", ">free memory"),
    *(">memory", ">barrier", ">network"),
)
_LINK_HEADS = ("link", ">latency", ">both ways at once, each")


def render(job: Job, speeds: Speeds | None, findings: Sequence[Finding]) -> str:
    """Return the whole report."""
    paragraphs = [text.fields(_overview(job))]
    if speeds:
        paragraphs.append(_shortened(_NODE_HEADS, _node_rows(job, speeds)))
        if speeds.links:
            paragraphs.append(_shortened(_LINK_HEADS, _link_rows(job, speeds)))
    paragraphs += ["\n".join(map(_paragraph, findings)), _conclusion(findings)]
    return "\n\n".join(paragraphs)


def _overview(job: Job) -> list[tuple[str, str]]:
    library, launcher = job.library, job.launcher
    name = f"{library.name} {library.version}".strip()
    level = f", threads: {library.thread_level}" if library.thread_level else ""
    pairs = [
        ("MPI library", f"{name}, MPI {library.standard}{level}"),
        ("mpi4py", library.mpi4py),
        ("launcher", f"{launcher.name}, -n {launcher.num_processes}" if launcher else "none"),
    ]
    if library.path:
        pairs.insert(1, ("", library.path))
    if job.nodes:
        pairs.append(("ranks", str(job.world_size)))
        pairs.append(("nodes", str(len(job.nodes))))
    return pairs


def _node_rows(job: Job, speeds: Speeds) -> Iterator[tuple[str, ...]]:
    for number, node in enumerate(job.nodes):
        barrier_s = speeds.barrier_s[number]
        yield (
            str(number),
            text.clip(node.host, 14),
            text.clip(text.ranges(node.ranks), 9),
            str(node.num_cores),
            _binding(job, number),
            text.nbytes(node.free_nbytes) if node.free_nbytes else "?",
            text.rate(speeds.memory[number]),
            text.seconds(barrier_s) if barrier_s else "-",
            text.rate(speeds.exchange[number]) if speeds.exchange else "-",
        )


def _binding(job: Job, node: int) -> str:
    bound = {len(rank.cores) for rank in job.ranks if rank.node == node}
    if min(bound) >= job.nodes[node].num_cores:
        return "none"
    return f"{text.ranges(sorted(bound))} a rank"


def _link_rows(job: Job, speeds: Speeds) -> Iterator[tuple[str, ...]]:
    for link in speeds.links:
        first, second = (text.clip(job.nodes[node].host, 18) for node in link.nodes)
        yield (
            f"{first} - {second}",
            text.seconds(link.latency_s),
            text.rate(link.nbytes_per_s),
        )


def _shortened(heads: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    kept = list(rows)
    more = f"\n... and {len(kept) - _MAX_ROWS} more" if len(kept) > _MAX_ROWS else ""
    return text.table(heads, kept[:_MAX_ROWS]) + more


def _paragraph(finding: Finding) -> str:
    start = f"{finding.level:<9}{finding.topic:<15}"
    return textwrap.fill(
        text.printable(finding.text),
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,  # of options that are copied from here
    )


def _conclusion(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    words = [
        f"{count} {level}{'' if count == 1 else 's'}"
        for level in (Level.PROBLEM, Level.NOTE)
        if (count := counts[level])
    ]
    return " and ".join(words) if words else "no problems"
