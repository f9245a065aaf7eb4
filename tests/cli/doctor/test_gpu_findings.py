"""Judgements about GPUs."""

from dataclasses import replace

import pytest

from shardopt.backends.cuda.peers import Peers
from shardopt.backends.cuda.software import Software
from shardopt.cli.doctor.facts import RankGpu
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.gpu_findings import judge_gpus
from shardopt.cli.doctor.gpus import take_device
from tests.support.arena_cupy import H200
from tests.support.doctor import judge, make_job, with_node

SOFTWARE = Software("580.65.06", "14.2.0", "13.0", 2, None)
DIRECT = Peers(True)


def device(number):
    return replace(H200, number=number, uuid=f"ab0{number}", bus_id=f"0000:{19 + number}:00.0")


def make_gpu_job(sizes=(2, 2), num_gpus=2, peers=DIRECT, **changes):
    """A job with GPUs that are all used: each rank sees all of its node and takes one."""
    job = make_job(sizes)
    ranks = []
    for rank in job.ranks:
        number = take_device(job.nodes[rank.node].ranks.index(rank.rank), num_gpus)
        gpu = RankGpu(replace(SOFTWARE, num_devices=num_gpus), device(number), None, None)
        ranks.append(replace(rank, gpu=replace(gpu, **changes)))
    for number in range(len(sizes)):
        job = with_node(job, number, num_gpus=num_gpus, peers=peers)
    return replace(job, ranks=tuple(ranks))


def with_rank(job, number, **changes):
    ranks = list(job.ranks)
    ranks[number] = replace(ranks[number], **changes)
    return replace(job, ranks=tuple(ranks))


def test_without_gpus_there_is_one_line():
    (finding,) = judge_gpus(make_job())
    assert (finding.level, finding.text) == (Level.OK, "none; shardopt needs none.")


@pytest.mark.parametrize("sizes", [(1,), (2,), (4, 4)])
def test_gpus_that_are_all_used(sizes):
    job = make_gpu_job(sizes, num_gpus=sizes[0])
    findings = {finding.topic: finding for finding in judge_gpus(job)}
    assert {finding.level for finding in findings.values()} == {Level.OK}
    total, nodes = sum(sizes), "1 node" if len(sizes) == 1 else "2 nodes"
    assert findings["GPUs"].text == (
        f"{total} on {nodes}, NVIDIA H200 of 161 GB; driver 580.65.06 for CUDA up to 13.0, CuPy "
        "14.2.0."
    )
    shown = findings["GPU of a rank"].text
    assert "rank 0: GPU 0 (0000:19:00.0)" in shown
    assert shown.endswith("CUDA_VISIBLE_DEVICES of rank 0 is not set.")
    told = "a single rank" if sizes == (1,) else "direct: each rank reads and writes"
    assert findings["peer access"].text.startswith(told)
    assert "shardopt passes to no MPI" in findings["GPU messages"].text
    assert "Slurm and GPUs" not in findings


def test_what_is_visible_is_told():
    job = with_rank(make_gpu_job(), 0, cuda_visible_devices="4,6")
    assert judge(job, "GPU of a rank").text.endswith("of rank 0 is '4,6'.")


def test_software_that_is_missing_on_one_rank():
    job = make_gpu_job()
    problem = "CuPy is not installed. Install it: pip install 'shardopt[cuda13]'."
    missing = RankGpu(Software("580.65.06", None, None, 0, problem), None, None, None)
    job = with_rank(with_node(job, 1, peers=None), 3, gpu=missing)
    finding = judge(job, "GPUs")
    assert finding.level is Level.NOTE
    assert "got 2 on h2, but not for rank 3. CuPy is not installed. Install it: pip" in finding.text
    assert {f.topic for f in judge_gpus(job)} == {"GPUs"}


def test_gpus_on_some_nodes_only():
    finding = judge(with_node(make_gpu_job(), 1, num_gpus=0), "GPUs")
    assert finding.level is Level.NOTE
    assert "got 2 on h1 and none on h2" in finding.text


def test_ranks_that_share_a_gpu():
    job = with_rank(make_gpu_job((4, 4), num_gpus=2), 0, cuda_visible_devices="0,1")
    finding = judge(job, "GPU of a rank")
    assert finding.level is Level.NOTE
    assert "got ranks 0,2 on GPU 0 (0000:19:00.0) of h1, where they take turns" in finding.text
    assert finding.text.endswith("CUDA_VISIBLE_DEVICES, which is '0,1'.")


def test_gpus_without_a_rank():
    job = with_node(with_node(make_gpu_job(), 0, num_gpus=4), 1, num_gpus=4)
    finding = judge(job, "GPU of a rank")
    assert finding.level is Level.NOTE
    assert "got ranks on 2 of 4 GPUs of h1" in finding.text


def test_staged_with_the_reason():
    reason = "rank 3 could not open memory of rank 2 (x). The driver reports no peer access."
    job = with_node(make_gpu_job(), 1, peers=Peers(False, reason))
    finding = judge(job, "peer access")
    assert finding.level is Level.NOTE
    assert finding.text.startswith("ranks of h2 should reach each other's GPUs; got a failed test")
    assert finding.text.endswith(reason)


@pytest.mark.parametrize(
    ("nbytes", "level", "told"),
    [
        (None, Level.OK, "no limit"),
        (8 << 20, Level.NOTE, "got 8.39 MB on h1 (ulimit -l)"),
        (64 << 30, Level.OK, "up to 68.7 GB on h1"),
    ],
)
def test_pinned_memory(nbytes, level, told):
    finding = judge(make_gpu_job(pinned_nbytes=nbytes), "pinned memory")
    assert finding.level is level
    assert told in finding.text


@pytest.mark.parametrize("peers", [Peers(False, "because. So."), None, DIRECT])
def test_slurm_that_parts_tasks(peers):
    job = make_gpu_job(peers=peers, slurm_binding="SLURM_GPUS_PER_TASK=1")
    if peers == DIRECT:
        assert "Slurm and GPUs" not in {finding.topic for finding in judge_gpus(job)}
        return
    finding = judge(job, "Slurm and GPUs")
    assert finding.level is Level.NOTE
    assert "got SLURM_GPUS_PER_TASK=1, which hides those of other tasks" in finding.text
    assert "--gpus-per-node=N --gpu-bind=none" in finding.text


@pytest.mark.parametrize(
    ("node_rank", "num_devices", "number"), [(0, 0, None), (3, 4, 3), (3, 2, 1), (3, 1, 0)]
)
def test_the_gpu_that_a_rank_takes(node_rank, num_devices, number):
    assert take_device(node_rank, num_devices) == number
