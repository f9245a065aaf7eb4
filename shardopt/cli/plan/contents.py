"""A plan as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shardopt.cli.plan.options import Request
from shardopt.cli.plan.settings import Limits, Setting, plan_settings
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
        limits: The memory that there is.
        settings: The memory of a node with other settings, if a limit of it is given or GPUs are
            too small; else empty.
    """

    source: str
    numel: int
    coded_numel: int
    machine: Machine
    estimate: Estimate
    peers: list[Peer]
    saves: SavePlan
    scaling: Scaling | None
    limits: Limits
    settings: Sequence[Setting]

    @property
    def fits(self) -> bool:
        """Whether nodes and GPUs have enough memory for what is planned, as far as it is known."""
        return self.limits.fit(self.estimate.memory)

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
        policy = found["layout"].pop("policy")
        del policy["trace"], policy["timeout_s"]
        found["layout"] |= policy | {"bucket_nbytes": self.estimate.layout.bucket}
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
            "node_memory_nbytes": self.limits.node_nbytes,
            "settings": [asdict(each) for each in self.settings],
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
    limits, estimated = Limits(request.memory_nbytes, machine.gpu), estimate(model, layout, machine)
    needs_less = limits.node_nbytes is not None or not limits.fit(estimated.memory)
    return Plan(
        source=model.source,
        numel=model.numel,
        coded_numel=model.coded_numel,
        machine=machine,
        estimate=estimated,
        peers=plan_peers(model, layout, machine),
        saves=plan_saves(model, layout, machine, request.node_mtbf_s),
        scaling=scale(model, layout, machine) if request.with_scaling else None,
        limits=limits,
        settings=plan_settings(model, layout, limits) if needs_less else (),
    )
