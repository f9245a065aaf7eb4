"""The speeds of a job as ``shardopt plan`` takes them."""

import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardopt.cli import text
from shardopt.cli.doctor.facts import Job, Speeds


def calibrate(job: Job, speeds: Speeds) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the speeds of the slowest node and link, since every step waits for them.

    Memory is taken at the rate of updates, which may be held up by the cores. Links, latency and
    the cost of a message are known on several nodes only.

    Returns:
        Speeds by their name in ``planner.machine.Machine``; where they were measured.
    """
    found = {"memory_nbytes_per_s": min(speeds.updates or speeds.memory)}
    if barriers := [barrier_s for barrier_s in speeds.barrier_s if barrier_s]:
        found["barrier_s"] = max(barriers)
    if speeds.links:
        found["latency_s"] = max(link.latency_s for link in speeds.links)
        found["link_nbytes_per_s"] = min(speeds.exchange)
        found["message_s"] = max(speeds.message_s)
    if speeds.disk:
        found["disk_nbytes_per_s"] = min(speeds.disk)
    origin = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "library": f"{job.library.name} {job.library.version}",
        "hosts": [node.host for node in job.nodes],
        "ranks": [len(node.ranks) for node in job.nodes],
    }
    return found, origin


def describe_calibration(path: Path, speeds: Speeds) -> str:
    """Return what has been written to a file, and what could not be measured."""
    found = ["memory", *(["barriers"] if any(speeds.barrier_s) else [])]
    missing: list[str] = []
    (found if speeds.links else missing).extend(["links", "latency", "cost per message"])
    (found if speeds.disk else missing).append("disk")
    told = f"{text.printable(str(path))} has the speeds of {', '.join(found)}."
    if missing:
        told += f" Not measured: {', '.join(missing)}."
    if not speeds.links:
        told += " There is one node: start it on two or more to measure what is between them."
    return textwrap.fill(told, 100, break_on_hyphens=False)
