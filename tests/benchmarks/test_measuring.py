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

PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {"PYTHONPATH": PATHS}
HAS_TORCH = importlib.util.find_spec("torch") is not None
LIMIT_S = 100  # frameworks are slow to import on a busy machine
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


@pytest.mark.any_mpi
def test_cases_of_one_rank(mpirun, tmp_path):
    words = ("--numel", "4096", "--rounds", "1", "--tensors", "3", "--threads", "1")
    words += ("--out", tmp_path)
    job = mpirun(1, "-m", "benchmarks", "kernel", "codes", "overhead", *words, env=ENVIRONMENT,
                 timeout_s=LIMIT_S)  # fmt: skip
    assert job.returncode == 0, job.output
    kernel = require_recorded(tmp_path, "kernel")
    assert kernel["settings"] == {"sources": 1}
    assert len(kernel["samples_s"]["kernel"]) == 1
    require_recorded(tmp_path, "codes")
    require_recorded(tmp_path, "overhead")
    assert "kernel GB/s / triad GB/s" in job.stdout


@pytest.mark.any_mpi
@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_the_loss_is_measured_piece_by_piece(mpirun, tmp_path):
    pieces = tmp_path / "pieces.jsonl"
    words = ("--steps", "2", "--seeds", "0", "1", "--width", "32", "--pieces", pieces)
    for at_most, num_done in (3, 3), (9, 10):
        job = mpirun(1, "-m", "benchmarks", "loss", *words, "--at-most", str(at_most), "--out",
                     tmp_path, env=ENVIRONMENT, timeout_s=LIMIT_S)  # fmt: skip
        assert job.returncode == 0, job.output
        assert len(pieces.read_text().splitlines()) == num_done
    line = json.loads((tmp_path / "loss.jsonl").read_text())
    assert line["settings"] == {"steps": 2, "seeds": [0, 1]}
    assert 4 < line["figures"]["float32: mean"] < 7


@pytest.mark.any_mpi
def test_cases_of_gpus_on_what_stands_in_for_one(mpirun, tmp_path):
    names = ("gpu_kernel", "gpu_overhead", "gpu_memory", "gpu_offload")
    words = ("--numel", "4096", "--rounds", "1", "--tensors", "3", "--device", "stand-in")
    job = mpirun(1, "-m", "benchmarks", *names, *words, "--out", tmp_path, env=ENVIRONMENT,
                 timeout_s=LIMIT_S)  # fmt: skip
    assert job.returncode == 0, job.output
    for name in ("gpu_overhead", "gpu_memory"):
        assert require_recorded(tmp_path, name)["settings"] == {"device": "stand-in"}
    text = (tmp_path / "gpu_kernel.jsonl").read_text()
    kernels = [json.loads(line) for line in text.splitlines()]
    assert [line["dtype"] for line in kernels] == ["float32", "bfloat16"]
    assert all(ratio["target"] is None for line in kernels for ratio in line["ratios"])
    if HAS_TORCH:
        assert len(kernels[0]["ratios"]) == 3
        assert len(json.loads((tmp_path / "gpu_offload.jsonl").read_text())["ratios"]) == 2


@pytest.mark.any_mpi
def test_cases_of_one_rank_refuse_two(mpirun, tmp_path):
    job = mpirun(2, "-m", "benchmarks", "overhead", "--out", tmp_path / "none", env=ENVIRONMENT)
    assert job.returncode != 0
    assert "overhead must run on one rank; got 2. Start it without mpirun." in job.output
    assert not (tmp_path / "none").exists()


TINY = ("--numel", "4096", "--tensors", "3", "--rounds", "1")
TWO_RANKS = {  # names of cases, one after the other in one job, and the words for them
    "vectors": (("step", "faces", *["writes"] * HAS_TORCH), TINY),
    "training": (
        ("training",),
        ("--layers", "1", "--width", "32", "--context", "8", "--steps", "2", "--rounds", "1"),
    ),
    "memory": (("memory",), ("--numel", "4096", "--tensors", "3", "--skip", *STEP_PEERS)),
    "checkpoint": (
        ("checkpoint",),
        ("--nbytes-per-rank", "128KiB", "--rounds", "1", "--folder", "."),
    ),
}


@pytest.mark.any_mpi
@pytest.mark.parametrize("job", TWO_RANKS)
def test_cases_of_two_ranks(mpirun, tmp_path, job):
    names, words = TWO_RANKS[job]
    if job == "training" and not HAS_TORCH:
        pytest.skip("torch is missing")
    words = (*names, *words, "--out", tmp_path)
    job = mpirun(2, "-m", "benchmarks", *words, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode == 0, job.output
    for name in names:
        line = require_recorded(tmp_path, name)
        assert line["ranks"] == 2
        assert line["settings"] == SETTINGS.get(name, {})
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.jsonl" for name in names}  # nothing else is left


@pytest.mark.any_mpi
def test_the_ranks_of_nodes(mpirun, tmp_path):
    words = (tmp_path, "--numel", "4096", "--rounds", "1", "--bucket-mib", "1")
    job = mpirun(2, "-m", "benchmarks.cases.nodes.job", *words, env=ENVIRONMENT, timeout_s=LIMIT_S)
    assert job.returncode == 0, job.output
    line = require_recorded(tmp_path, "nodes")
    assert line["settings"] == {"nodes": 1, "node_size": 2, "rate": "1gbit"}


@pytest.mark.any_mpi
def test_the_ranks_of_predict(mpirun, tmp_path):
    words = (tmp_path, "--numel", "512", "--rounds", "1", "--rate", "1gbit")
    job = mpirun(2, "-m", "benchmarks.cases.predict.job", *words, env=ENVIRONMENT,
                 timeout_s=LIMIT_S)  # fmt: skip
    assert job.returncode == 0, job.output
    line = json.loads((tmp_path / "predict.jsonl").read_text())
    assert line["settings"] == {"nodes": 1, "node_size": 2, "rate": "1gbit"}
    assert line["numel"] == 4096
    assert line["figures"]["step: CPU seconds of all ranks"] > 0


@pytest.mark.long
def test_nodes_on_hosts_of_their_own(can_have_clusters, tmp_path):
    words = ("nodes", "--numel", "65536", "--rounds", "1", "--layout", "2x2", "--out", tmp_path)
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    job = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, timeout=LIMIT_S)
    assert job.returncode == 0
    assert require_recorded(tmp_path, "nodes")["settings"]["nodes"] == 2
