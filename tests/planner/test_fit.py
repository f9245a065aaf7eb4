"""Simulated steps beside the results of ``benchmarks nodes``."""

import json
from pathlib import Path

import pytest

from shardopt.errors import PlanError
from shardopt.planner.fit import compare, machine_of
from shardopt.planner.machine import make_machine

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nodes.jsonl"
MACHINE = make_machine(
    {"memory_nbytes_per_s": 10e9, "link_nbytes_per_s": 125e6, "latency_s": 50e-6}, {}, None, 2
)


def lines():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def test_simulated_steps_are_like_measured_ones():
    """The link is that of bare TCP, which MPICH reaches and Open MPI does not quite."""
    found = compare(lines(), MACHINE)
    assert {(each.layout.num_nodes, each.layout.node_size) for each in found} == {(4, 1), (2, 2)}
    for each in found:
        assert (0.95 if "MPICH" in each.mpi else 0.8) < each.ratio < 1.05
        measured, simulated = each.hidden_s
        assert simulated == pytest.approx(measured, rel=0.2)


def test_a_machine_of_its_own():
    line = lines()[0]
    assert machine_of(line, MACHINE).link_nbytes_per_s == pytest.approx(119e6, rel=0.02)
    fast = compare([line], MACHINE, own_speeds=False)[0]
    assert fast.ratio < 1
    del line["samples_s"]["update alone, nothing sent"]
    with pytest.raises(PlanError, match="a line of results must have samples of .*; got "):
        machine_of(line, MACHINE)
