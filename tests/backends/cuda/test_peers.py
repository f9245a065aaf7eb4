"""The cause that users are told of when ranks cannot reach each other's GPUs."""

from dataclasses import replace

import pytest

from shardopt.backends.cuda.peers import Peers, Problem, Trial, conclude, find_slurm_binding
from tests.support.arena_cupy import H200

REFUSED = Problem("open", 0, "CUDARuntimeError: cudaErrorInvalidValue: invalid argument")
SLICE = replace(H200, name="NVIDIA H200 MIG 1g.18gb")


def refused(problem=REFUSED, **changes):
    """Trials of three ranks, the second of which has a problem."""
    trials = [Trial(rank, H200, "pid:[1]", None) for rank in (4, 5, 6)]
    trials[1] = replace(trials[1], problems=(problem,), **changes)
    return trials


def test_without_a_problem_it_is_direct():
    assert conclude(refused()[::2]) == Peers(True)


@pytest.mark.parametrize(
    ("problem", "changes", "cause"),
    [
        (REFUSED, {"device": SLICE}, "Instances of MIG cannot open each other's memory"),
        (REFUSED, {"namespace": "pid:[2]"}, "(docker run --pid=host --ipc=host)"),
        (
            REFUSED,
            {"slurm_binding": "SLURM_GPUS_PER_TASK=1"},
            "(SLURM_GPUS_PER_TASK=1). Ask Slurm for --gpus-per-node=N --gpu-bind=none, without",
        ),
        (replace(REFUSED, is_reachable=False), {}, "The driver reports no peer access"),
        (replace(REFUSED, is_reachable=True), {}, "Start all ranks of a node in one container"),
        (REFUSED, {}, "compare nvidia-smi topo -p2p rw; an IOMMU"),
    ],
)
def test_causes(problem, changes, cause):
    told = conclude(refused(problem, **changes))
    name = changes.get("device", H200).name
    assert not told.is_direct
    assert told.reason.startswith(
        f"rank 5 ({name}) could not open memory of rank 4 (NVIDIA H200) (CUDARuntimeError: "
        "cudaErrorInvalidValue: invalid argument). "
    )
    assert cause in told.reason
    assert told.reason.endswith(".")


def test_a_rank_that_has_nothing_to_share():
    trials = refused(Problem("share", None, "ModuleNotFoundError: No module named 'cupy'"))
    trials[1] = replace(trials[1], device=None)
    told = "rank 5 could not share memory of its GPU (ModuleNotFoundError: No module named 'cupy')."
    assert conclude(trials) == Peers(False, told)


def test_the_lowest_rank_is_the_one_that_is_named():
    trials = refused()
    trials[2] = replace(trials[2], problems=(replace(REFUSED, peer=1),))
    assert conclude(trials).reason.startswith("rank 5 ")


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"SLURM_GPUS_PER_TASK": "1"}, "SLURM_GPUS_PER_TASK=1"),
        ({"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}, "SLURM_TRES_PER_TASK=cpu:4,gres/gpu:1"),
        ({"SLURM_TRES_PER_TASK": "cpu:4"}, None),
        ({"SLURM_GPU_BIND": "verbose,closest"}, "SLURM_GPU_BIND=verbose,closest"),
        ({"SLURM_GPU_BIND": "none"}, None),
        ({"SLURM_TRES_BIND": "gres/gpu:none"}, None),
        ({"SLURM_TRES_BIND": "gres/gpu:single:1"}, "SLURM_TRES_BIND=gres/gpu:single:1"),
        ({"SLURM_GPUS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, None),
    ],
)
def test_settings_of_slurm_that_part_tasks(environ, found):
    assert find_slurm_binding(environ) == found
