"""Every case once, made tiny: what it records has what its ratios read. Nothing is timed here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.cases import CASES
from benchmarks.cases.checkpoint import STEP, beside
from benchmarks.contenders.names import DCP, FOREACH, NEED_TORCH, SHARDOPT, STEP_PEERS, TORCH_SAVE
from tests.conftest import Mpirun

PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {"PYTHONPATH": PATHS}
HAS_TORCH = importlib.util.find_spec("torch") is not None
LIMIT_S = 200  # a machine may be busy
SETTINGS = {
    "checkpoint": {"nbytes_per_rank": 128 << 10},
    "training": {"context": 8, "batch": 1, "learning_rate": 5e-4, "steps": 2},
}
RARE = {beside(SHARDOPT, STEP)}  # a save that is tiny may be over before a step is


def needs_torch(key):
    """Whether a key is of a contender that needs torch."""
    return any(name in key for name in (*NEED_TORCH, FOREACH, DCP, TORCH_SAVE))


def require_recorded(folder: Path, name: str) -> dict:
    """Check the one line of a case's results, and return it."""
    (text,) = (folder / f"{name}.jsonl").read_text().splitlines()
    line = json.loads(text)
    found = {*line["samples_s"], *line["figures"]}
    for ratio in CASES[name].ratios:
        if ratio.target is not None:
            keys = {key for key in ratio.reads if HAS_TORCH or not needs_torch(key)}
            assert keys - RARE <= found
    assert line["benchmark"] == name
    assert line["ratios"]
    assert all(ratio["target"] is None for ratio in line["ratios"] if line["numel"] < 10_000)
    return line


# -- one job runs many commands, as it takes seconds to import what they need ----------------------

ONE_AFTER_THE_OTHER = """
import json
import runpy
import sys
from pathlib import Path

for module, words in json.loads(Path("commands.json").read_text()):
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")
"""
TINY = ("--numel", "4096", "--tensors", "3", "--rounds", "1")
GPU_CASES = ("gpu_kernel", "gpu_overhead", "gpu_memory", "gpu_offload")
SMALL_MODEL = ("--layers", "1", "--width", "32", "--context", "8")
LOSS = ("loss", "--steps", "2", "--seeds", "0", "1", "--width", "32", "--pieces", "pieces.jsonl")
ON_ONE_RANK = {  # by folder of the results: the words
    "kernel": ("kernel", "codes", "overhead", *TINY, "--threads", "1"),
    "gpu": (*GPU_CASES, *TINY, "--device", "stand-in"),
}
ON_TWO_RANKS = {
    "vectors": ("step", "faces", *["writes"] * HAS_TORCH, *TINY),
    "memory": ("memory", "--numel", "4096", "--tensors", "3", "--skip", *STEP_PEERS),
    "checkpoint": ("checkpoint", "--nbytes-per-rank", "128KiB", "--rounds", "1", "--folder", "."),
}
if HAS_TORCH:
    # It goes on where it stopped, or it would not come to its end.
    ON_ONE_RANK |= {f"loss, {most} pieces": (*LOSS, "--at-most", most) for most in ("3", "9")}
    ON_TWO_RANKS["training"] = ("training", *SMALL_MODEL, "--steps", "2", "--rounds", "1")
OF_SEVERAL_HOSTS = {  # jobs that the commands start on hosts
    "nodes": ("--numel", "4096", "--rounds", "1", "--bucket-mib", "1"),
    "predict": ("--numel", "512", "--rounds", "1", "--rate", "1gbit"),
}


def run_all(folder: Path, num_ranks: int, commands):
    """Run ``python -m`` with each of some words, in one job."""
    (folder / "commands.json").write_text(json.dumps(commands))
    mpirun = Mpirun(folder)
    job = mpirun(num_ranks, source=ONE_AFTER_THE_OTHER, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode == 0, job.output
    return folder, job


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    """The folder of a job, and what became of it."""
    commands = [("benchmarks", (*words, "--out", out)) for out, words in ON_ONE_RANK.items()]
    return run_all(tmp_path_factory.mktemp("one"), 1, commands)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    commands = [("benchmarks", (*words, "--out", out)) for out, words in ON_TWO_RANKS.items()]
    for name, words in OF_SEVERAL_HOSTS.items():
        commands.append((f"benchmarks.cases.{name}.job", (name, *words)))
    return run_all(tmp_path_factory.mktemp("two"), 2, commands)


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_cases_of_one_rank(on_one_rank):
    folder, job = on_one_rank
    kernel = require_recorded(folder / "kernel", "kernel")
    assert kernel["settings"] == {"sources": 1}
    assert len(kernel["samples_s"]["kernel"]) == 1
    require_recorded(folder / "kernel", "codes")
    require_recorded(folder / "kernel", "overhead")
    assert "kernel GB/s / triad GB/s" in job.stdout


@pytest.mark.mpirun
@pytest.mark.any_mpi
@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_the_loss_is_measured_piece_by_piece(on_one_rank):
    folder, _ = on_one_rank
    assert not (folder / "loss, 3 pieces").exists()
    assert len((folder / "pieces.jsonl").read_text().splitlines()) == 10
    line = json.loads((folder / "loss, 9 pieces" / "loss.jsonl").read_text())
    assert line["settings"] == {"steps": 2, "seeds": [0, 1]}
    assert 4 < line["figures"]["float32: mean"] < 7


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_cases_of_gpus_on_what_stands_in_for_one(on_one_rank):
    folder = on_one_rank[0] / "gpu"
    for name in ("gpu_overhead", "gpu_memory"):
        assert require_recorded(folder, name)["settings"] == {"device": "stand-in"}
    text = (folder / "gpu_kernel.jsonl").read_text()
    kernels = [json.loads(line) for line in text.splitlines()]
    assert [line["dtype"] for line in kernels] == ["float32", "bfloat16"]
    assert all(ratio["target"] is None for line in kernels for ratio in line["ratios"])
    if HAS_TORCH:
        assert len(kernels[0]["ratios"]) == 3
        assert len(json.loads((folder / "gpu_offload.jsonl").read_text())["ratios"]) == 2


@pytest.mark.any_mpi
def test_cases_of_one_rank_refuse_two(mpirun, tmp_path):
    job = mpirun(2, "-m", "benchmarks", "overhead", "--out", tmp_path / "none", env=ENVIRONMENT)
    assert job.returncode != 0
    assert "overhead must run on one rank; got 2. Start it without mpirun." in job.output
    assert not (tmp_path / "none").exists()


@pytest.mark.mpirun
@pytest.mark.any_mpi
@pytest.mark.parametrize("out", ON_TWO_RANKS)
def test_cases_of_two_ranks(on_two_ranks, out):
    folder = on_two_ranks[0] / out
    names = {name for name in ON_TWO_RANKS[out] if name in CASES}
    for name in names:
        line = require_recorded(folder, name)
        assert line["ranks"] == 2
        assert line["settings"] == SETTINGS.get(name, {})
    files = {path.name for path in folder.iterdir()}
    assert files == {f"{name}.jsonl" for name in names}


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_the_ranks_of_nodes(on_two_ranks):
    line = require_recorded(on_two_ranks[0] / "nodes", "nodes")
    assert line["settings"] == {"nodes": 1, "node_size": 2, "rate": "1gbit"}


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_the_ranks_of_predict(on_two_ranks):
    line = json.loads((on_two_ranks[0] / "predict" / "predict.jsonl").read_text())
    assert line["settings"] == {"nodes": 1, "node_size": 2, "rate": "1gbit"}
    assert line["numel"] == 4096
    assert line["figures"]["step: CPU seconds of all ranks"] > 0


@pytest.mark.mpirun
@pytest.mark.any_mpi
def test_nothing_else_is_left(on_two_ranks):
    left = {path.name for path in on_two_ranks[0].iterdir()}
    assert left == {*ON_TWO_RANKS, *OF_SEVERAL_HOSTS, "commands.json", "job.py"}


@pytest.mark.long
def test_nodes_on_hosts_of_their_own(can_have_clusters, tmp_path):
    words = ("nodes", "--numel", "65536", "--rounds", "1", "--layout", "2x2", "--out", tmp_path)
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    job = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=LIMIT_S)
    assert job.returncode == 0
    assert require_recorded(tmp_path, "nodes")["settings"]["nodes"] == 2
