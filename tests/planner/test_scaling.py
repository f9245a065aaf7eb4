"""A job on more and more nodes: where it stops, what is extrapolated, and pictures of it."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from shardopt.planner.chart import Chart, Series, draw
from shardopt.planner.estimate import Layout, estimate
from shardopt.planner.machine import make_machine
from shardopt.planner.model import evenly
from shardopt.planner.scaling import GOOD_SHARE, choose_bucket, scale
from shardopt.policy import ShardPolicy

MACHINE = make_machine({"memory_nbytes_per_s": 1e11, "link_nbytes_per_s": 5e9}, {}, None, 2)
MODEL = evenly(1 << 26, "bfloat16", 8)
LAYOUT = Layout(1, 4)


def test_points_are_the_estimates_of_their_jobs():
    found = scale(MODEL, LAYOUT, MACHINE, max_nodes=32)
    assert [point.num_nodes for point in found.points] == [1, 2, 4, 8, 16, 32]
    for point in found.points:
        planned = estimate(MODEL, replace(LAYOUT, num_nodes=point.num_nodes), MACHINE)
        assert point.step_s["lanes"] == pytest.approx(planned.simulated.step_s)
        assert point.node_nbytes == planned.memory.node_nbytes
        assert point.limit_s <= point.step_s["lanes"] <= point.step_s["ring"]
        assert point.is_extrapolated == (point.num_nodes > 8)
        for name, step_s in point.step_s.items():
            low, high = point.low_s[name], point.high_s[name]
            assert (low < step_s < high) if point.is_extrapolated else (low == step_s == high)


def test_each_exchange_stops_where_its_step_leaves_the_limit():
    costly = replace(MACHINE, latency_s=2e-4, message_s=5e-5)
    found = scale(MODEL, LAYOUT, costly, max_nodes=1024)
    for name, stop in found.stops_at.items():
        for point in found.points[1:]:
            if point.num_nodes <= stop:
                assert point.limit_s >= GOOD_SHARE * point.step_s[name]
    assert found.stops_at["direct"] == 0
    assert 0 < found.stops_at["ring"] < found.stops_at["lanes"] < 1024


def test_a_single_node_has_no_exchange():
    alone = make_machine({"memory_nbytes_per_s": 1e11}, {}, None, 1)
    found = scale(MODEL, LAYOUT, alone)
    assert [point.num_nodes for point in found.points] == [1]
    assert found.buckets == []


def test_the_best_bucket_is_as_good_as_the_default():
    for num_nodes in (2, 64):
        choice = choose_bucket(MODEL, replace(LAYOUT, num_nodes=num_nodes), MACHINE)
        assert choice.default_nbytes == max(4 << 20, num_nodes * 4 << 16)
        assert choice.best_s <= 1.02 * choice.default_s
    costly = replace(MACHINE, message_s=1e-3)
    dear = choose_bucket(MODEL, replace(LAYOUT, num_nodes=64), costly)
    assert dear.best_nbytes > choice.best_nbytes  # fewer messages


def test_a_chart_is_drawn_within_its_axes():
    series = [
        Series("a < b", [1, 2, 4], [1.0, 3.0, 2.0], low=[0.5, 1, 1], high=[2.0, 6, 4]),
        Series("c", [1, 2, 4], [2.0, 2.0, 2.0], color=1, is_thin=True),
    ]
    chart = Chart("title", "nodes", series, "{:g}".format, shaded_from=2, shaded_name="unknown")
    root = ET.fromstring(draw("heading & more", [chart, chart], ["note"]))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert {"heading & more", "note", "a < b", "unknown"} <= set(texts)
    width, height = (float(word) for word in root.get("viewBox").split()[2:])
    lines = [*root.iter(f"{name}polyline"), *root.iter(f"{name}polygon")]
    assert len(lines) == 2 * 3
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert all(0 < x < width and 0 < y < height for x, y in points)
    ends = [text for text in root.iter(f"{name}text") if text.text in ("a < b", "c")][:2]
    assert abs(float(ends[0].get("y")) - float(ends[1].get("y"))) >= 14  # none over the other
    assert "prefers-color-scheme: dark" in root.find(f"{name}style").text


def test_nodes_on_which_the_policy_cannot_be_had_are_left_out():
    policy = ShardPolicy(stage=2, accumulate="node")
    model = evenly(1 << 24, "float32", 8)
    found = scale(model, replace(LAYOUT, policy=policy), MACHINE, max_nodes=4)
    assert [point.num_nodes for point in found.points] == [2, 4]
    for point in found.points:
        layout = replace(LAYOUT, num_nodes=point.num_nodes, policy=policy)
        assert point.node_nbytes == estimate(model, layout, MACHINE).memory.node_nbytes
