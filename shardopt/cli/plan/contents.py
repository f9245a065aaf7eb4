"""A plan as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shardopt.cli.plan.options import Request
from shardopt.planner.estimate import BAND, MEASURED_NODES, Estimate, estimate
from shardopt.planner.machine import Machine
from shardopt.planner.peers import Peer, plan_peers
from shardopt.planner.saving import SavePlan, plan_saves
from shardopt.planner.scaling import Scaling, scale

LABELS: Mapping[str, str] = {
    "memory": "exact",
    "traffic": "exact",
    "times": "simulated",
    "peers": "by formula",
}
"""How each part of a plan has been found; none of it is measured."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the command computes.

    Attributes:
        source: Where the model comes from.
        numel: Its parameters.
        coded_numel: Those with moments of 8 bits.
        machine: The speeds.
        estimate: The job.
        peers: Other ways to train the same.
        saves: Its checkpoints.
        scaling: The job on other numbers of nodes, or None.
    """

    source: str
    numel: int
    coded_numel: int
    machine: Machine
    estimate: Estimate
    peers: list[Peer]
    saves: SavePlan
    scaling: Scaling | None

    @property
    def fits(self) -> bool:
        """Whether the GPUs have enough memory for what is planned; true without GPUs."""
        gpu = self.machine.gpu
        return gpu is None or self.estimate.memory.device_rank_nbytes <= gpu.memory_nbytes

    @property
    def times_are(self) -> str:
        """The word for the times of the job."""
        return "extrapolated" if self.estimate.layout.is_extrapolated else LABELS["times"]

    def to_json(self) -> dict[str, Any]:
        """Return the plan for programs."""
        memory = self.estimate.memory
        sums = {"node_nbytes": memory.node_nbytes, "rank_nbytes": memory.rank_nbytes}
        found = asdict(self.estimate)
        found["memory"] |= sums
        for name in ("rank_traffic", "node_traffic", "phases"):
            found[name] = getattr(self.estimate, name)._asdict()
        found["layout"]["bucket_nbytes"] = self.estimate.layout.bucket
        return {
            "model": {
                "source": self.source,
                "numel": self.numel,
                "coded_numel": self.coded_numel,
            },
            "machine": asdict(self.machine),
            **found,
            "peers": [asdict(peer) for peer in self.peers],
            "saves": asdict(self.saves),
            "scaling": self.scaling and asdict(self.scaling),
            "fits": self.fits,
            "labels": {
                **LABELS,
                "times": self.times_are,
                "measured_up_to_nodes": MEASURED_NODES,
                "band_factors": BAND,
            },
        }


def make_plan(request: Request) -> Plan:
    """Compute a plan."""
    model, layout, machine = request.model, request.layout, request.machine
    return Plan(
        source=model.source,
        numel=model.numel,
        coded_numel=model.coded_numel,
        machine=machine,
        estimate=estimate(model, layout, machine),
        peers=plan_peers(model, layout, machine),
        saves=plan_saves(model, layout, machine, request.node_mtbf_s),
        scaling=scale(model, layout, machine) if request.with_scaling else None,
    )
