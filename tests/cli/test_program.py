"""The program as users call it: help, wrong arguments, pipes, signals, and a real job's files."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from shardopt import __version__
from shardopt.cli import GROUPS, ckpt, main, progress, text
from tests.conftest import Mpirun
from tests.support.checkpoints import call, make, refused

PROGRAM = [sys.executable, "-m", "shardopt"]
COMMANDS = [command.name for command in ckpt.GROUP.commands]

JOB = """
import sys
import numpy as np
from mpi4py import MPI
from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import Checkpointer, load, save

def build(comm):
    generator = np.random.default_rng(0)
    specs = [("weight", (40, 401), "float32"), ("scale", (), "float64"),
             ("brain", (4097,), "bfloat16"), ("none", (0, 3), "float32")]
    params = [Parameter(generator.standard_normal(shape).astype(np.dtype(dtype)), name)
              for name, shape, dtype in specs]
    return params, NAdam(params, comm=comm, policy=ShardPolicy(bucket_nbytes=30_000, timeout_s=20))

comm = MPI.COMM_WORLD
params, opt = build(comm)
with opt, Checkpointer("run", keep_last=None) as checkpointer:
    for step in (1, 2):
        opt.zero_grad()
        for param in params:
            param.grad[...] = step
        opt.step()
        checkpointer.save(step, opt, extra={"epoch": step, "per_rank": {"rank": comm.rank}})
    if comm.rank == 0:
        np.savez("expected.npz", **{p.name: np.asarray(p.data, np.float64) for p in params})
pair = comm.Split(0 if comm.rank < 2 else MPI.UNDEFINED)
if pair != MPI.COMM_NULL:
    params, opt = build(pair)
    with opt:
        load("run/step-000000000002", opt)
        save("pair", opt, extra={"epoch": 2})
    pair.Free()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run of two checkpoints by three ranks, and the second one saved again by two ranks."""
    folder = tmp_path_factory.mktemp("job")
    result = Mpirun(folder)(3, source=JOB)
    assert result.returncode == 0, result.output
    return folder


def test_what_a_job_has_saved(job, capsys):
    run, second = job / "run", job / "run" / "step-000000000002"
    found = call(capsys, "ls", "--json", run).json
    assert [entry["state"] for entry in found] == ["complete"] * 2
    assert [entry["world_size"] for entry in found] == [3, 3]
    assert call(capsys, "verify", job / "pair", run).code == 0
    shown = call(capsys, "show", "--json", second).json
    assert shown["extra"] == {"epoch": 2, "per_rank": [{"rank": rank} for rank in range(3)]}
    assert shown["num_steps"] == 2
    result = call(capsys, "diff", "--json", second, job / "pair")
    assert not result.json["tensors"]
    assert [value["name"] for value in result.json["values"]] == [
        f"extra['per_rank'][{rank}]['rank']" for rank in range(3)
    ]
    assert len(call(capsys, "diff", "--json", run / "step-000000000001", second).json["tensors"])


@pytest.mark.parametrize("source", ["run/step-000000000002", "pair"])
def test_merge_of_what_a_job_has_saved(job, tmp_path, capsys, source):
    numpy_format = pytest.importorskip("safetensors.numpy")
    out = tmp_path / "out.safetensors"
    assert call(capsys, "merge", job / source, out).code == 0
    merged = numpy_format.load_file(out)
    with np.load(job / "expected.npz") as expected:
        assert set(merged) == set(expected)
        for name, array in expected.items():
            assert merged[name].shape == array.shape
            assert np.array_equal(merged[name].astype(np.float64), array)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    result = call(capsys, command, "--help")
    assert result.code == 0
    for told in (f"example:\n  shardopt ckpt {command} ", "--json", "exit code:\n  0  "):
        assert told in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_every_group_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(group.summary in told for group in GROUPS)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"shardopt {__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["what"], ["ls"], ["ls", "--what"], ["verify", "--qui", "."]]
)
def test_wrong_arguments(capsys, words):
    refused(call(capsys, *words), "arguments must match --help")


def run_program(*words, **settings):
    return subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, **settings)


def test_the_program(tmp_path):
    make(tmp_path / "a", {"é\udc80": np.ones(3, np.float32)})
    for encoding in ("utf-8", "ascii"):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = run_program("ckpt", "show", tmp_path / "a", env=env)
        assert (done.returncode, done.stderr) == (0, "")
    done = run_program("ckpt", "ls", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("shardopt ckpt: path must be")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_error(tmp_path):
    make(tmp_path / "a", {f"weight {i}": np.ones(1, np.float32) for i in range(3000)})
    with subprocess.Popen(
        [*PROGRAM, "ckpt", "show", tmp_path / "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout.readline()
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 128 + signal.SIGPIPE


def test_numbers_for_people():
    numbers = [0, 999, 1000, 12_345, 999_499, 999_500, 1_240_000_000, 10**21]
    shown = ["0 B", "999 B", "1.00 kB", "12.3 kB", "999 kB", "1.00 MB", "1.24 GB", "1000 EB"]
    assert [text.nbytes(number) for number in numbers] == shown


class Terminal:
    """A stand-in for a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(("patience_s", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_is_shown_to_who_waits(monkeypatch, patience_s, shown):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE_S", patience_s)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("reading", 100) as advance:
        advance(50)
    assert ("reading" in terminal.text) == shown
    assert bool(terminal.text) == shown


def test_no_bar_without_rich(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.progress("reading", 100) as advance:
        advance(50)
    assert not terminal.text


VALUES = [None, True, -1, 3, 1 << 61, 1e300, "", "w", "../x", [], {}, [0, 1, 0, 4096]]
VALUES += [{"$array": [0, 0]}, {"$tuple": 3}, {"$items": [[[], 1]]}, {"$float": "x"}]


def places_in(value, place=()):
    """Yield the paths of all values within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*place, key)
        if isinstance(item, dict | list):
            yield from places_in(item, (*place, key))


def test_no_manifest_breaks_a_command(tmp_path, capsys):
    params = {"w": np.ones((2, 3), np.float32), "half": np.ones(9, np.float16)}
    path = make(tmp_path / "a", params, extra={"x": np.arange(4), "y": (1, float("nan"))})
    other = shutil.copytree(path, tmp_path / "b")
    _, _, original = (path / "manifest.json").read_bytes().partition(b"\n")
    chance = random.Random(0)
    places = list(places_in(json.loads(original)))
    for _ in range(40):
        content = json.loads(original)
        *way, last = chance.choice(places)
        holder = content
        for key in way:
            holder = holder[key]
        holder[last] = chance.choice(VALUES)
        body = json.dumps(content).encode()
        digest = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
        (path / "manifest.json").write_bytes(digest + b"\n" + body)
        for words in (["ls"], ["show"], ["show", "--json"], ["verify"], ["diff", other]):
            assert call(capsys, *words, path).code in (0, 1)
        out = tmp_path / "out"
        assert call(capsys, "merge", "--state", "--force", path, out).code in (0, 1, 2)
