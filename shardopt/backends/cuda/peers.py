"""The findings of a node's ranks about each other's GPUs, and one conclusion for all of them.

Plain values and pure functions; ``probing`` does the trying.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SLURM_BINDING = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_BIND")
_SLURM_REMEDY = "Ask Slurm for --gpus-per-node=N --gpu-bind=none, without --gpus-per-task"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as the CUDA runtime describes it.

    Attributes:
        number: Its number among those that this process sees.
        name: For example ``NVIDIA H200``.
        uuid: The same for this GPU, or instance of MIG, in every process; hexadecimal.
        bus_id: Its PCI address.
        nbytes: Its memory in bytes.
        capability: For example ``9.0``.
    """

    number: int
    name: str
    uuid: str
    bus_id: str
    nbytes: int
    capability: str

    @property
    def is_mig(self) -> bool:
        """Whether this is an instance of MIG, a part of a GPU."""
        return "MIG" in self.name.split()


@dataclass(frozen=True, slots=True)
class Peers:
    """The way in which the ranks of a node exchange what is on their GPUs; equal on all of them.

    Attributes:
        is_direct: Each rank reads and writes the memory of the others' GPUs. Otherwise all passes
            through pinned memory of the node; see [Note: direct or staged].
        reason: Why it is not direct, in sentences for the user; empty if it is.
    """

    is_direct: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that one rank could not do.

    Attributes:
        action: What it tried, to follow "could not" and to precede the name of the peer.
        peer: The rank on its node whose memory that was, or None for its own.
        error: What came of it.
        is_reachable: Whether the driver reports peer access to the other GPU; None if that does
            not matter, or cannot be asked because this process does not see it.
    """

    action: str
    peer: int | None
    error: str
    is_reachable: bool | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The findings of one rank.

    Attributes:
        rank: Its number in the job, for messages.
        device: Its GPU, or None if it could not be described.
        namespace: The PID namespace of its process; empty if that is not known.
        slurm_binding: A setting by which Slurm gives each task a GPU of its own, or None.
        problems: All that it could not do.
    """

    rank: int
    device: Device | None
    namespace: str
    slurm_binding: str | None
    problems: tuple[Problem, ...] = ()


def conclude(trials: Sequence[Trial]) -> Peers:
    """Return what all ranks of a node do, from what each of them found.

    Args:
        trials: By rank on the node.
    """
    for trial in trials:
        for problem in trial.problems:
            return Peers(False, _explain(trial, problem, trials))
    return Peers(True)


def find_slurm_binding(environ: Mapping[str, str]) -> str | None:
    """Return the setting by which Slurm gives each task a GPU of its own, or None.

    Such a GPU is in a control group of its own, and its memory cannot be opened by other tasks.
    """
    for name in _SLURM_BINDING:
        value = environ.get(name, "")
        if name.startswith("SLURM_TRES") and "gres/gpu" not in value:
            continue
        if value and not value.endswith("none"):
            return f"{name}={value}"
    return None


def _explain(trial: Trial, problem: Problem, trials: Sequence[Trial]) -> str:
    here = _name(trial)
    if problem.peer is None:
        return f"{here} could not {problem.action} memory of its GPU ({problem.error})."
    peer = trials[problem.peer]
    return (
        f"{here} could not {problem.action} memory of {_name(peer)} ({problem.error}). "
        f"{_find_cause(trial, problem, peer)}"
    )


def _find_cause(trial: Trial, problem: Problem, peer: Trial) -> str:
    if any(each.device and each.device.is_mig for each in (trial, peer)):
        return "Instances of MIG cannot open each other's memory; use whole GPUs to avoid that."
    if trial.namespace != peer.namespace:
        return (
            "Their processes have PID namespaces of their own: start all ranks of a node in one "
            "container, or let containers share them (docker run --pid=host --ipc=host)."
        )
    binding = trial.slurm_binding or peer.slurm_binding
    if binding:
        return f"Slurm gives each task a GPU of its own ({binding}). {_SLURM_REMEDY}."
    if problem.is_reachable is False:
        return "The driver reports no peer access between these GPUs."
    return (
        "Start all ranks of a node in one container, and compare nvidia-smi topo -p2p rw; an IOMMU "
        "that is on without a virtual machine must be turned off."
    )


def _name(trial: Trial) -> str:
    device = f" ({trial.device.name})" if trial.device else ""
    return f"rank {trial.rank}{device}"
