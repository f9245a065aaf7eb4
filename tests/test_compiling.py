"""Compiled functions work whether or not their code can be kept on disk."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardopt.compiling import warn_of_cache_problems
from shardopt.errors import CompileCacheWarning

ROOT = Path(__file__).parents[1]

SOURCE = """
from shardopt.compiling import compiled

@compiled()
def double(x):
    return 2 * x
"""


def make_function(folder):
    """A compiled function of a module of its own."""
    path = folder / "doubling.py"
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("doubling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


@pytest.fixture(autouse=True)
def only_beside_the_source(monkeypatch):
    """Leave Numba no other place for its files."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")


def test_code_is_kept_beside_the_source(tmp_path):
    assert make_function(tmp_path)(3) == 6
    assert list((tmp_path / "__pycache__").glob("*.nbc"))
    warn_of_cache_problems(aloud=True)  # there is none


def test_without_a_place_it_compiles_and_warns_once(tmp_path):
    (tmp_path / "__pycache__").touch()
    assert make_function(tmp_path)(3) == 6
    with pytest.warns(CompileCacheWarning, match=r"could not keep .* Set NUMBA_CACHE_DIR"):
        warn_of_cache_problems(aloud=True)
    warn_of_cache_problems(aloud=True)


def test_a_place_that_goes_away_meanwhile(tmp_path):
    double = make_function(tmp_path)
    shutil.rmtree(tmp_path / "__pycache__")
    (tmp_path / "__pycache__").touch()
    assert double(3) == 6
    with pytest.warns(CompileCacheWarning, match="Error"):
        warn_of_cache_problems(aloud=True)


@pytest.mark.parametrize("content", [b"", b"no pickle"])
def test_damaged_files_are_compiled_anew(tmp_path, content):
    assert make_function(tmp_path)(3) == 6
    for path in (tmp_path / "__pycache__").glob("*.nb?"):
        path.write_bytes(content)
    assert make_function(tmp_path)(4) == 8
    with pytest.warns(CompileCacheWarning):
        warn_of_cache_problems(aloud=True)


TRAIN = """
import sys, warnings
import numpy as np
from shardopt.numpy import NAdam, Parameter
with NAdam([Parameter(np.ones(5000, np.float32), "w")]) as opt:
    opt.param_groups[0]["params"][0].grad += 1
    opt.step()
    from numba.core import compiler
    compiler.compile_extra = None  # a save has nothing to compile
    from shardopt.checkpoint import Checkpointer, load, save
    save(sys.argv[1] + "/a", opt)
    with Checkpointer(sys.argv[1] + "/b") as checkpointer:
        checkpointer.save(1, opt)
    load(sys.argv[1] + "/a", opt)
print("saved")
"""


def test_a_read_only_installation(tmp_path):
    installed = tmp_path / "installed"
    shutil.copytree(
        ROOT / "shardopt", installed / "shardopt", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in [installed / "shardopt", *(installed / "shardopt").rglob("*")]:
        if path.is_dir():
            (path / "__pycache__").touch()  # where root could write all the same
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-B", "-c", TRAIN, str(tmp_path)]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "saved\n", done.stderr
    assert done.stderr.count("CompileCacheWarning") == 1


CALLER = """
import doubling
from shardopt.compiling import compiled

double = doubling.double

@compiled(calls=(doubling,))
def quadruple(x):
    return double(double(x))

print(quadruple(3))
"""


def test_code_is_made_anew_if_a_module_that_it_calls_has_changed(tmp_path):
    (tmp_path / "quadrupling.py").write_text(CALLER, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for factor in (2, 2, 10):
        source = SOURCE.replace("2 * x", f"{factor} * x  # {'.' * factor}")
        if factor != 2 or not (tmp_path / "doubling.py").exists():
            (tmp_path / "doubling.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-c", "import quadrupling"]
        env = os.environ | {"PYTHONPATH": path}
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert int(run.stdout) == 3 * factor**2
