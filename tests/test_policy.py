"""A policy stays as it was made, apart from its deadline."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from shardopt.errors import HyperparamsError
from shardopt.policy import ShardPolicy


def test_the_deadline_can_be_set():
    policy = ShardPolicy(threads=2)
    policy.timeout_s = 5
    assert policy == ShardPolicy(threads=2, timeout_s=5)
    assert hash(policy) == hash(ShardPolicy(threads=2))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "5", None])
def test_a_wrong_deadline_is_refused(value):
    policy = ShardPolicy()
    with pytest.raises(HyperparamsError, match=r"policy.timeout_s must be a number > 0; got"):
        policy.timeout_s = value
    assert policy.timeout_s == 300.0


def test_everything_else_stays():
    policy = ShardPolicy()
    with pytest.raises(AttributeError, match=r"policy.threads must stay .*ShardPolicy\(threads="):
        policy.threads = 2
    with pytest.raises(AttributeError, match=r"policy.timeout must be a setting .* timeout_s\."):
        policy.timeout = 2
    assert policy == ShardPolicy()


def test_copies_are_equal():
    policy = ShardPolicy(overlap=False, timeout_s=7)
    for other in (copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other == policy
    assert replace(policy, timeout_s=8).timeout_s == 8


def test_ranks_need_not_have_the_same_deadline():
    assert ShardPolicy().describe() == ShardPolicy(timeout_s=7).describe()
    assert ShardPolicy().describe() != ShardPolicy(threads=7).describe()


def test_there_are_two_names_of_offloading_to_cpus():
    assert ShardPolicy(offload="host") == ShardPolicy(offload="cpu") != ShardPolicy()
    assert ShardPolicy(offload="host").describe() == ShardPolicy(offload="cpu").describe()


@pytest.mark.parametrize("value", ["/scratch/state", Path("state"), "gpu", True])
def test_there_is_no_offloading_to_disk_yet(value):
    with pytest.raises(HyperparamsError, match=r"policy.offload must be cpu or None .*not .* yet"):
        ShardPolicy(offload=value)


def test_stage_one_has_no_ring():
    assert ShardPolicy(stage=2, ring_nbytes=1 << 20).ring_nbytes == 1 << 20
    with pytest.raises(HyperparamsError, match=r"policy.ring_nbytes must be None with stage=1"):
        ShardPolicy(ring_nbytes=1 << 20)


@pytest.mark.parametrize("value", [0, 3, True, "2", None])
def test_there_are_two_stages(value):
    assert ShardPolicy(stage=2) != ShardPolicy() == ShardPolicy(stage=1)
    with pytest.raises(HyperparamsError, match=r"policy.stage must be 1 or 2 .*3 is not supported"):
        ShardPolicy(stage=value)
