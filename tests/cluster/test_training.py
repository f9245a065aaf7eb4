"""Training on several hosts: the bits of one machine, and no more bytes than lanes need."""

import json

import pytest

TRAIN = r"""
import hashlib
import json
import sys

import numpy as np
from mpi4py import MPI

from shardopt import ShardPolicy
from shardopt.numpy import NAdam, Parameter

comm, num_steps, numel = MPI.COMM_WORLD, int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
params = [Parameter(rng.standard_normal(n).astype(np.float32)) for n in (numel, 70, numel // 2)]
with NAdam(params, lr=0.01, policy=ShardPolicy(bucket_nbytes=1 << 18, timeout_s=30)) as opt:
    for step in range(num_steps):
        opt.zero_grad()
        rng = np.random.default_rng([step, comm.rank])
        for param in params:
            param.grad = rng.standard_normal(param.data.size).astype(np.float32)
        opt.step()
    sent = comm.allreduce(opt.last_step.sent_nbytes)
    topology = opt.core.topology
    shape = topology.num_nodes, topology.node_size
digests = comm.gather(hashlib.sha256(b"".join(p.data.tobytes() for p in params)).hexdigest())
if comm.rank == 0:
    assert len(set(digests)) == 1
    print(json.dumps({"shape": shape, "digest": digests[0], "sent_nbytes": sent}))
"""


def trained(mpirun, num_ranks, num_steps, numel):
    job = mpirun(num_ranks, str(num_steps), str(numel), source=TRAIN, timeout_s=120)
    assert job.returncode == 0, job.output
    return json.loads(job.stdout)


def test_one_two_and_four_hosts_give_the_same_bits(cluster, mpirun):
    found = [trained(mpirun, 4, 50, 100_003)]
    for slots in (2, 1):
        hosts = cluster(4 // slots, slots=slots)
        found.append(trained(hosts.mpirun, 4, 50, 100_003))
        hosts.close()
    assert [each["shape"] for each in found] == [[1, 4], [2, 2], [4, 1]]
    assert len({each["digest"] for each in found}) == 1
    assert next(each["sent_nbytes"] for each in found) == 0


@pytest.mark.any_mpi  # as the others show which hosts every MPI sees
def test_ranks_of_hosts_with_unequal_numbers_count_as_nodes(cluster, mpirun):
    expected = trained(mpirun, 3, 10, 50_001)
    hosts = cluster(2, slots=2)
    found = trained(hosts.mpirun, 3, 10, 50_001)
    assert (expected["shape"], found["shape"]) == ([1, 3], [3, 1])
    assert found["digest"] == expected["digest"]


@pytest.mark.any_mpi  # what is sent is shardopt's choice
def test_more_ranks_on_a_host_send_no_more(cluster):
    """Counted by the network interfaces, over as many steps as tell them from the start."""
    sent = {}
    for slots in (1, 2):
        hosts = cluster(2, slots=slots)
        counts = []
        for num_steps in (1, 6):
            before = hosts.bytes()
            report = trained(hosts.mpirun, 2 * slots, num_steps, 1_000_003)
            counts.append([after.sent - before[i].sent for i, after in hosts.bytes().items()])
        sent[slots] = [(long - short) / 5 for short, long in zip(*counts, strict=True)]
        each_way = report["sent_nbytes"] / 2  # of two hosts
        assert sent[slots] == [pytest.approx(each_way, rel=0.05)] * 2
        hosts.close()
    assert sum(sent[2]) == pytest.approx(sum(sent[1]), rel=0.03)
