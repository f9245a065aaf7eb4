"""The speeds of a job as ``shardopt plan`` takes them."""

from datetime import UTC, datetime
from typing import Any

from shardopt.cli.doctor.facts import Job, Speeds


def calibrate(job: Job, speeds: Speeds) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the speeds of the slowest node and link, since every step waits for them.

    The cost per message and the disk are not measured, and links on several nodes only.

    Returns:
        Speeds by their name in ``planner.machine.Machine``; where they were measured.
    """
    found = {"memory_nbytes_per_s": min(speeds.memory)}
    if barriers := [barrier_s for barrier_s in speeds.barrier_s if barrier_s]:
        found["barrier_s"] = max(barriers)
    if speeds.links:
        found["latency_s"] = max(link.latency_s for link in speeds.links)
        found["link_nbytes_per_s"] = min(speeds.exchange)
    origin = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "library": f"{job.library.name} {job.library.version}",
        "hosts": [node.host for node in job.nodes],
        "ranks": [len(node.ranks) for node in job.nodes],
    }
    return found, origin
