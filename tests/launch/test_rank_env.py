"""Cores, threads and GPUs that ``rank_env.sh`` assigns to a rank, under every launcher."""

import json
import os
import sys

import pytest

from tests.support.launchers import LAUNCH, plain, run
from tests.support.shm import with_shm

SHOW = """
import json, os
print(json.dumps({"cores": sorted(os.sched_getaffinity(0)), **os.environ}))
"""
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture
def place(tmp_path):
    """Start a rank with these variables; returns its environment and its cores."""

    def place(*before, **variables):
        settings = (f"{name}={value}" for name, value in variables.items())
        script = ("bash", LAUNCH / "rank_env.sh", sys.executable, "-c", SHOW)
        job = run(plain(*settings, *before, *script), tmp_path)
        assert job.returncode == 0, job.stderr
        return json.loads(job.stdout)

    return place


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    ],
)
def test_ranks_of_a_node_share_its_cores(place, rank, size):
    parts = [place(**{rank: str(i), size: "2"}) for i in range(2)]
    assert sorted(parts[0]["cores"] + parts[1]["cores"]) == CORES
    for part in parts:
        assert 1 <= int(part["OMP_NUM_THREADS"]) <= len(part["cores"])
        assert part["OPENBLAS_NUM_THREADS"] == part["MKL_NUM_THREADS"] == part["OMP_NUM_THREADS"]


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_rank_that_is_bound_stays_so(place):
    found = place("taskset", "-c", str(CORES[-1]), MPI_LOCALRANKID="0", MPI_LOCALNRANKS="2")
    assert found["cores"] == [CORES[-1]]
    assert found["OMP_NUM_THREADS"] == "1"


def test_more_ranks_than_cores_are_not_bound(place):
    found = place(MPI_LOCALRANKID="0", MPI_LOCALNRANKS=str(len(CORES) + 1))
    assert found["cores"] == CORES
    assert found["OMP_NUM_THREADS"] == "1"


def test_the_user_has_the_last_word(place):
    mine = {"OMP_NUM_THREADS": "7", "OMPI_MCA_btl": "tcp,self", "RANK_CORES": "all"}
    found = place(MPI_LOCALRANKID="0", MPI_LOCALNRANKS="2", **mine)
    assert found["cores"] == CORES
    assert {name: found[name] for name in mine} == mine


@pytest.mark.parametrize(
    ("size", "ranks", "variables", "found"),
    [
        ("64m", 12, {}, None),
        ("64m", 13, {}, "^posix"),
        ("64m", 13, {"UCX_TLS": "tcp,self"}, "tcp,self"),
    ],
)
def test_a_dev_shm_too_small_for_mpich(place, size, ranks, variables, found):
    rank = place(*with_shm(size), MPI_LOCALRANKID="0", MPI_LOCALNRANKS=str(ranks), **variables)
    assert rank.get("UCX_TLS") == found


@pytest.mark.parametrize(("node", "size"), [(0, 1), (1, 3), (2, 3), (3, 9999)])
def test_slurm_says_how_many_tasks_a_node_has(place, node, size):
    found = place(
        SLURM_LOCALID="0", SLURM_NODEID=str(node), SLURM_STEP_TASKS_PER_NODE="1,3(x2),9999"
    )
    own = len(CORES) // size if size <= len(CORES) else len(CORES)
    assert len(found["cores"]) == own


def test_mpirun_within_slurm_knows_better(place):
    found = place(
        OMPI_COMM_WORLD_LOCAL_RANK="2", SLURM_LOCALID="0", CUDA_VISIBLE_DEVICES="GPU-a,GPU-b,GPU-c"
    )
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-c"


def test_gpus_are_dealt_out_in_turn(place):
    dealt = [
        place(MPI_LOCALRANKID=str(rank), CUDA_VISIBLE_DEVICES="4,6")["CUDA_VISIBLE_DEVICES"]
        for rank in range(3)
    ]
    assert dealt == ["4", "6", "4"]


def test_a_rank_knows_its_number_on_the_node_under_every_launcher(place):
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID"):
        assert place(**{name: "3", "SLURM_LOCALID": "1"})["SHARDOPT_LOCAL_RANK"] == "3"
    assert place(SLURM_LOCALID="1")["SHARDOPT_LOCAL_RANK"] == "1"


@pytest.mark.parametrize(("limit", "dealt"), [("1", "444"), ("2", "464"), ("all", ["4,6,7"] * 3)])
def test_some_gpus_or_all_of_them(place, limit, dealt):
    settings = {"CUDA_VISIBLE_DEVICES": "4,6,7", "RANK_GPUS": limit}
    for rank, expected in enumerate(dealt):
        assert place(MPI_LOCALRANKID=str(rank), **settings)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_fewer_gpus_than_asked_for_end_the_rank(tmp_path, rank, told):
    settings = (f"MPI_LOCALRANKID={rank}", "CUDA_VISIBLE_DEVICES=0,1", "RANK_GPUS=4")
    job = run(plain(*settings, "bash", LAUNCH / "rank_env.sh", "true"), tmp_path)
    sentence = (
        f"rank_env.sh: --gpus-per-node must be at most the GPUs of a node; got 4, while "
        f"{os.uname().nodename} shows 2. Ask for fewer, or check CUDA_VISIBLE_DEVICES.\n"
    )
    assert (job.returncode, job.stderr) == (2, sentence if told else "")
