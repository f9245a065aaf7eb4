"""What importing the package loads."""

import subprocess
import sys

import pytest

HEAVY = ("cupy", "jax", "lucid", "matplotlib", "mpi4py", "numba", "torch")


def modules_loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_import_shardopt_is_light():
    loaded = modules_loaded_by("import shardopt")
    assert "shardopt" in loaded
    assert not loaded.intersection(HEAVY)


def test_the_command_line_needs_neither_mpi_nor_numba():
    loaded = modules_loaded_by("import shardopt.cli")
    assert "shardopt.cli.ckpt.prune" in loaded
    assert not loaded.intersection((*HEAVY, "rich"))


def test_the_optimizer_loads_what_it_needs_when_asked_for():
    loaded = modules_loaded_by("import shardopt; shardopt.NAdam")
    assert {"mpi4py", "numba", "shardopt.numpy"} <= loaded
    assert not loaded.intersection({"cupy", "jax", "lucid", "torch"})


def test_cupy_is_loaded_only_where_there_is_a_gpu_to_use():
    pytest.importorskip("torch")
    loaded = modules_loaded_by("import shardopt.torch, shardopt.numpy, shardopt.cli.doctor.examine")
    assert {"mpi4py", "numba", "torch"} <= loaded
    assert "cupy" not in loaded
