"""The speeds of a machine: from options, from a calibration, or published for a GPU."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shardopt.errors import PlanError

FORMAT = "shardopt calibration 1"
"""The first field of a calibration file."""

ASSUMED = {
    "latency_s": 5e-6,
    "barrier_s": 10e-6,
    "disk_nbytes_per_s": 1e9,
}
"""Speeds that are assumed where nothing is known: typical of clusters and of local disks."""

FAST_LINK_NBYTES_PER_S = 25e9 / 8
"""Faster links are taken for ones that MPI drives without the kernel, such as InfiniBand."""

FAST_MESSAGE_S, TCP_MESSAGE_S = 5e-6, 20e-6
"""The assumed cost of a message on faster links, and on others, where MPI is taken to use TCP.

``measure.messages`` found 5 us between processes that share memory, where the kernel has no part
either, and 25 to 29 us over TCP, with MPICH and with Open MPI. Most of the 5 us is Python's.
"""

_SPEEDS = {*ASSUMED, "message_s", "memory_nbytes_per_s", "link_nbytes_per_s"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its published numbers, of which kernels and copies reach 0.8 to 0.95.

    Attributes:
        name: As users write it.
        memory_nbytes: Its memory.
        nbytes_per_s: Bandwidth of its memory.
        peer_nbytes_per_s: To the other GPUs of a node, each way.
        host_nbytes_per_s: To the memory of the node, each way.
    """

    name: str
    memory_nbytes: int
    nbytes_per_s: float
    peer_nbytes_per_s: float
    host_nbytes_per_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", int(80e9), 2.039e12, 300e9, 32e9),
        Gpu("h100", int(80e9), 3.35e12, 450e9, 64e9),
        Gpu("h200", int(141e9), 4.8e12, 450e9, 64e9),
        Gpu("b200", int(180e9), 8e12, 900e9, 64e9),
        Gpu("l40s", int(48e9), 0.864e12, 32e9, 32e9),
    )
}
"""Some GPUs by name.

Sources: NVIDIA's data sheets "A100 80GB SXM", "H100 SXM", "H200 SXM", "DGX B200" (an eighth of the
system) and "L40S". NVLink and PCIe are published for both directions together: the half of it is
each way. PCIe of generation 4 (A100, L40S) and 5 is taken for the way to the host, and for the way
to other L40S, which have no NVLink.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The speeds of a node and of the network between nodes.

    Attributes:
        memory_nbytes_per_s: Of a node, reads and writes together, with all ranks at work.
        link_nbytes_per_s: What a node sends while it receives as much; None for a single node.
        latency_s: Of a small message between nodes, one way.
        message_s: Time of a rank for each message that it sends, beside the time of its bytes.
        barrier_s: Of the ranks of a node.
        disk_nbytes_per_s: What a node writes to disk while all nodes write.
        gpu: The GPU of each rank, or None.
        origins: For each field ``given``, ``calibrated``, ``published`` or ``assumed``.
    """

    memory_nbytes_per_s: float
    link_nbytes_per_s: float | None
    latency_s: float
    message_s: float
    barrier_s: float
    disk_nbytes_per_s: float
    gpu: Gpu | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def scaled(self, factor: float) -> "Machine":
        """Return the machine with ``factor`` times the latency and the cost per message."""
        return replace(self, latency_s=self.latency_s * factor, message_s=self.message_s * factor)


def make_machine(
    given: Mapping[str, float], calibration: Mapping[str, float], gpu: Gpu | None, num_nodes: int
) -> Machine:
    """Take each speed from the options, else from a calibration, else as assumed.

    Args:
        given: Speeds by the name of their field in ``Machine``.
        calibration: Likewise.
        gpu: The GPU of each rank, or None.
        num_nodes: Nodes of the job: a single one needs no link.

    Raises:
        PlanError: A speed is missing that cannot be assumed.
    """
    values: dict[str, float] = dict(ASSUMED)
    origins = dict.fromkeys(ASSUMED, "assumed")
    if gpu is not None:  # what is sent and saved passes through the host, never the update
        values["memory_nbytes_per_s"] = 200e9
        origins |= {"memory_nbytes_per_s": "assumed", "gpu": "published"}
    for source, origin in ((calibration, "calibrated"), (given, "given")):
        values |= source
        origins |= dict.fromkeys(source, origin)
    if "memory_nbytes_per_s" not in values:
        raise _missing("--memory-bandwidth", "400GB/s")
    if num_nodes > 1 and "link_nbytes_per_s" not in values:
        raise _missing("--link", "200Gbit")
    link = values.pop("link_nbytes_per_s", None)
    if "message_s" not in values:
        values["message_s"] = assume_message_cost(link)
        origins["message_s"] = "assumed"
    return Machine(link_nbytes_per_s=link, gpu=gpu, origins=origins, **values)


def assume_message_cost(link_nbytes_per_s: float | None) -> float:
    """Return the seconds that a message is assumed to cost on a link of this bandwidth."""
    is_fast = (link_nbytes_per_s or 0.0) > FAST_LINK_NBYTES_PER_S
    return FAST_MESSAGE_S if is_fast else TCP_MESSAGE_S


def find_gpu(name: str) -> Gpu:
    """Return a GPU by name.

    Raises:
        PlanError: It is not known.
    """
    if name.lower() not in GPUS:
        raise PlanError(
            f"--gpu must be one of {', '.join(sorted(GPUS))}; got {name!r}. Leave it out for a "
            "plan for CPUs."
        )
    return GPUS[name.lower()]


def write_calibration(path: Path, speeds: Mapping[str, float], origin: Mapping[str, Any]) -> None:
    """Write measured speeds to a file, whole or not at all.

    Args:
        path: The file.
        speeds: By the name of their field in ``Machine``.
        origin: Where they were measured, for people.

    Raises:
        OSError: It cannot be written; what was there before is kept.
    """
    content = {"format": FORMAT, "speeds": dict(speeds), "measured": dict(origin)}
    text = json.dumps(content, indent=2) + "\n"
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def read_calibration(path: Path) -> dict[str, float]:
    """Read the speeds that ``write_calibration`` wrote.

    Raises:
        PlanError: The file is no calibration.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        speeds = content["speeds"] if content["format"] == FORMAT else {}
        found = {name: speeds[name] for name in _SPEEDS & set(speeds)}
    except (ValueError, KeyError, TypeError):
        found = {}
    if not found or not all(type(v) in (int, float) and 0 < v < 1e18 for v in found.values()):
        raise PlanError(
            "calibration must be a file that shardopt doctor --calibrate wrote; got "
            f"{str(path)!r}. Run: mpirun -n N shardopt doctor --calibrate FILE."
        )
    return {name: float(value) for name, value in found.items()}


def _missing(option: str, example: str) -> PlanError:
    return PlanError(
        f"{option} must be given for this job; got none. Pass {option} {example}, or --calibration "
        "with the file that shardopt doctor --calibrate wrote."
    )
