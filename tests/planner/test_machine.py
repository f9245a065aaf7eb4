"""Speeds by their origin, and files of calibration."""

import json
from pathlib import Path

import pytest

from shardopt.errors import PlanError
from shardopt.planner.machine import (
    ASSUMED,
    FAST_MESSAGE_S,
    GPUS,
    TCP_MESSAGE_S,
    find_gpu,
    make_machine,
    read_calibration,
    write_calibration,
)

SPEEDS = {"memory_nbytes_per_s": 100e9, "link_nbytes_per_s": 1e9, "latency_s": 3e-6}


def test_options_come_before_a_calibration_and_that_before_what_is_assumed(tmp_path):
    path = tmp_path / "speeds.json"
    write_calibration(path, SPEEDS, {"hosts": ["a"]})
    machine = make_machine({"link_nbytes_per_s": 2e9}, read_calibration(path), None, 2)
    assert (machine.link_nbytes_per_s, machine.origins["link_nbytes_per_s"]) == (2e9, "given")
    assert (machine.latency_s, machine.origins["latency_s"]) == (3e-6, "calibrated")
    assert machine.disk_nbytes_per_s == ASSUMED["disk_nbytes_per_s"]
    assert machine.origins["disk_nbytes_per_s"] == "assumed"
    assert machine.scaled(2).latency_s == 6e-6


@pytest.mark.parametrize(
    ("link_gbit", "message_s"), [(1, TCP_MESSAGE_S), (25, TCP_MESSAGE_S), (100, FAST_MESSAGE_S)]
)
def test_a_message_is_cheaper_on_a_link_that_needs_no_kernel(link_gbit, message_s):
    given = {"memory_nbytes_per_s": 1e11, "link_nbytes_per_s": link_gbit * 1e9 / 8}
    machine = make_machine(given, {}, None, 2)
    assert (machine.message_s, machine.origins["message_s"]) == (message_s, "assumed")
    for given_too, calibration, origin in (
        ({"message_s": 1e-6}, {"message_s": 9e-6}, "given"),
        ({}, {"message_s": 1e-6}, "calibrated"),
    ):
        machine = make_machine(given | given_too, calibration, None, 2)
        assert (machine.message_s, machine.origins["message_s"]) == (1e-6, origin)


def test_what_cannot_be_assumed():
    with pytest.raises(PlanError, match=r"--memory-bandwidth must be given.+; got none\."):
        make_machine({}, {}, None, 1)
    with pytest.raises(PlanError, match=r"--link must be given.+; got none\."):
        make_machine({"memory_nbytes_per_s": 1e9}, {}, GPUS["h100"], 2)
    assert make_machine({"memory_nbytes_per_s": 1e9}, {}, None, 1).link_nbytes_per_s is None


def test_gpus_by_name():
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(PlanError, match="--gpu must be one of a100, .*; got 'k80'"):
        find_gpu("k80")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\x00",
        json.dumps({"format": "other", "speeds": SPEEDS}),
        json.dumps({"format": "shardopt calibration 1", "speeds": {"latency_s": -1}}),
        json.dumps({"format": "shardopt calibration 1", "speeds": {"latency_s": "fast"}}),
        json.dumps({"format": "shardopt calibration 1", "speeds": 3}),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlanError, match="calibration must be a file that shardopt doctor"):
        read_calibration(path)


def test_a_calibration_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "speeds.json"
    write_calibration(path, SPEEDS, {"hosts": ["a"]})
    (tmp_path / "speeds.json.part").mkdir()  # in the way: nothing can be written
    with pytest.raises(OSError, match="speeds.json.part"):
        write_calibration(path, {"latency_s": 1.0}, {})
    assert read_calibration(path) == SPEEDS
    (tmp_path / "speeds.json.part").rmdir()
    write_calibration(path, {"latency_s": 1.0}, {})
    assert read_calibration(path) == {"latency_s": 1.0}
    assert list(tmp_path.iterdir()) == [path]
    write_calibration(Path("/dev/null"), SPEEDS, {})
    assert not Path("/dev/null").is_file()
