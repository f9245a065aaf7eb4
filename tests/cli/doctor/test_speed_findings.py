"""Judgements about the speeds of a job's parts."""

from dataclasses import replace

import pytest

from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.speed_findings import judge_speeds, network_seconds, update_seconds
from tests.support.doctor import judge, make_job, make_speeds


@pytest.mark.parametrize(
    ("changes", "topic", "level", "told"),
    [
        (
            {"memory": (90e9, 30e9, 80e9)},
            "memory",
            Level.NOTE,
            "30.0 GB/s on h2 and 90.0 GB/s on h1",
        ),
        ({"barrier_s": (None, 4e-3, 1e-6)}, "barrier", Level.NOTE, "got 4.00 ms on h2"),
        (
            {"links": [1e9, 0.4e9, 1.1e9]},
            "links",
            Level.PROBLEM,
            "400 MB/s each way between h2 and h3",
        ),
        (
            {"links": [1e8, 1.2e8, 1.1e8]},
            "links",
            Level.NOTE,
            "faster than plain Ethernet; got 100 MB/s",
        ),
        ({"exchange": 0.5e9}, "all links", Level.NOTE, "got 500 MB/s from h1 while all"),
    ],
)
def test_what_is_slow(changes, topic, level, told):
    job = make_job((2, 2, 2))
    finding = judge(job, topic, make_speeds(job, **changes))
    assert finding.level is level
    assert told in finding.text


def test_a_long_latency():
    job = make_job()
    speeds = make_speeds(job)
    slow = replace(speeds, links=(replace(speeds.links[0], latency_s=3e-3),))
    finding = judge(job, "latency", slow)
    assert finding.level is Level.NOTE
    assert "got 3.00 ms between h1 and h2" in finding.text


def test_the_time_of_a_step():
    job = make_job((2, 2, 2, 2))
    speeds = make_speeds(job, exchange=0.1e9)
    # 400 MB of gradients to their owners and of parameters back, 3/4 of each over a node's link
    assert network_seconds(speeds, 100_000_000) == pytest.approx(2 * 0.3e9 / 0.1e9)
    # two float32 gradients, and a quarter of 3 arrays read and written
    assert update_seconds(job, speeds, 100_000_000) == pytest.approx((8 + 24 / 4) * 1e8 / 100e9)
    told = judge(job, "step", speeds).text
    assert "take at least 6.00 s between the nodes and 14.0 ms of memory traffic" in told
    assert "the network limits a step" in told
    one = make_job((2,))
    assert "there is one node" in judge(one, "network").text
    assert "takes at least 32.0 ms" in judge(one, "step").text


def test_messages_that_are_dear():
    job = make_job()
    assert judge(job, "messages").level is Level.OK
    dear = judge(job, "messages", make_speeds(job, message_s=(10e-6, 300e-6)))
    assert dear.level is Level.NOTE
    assert "300 us on h2" in dear.text


def test_the_disk_is_judged_if_it_was_measured():
    job = make_job()
    slow = judge(job, "disk", make_speeds(job, disk=(2e9, 1e9)))
    assert (slow.level, slow.text.split(",")[0]) == (Level.OK, "1.00 GB/s from h2")
    problem = "Read-only file system in /data"
    refused = judge(job, "disk", make_speeds(job, disk_problem=problem))
    assert refused.level is Level.NOTE
    assert problem in refused.text
    assert "disk" not in {finding.topic for finding in judge_speeds(job, make_speeds(job))}
