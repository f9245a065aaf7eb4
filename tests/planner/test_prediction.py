"""Simulated steps beside the results of ``benchmarks predict``, and the fit of their speeds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from shardopt.errors import PlanError
from shardopt.planner.estimate import Layout, estimate
from shardopt.planner.machine import make_machine
from shardopt.planner.model import evenly
from shardopt.planner.prediction import (
    GOOD_ERROR,
    MeasuredStep,
    fit_machine,
    predict,
    read_steps,
)
from shardopt.policy import ShardPolicy

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SPEEDS = {"memory_nbytes_per_s": 20e9, "link_nbytes_per_s": 1e9}
SPEEDS |= {"latency_s": 20e-6, "message_s": 20e-6}
MACHINE = make_machine(SPEEDS, {}, None, 2)
BUCKETS = {"step": None, "step, buckets of 64 KiB": 64 << 10}


def lines(name="predict"):
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def measured_on(machine, *, numel=1 << 20, busy_share=0.1):
    """Steps that take what they take on a machine; they are given another one as calibrated."""
    for num_nodes in (2, 4):
        for key, nbytes in BUCKETS.items():
            step = MeasuredStep(
                key,
                Layout(num_nodes, 1, ShardPolicy(bucket_nbytes=nbytes)),
                numel,
                1.0,
                busy_share,
                MACHINE,
            )
            yield replace(step, measured_s=step.simulate(machine))


def test_what_was_not_fitted_is_predicted():
    """On 8 nodes, on nodes of 2 ranks, with other buckets, a slow link and a late rank."""
    machine, found = predict(read_steps(lines()))
    jobs = {(each.step.layout.num_nodes, each.step.layout.node_size) for each in found}
    assert jobs == {(1, 2), (2, 1), (4, 1), (8, 1), (2, 2)}
    checked = [each for each in found if not each.step.is_fitted]
    assert len(found) - len(checked) == 4
    eight = {each.step.key for each in checked if each.step.layout.num_nodes == 8}
    assert {"step", "step, a link at half rate", "step, a rank 50 ms late"} < eight
    for each in found:
        assert not each.step.is_cpu_bound
        assert abs(each.error(each.calibrated_s)) < GOOD_ERROR
        if each.step.layout.num_nodes > 1:
            assert abs(each.error(each.fitted_s)) < GOOD_ERROR
    assert machine.link_nbytes_per_s == pytest.approx(25e6, rel=0.1)  # 200 Mbit/s, with headers


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_speeds_that_times_tell_are_found(factor):
    """Where messages are dear and links fast, a fit finds what both cost."""
    truth = replace(MACHINE, message_s=200e-6 * factor, link_nbytes_per_s=0.3e9)
    found = fit_machine(list(measured_on(truth)))
    assert found.message_s == pytest.approx(truth.message_s, rel=0.1)
    slow = replace(MACHINE, link_nbytes_per_s=50e6 * factor)
    found = fit_machine(list(measured_on(slow)))
    assert found.link_nbytes_per_s == pytest.approx(slow.link_nbytes_per_s, rel=0.02)


def test_speeds_that_times_do_not_tell_stay_as_calibrated():
    slow = replace(MACHINE, link_nbytes_per_s=20e6, latency_s=1e-9, message_s=1e-9)
    found = fit_machine(list(measured_on(slow)))
    assert abs(math.log(found.message_s / MACHINE.message_s)) < 0.3


def test_steps_that_cores_hold_up_are_not_fitted():
    steps = list(measured_on(MACHINE, busy_share=0.6))
    assert all(step.is_cpu_bound and not step.is_fitted for step in steps)
    with pytest.raises(PlanError, match="steps must have some on 2 or 4 nodes .*; got none. Run: "):
        fit_machine(steps)
    alone = replace(steps[0], layout=Layout(1, 2))
    assert not alone.is_cpu_bound  # on one node it is what is measured


def test_results_of_another_benchmark():
    with pytest.raises(PlanError, match="results must be those of benchmarks predict; got nodes"):
        read_steps([{"benchmark": "nodes"}])


def test_of_a_layout_the_last_line_counts():
    line = next(line for line in lines() if line["settings"]["nodes"] == 2)
    later = {**line, "samples_s": {"step": [9.0, 3.0, 5.0]}}
    (step,) = read_steps([line, later])
    assert step.measured_s == 5.0
    assert step.machine.origins["message_s"] == "calibrated"


def test_overlap_hides_what_it_hid_in_measured_steps():
    """With link and memory as each run of ``benchmarks nodes`` itself measured them."""
    found = [line for line in lines("nodes") if "backward" in line["samples_s"]]
    jobs = {(line["settings"]["nodes"], line["settings"]["node_size"]) for line in found}
    assert jobs == {(4, 1), (2, 2)}
    for line in found:
        measured = {key: median(values) for key, values in line["samples_s"].items()}
        num_nodes, numel = line["settings"]["nodes"], line["numel"]
        sent_nbytes = 2 * 4 * numel * (num_nodes - 1) / num_nodes
        machine = replace(
            MACHINE,
            link_nbytes_per_s=sent_nbytes / measured["its bytes over bare TCP"],
            memory_nbytes_per_s=28 * numel / num_nodes / measured["update alone, nothing sent"],
        )
        backward_s = measured["backward"]
        layout = Layout(num_nodes, line["settings"]["node_size"], backward_s=backward_s)
        planned = estimate(evenly(numel, "float32", 32), layout, machine)
        ratio = planned.simulated.step_s / measured["shardopt"]
        assert (0.95 if "MPICH" in line["mpi"] else 0.8) < ratio < 1.05  # of bare TCP's rate
        in_turn_s = measured["backward, then step: overlap=False"]  # zeroes gradients, as the next
        hidden_s = in_turn_s - measured["backward and step: overlap=True"]
        assert planned.hidden_s == pytest.approx(hidden_s, rel=0.15)
