"""Checkpoints of moments of 8 bits, and of bfloat16 without masters."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.checkpoint.format.manifest import MANIFEST_NAME, PARAM_KEY
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.errors import CheckpointWarning
from tests.support.damage import flip, harmed, refused_alike
from tests.support.errors import warned

pytestmark = pytest.mark.mpi

SHAPES = [(9000,), (3, 5), (4352,)]
KINDS = {
    "full": {},
    "8 bits": {"optim_bits": 8},
    "no masters": {"master_weights": False},
    "both": {"optim_bits": 8, "master_weights": False},
}
SMALL = pytest.mark.parametrize("kind", ["8 bits", "no masters", "both"])


def build(comm, kind, dtype="bfloat16", prefix="w", bucket_nbytes=20_000, **settings):
    values = [np.linspace(-1, 1, int(np.prod(shape))).reshape(shape) for shape in SHAPES]
    params = [Parameter(v.astype(dtype), f"{prefix}{i}") for i, v in enumerate(values)]
    policy = ShardPolicy(bucket_nbytes=bucket_nbytes, **{**KINDS[kind], **settings})
    return NAdam(params, lr=0.01, comm=comm, policy=policy), params


def train(opt, params, steps):
    """Take steps with the same gradients on all ranks, whatever their number."""
    for step in steps:
        rng = np.random.default_rng(step)
        for param in params:
            param.grad = (rng.integers(-8, 9, param.data.shape) / 16).astype(param.data.dtype)
        opt.step(loss_scale=1 / opt.comm.size)  # a sum, which is exact


def bits_of(opt, params):
    state = opt.gather_state_dict()
    entries = [] if state is None else state["state"].values()
    return [p.data.tobytes() for p in params], [
        {key: np.asarray(value).tobytes() for key, value in entry.items()} for entry in entries
    ]


@SMALL
def test_a_resumed_run_goes_on_bit_for_bit(comm, mpi_tmp_path, kind):
    opt, params = build(comm, kind)
    with opt:
        train(opt, params, range(3))
        save(mpi_tmp_path / "a", opt)
        train(opt, params, range(3, 5))
        expected = bits_of(opt, params)
    for ranks, bucket_nbytes in (comm, 1 << 20), (MPI.COMM_SELF, 20_000):
        opt, params = build(ranks, kind, bucket_nbytes=bucket_nbytes)
        with opt:
            restored = load(mpi_tmp_path / "a", opt)
            assert restored.report.is_perfect
            opt_size = comm.size / opt.comm.size  # whose gradients were summed
            for step in range(3, 5):
                rng = np.random.default_rng(step)
                for param in params:
                    grad = rng.integers(-8, 9, param.data.shape) / 16
                    param.grad = (grad * opt_size).astype(param.data.dtype)
                opt.step(loss_scale=opt_size / comm.size)
            found = bits_of(opt, params)
        assert found[0] == expected[0]
        if comm.rank == 0:
            assert found[1] == expected[1]


@SMALL
def test_files_hold_codes_and_can_be_read_as_floats(comm, mpi_tmp_path, kind):
    opt, params = build(comm, kind)
    with opt:
        train(opt, params, range(2))
        save(mpi_tmp_path / "a", opt)
        state = opt.gather_state_dict()
    if comm.rank:
        return
    manifest = read_manifest(mpi_tmp_path / "a")
    text = (mpi_tmp_path / "a" / MANIFEST_NAME).read_text().partition("\n")[2]
    assert json.loads(text)["min_reader_version"] == 2
    with Reader(mpi_tmp_path / "a", manifest) as reader:
        for index, param in enumerate(manifest.params):
            is_coded = "optim_bits" in KINDS[kind] and param.numel >= 4096
            assert param.form.optim_bits == (8 if is_coded else 32)
            for key in param.tensors:
                found = reader.tensor(index, key)
                expected = params[index].data if key == PARAM_KEY else state["state"][index][key]
                np.testing.assert_array_equal(found, expected)
    numel = sum(int(np.prod(shape)) for shape in SHAPES)
    each = {"8 bits": 2 + 2.1 + 4, "no masters": 2 + 8, "both": 2 + 2.1}[kind]
    assert manifest.nbytes < each * numel + 300 + 4096 * comm.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("there", KINDS)
def test_all_forms_load_all_others_and_say_so(comm, mpi_tmp_path, dtype, there):
    opt, params = build(comm, there, dtype)
    with opt:
        train(opt, params, range(2))
        save(mpi_tmp_path / "a", opt)
        values, state = bits_of(opt, params)[0], opt.gather_state_dict()
    for here in KINDS:
        opt, params = build(comm, here, dtype)
        before, now = KINDS[there], KINDS[here]
        said = []
        if before.get("optim_bits") != now.get("optim_bits"):
            said.append("to 8 bits" if "optim_bits" in now else "and 32 from now on")
        if dtype == "bfloat16" and before.get("master_weights") != now.get("master_weights"):
            said.append("have been left out" if "master_weights" in now else "begin with the")
        with opt:
            if said:
                with warned(comm, CheckpointWarning, "(?s)" + ".*".join(said)):
                    report = load(mpi_tmp_path / "a", opt).report
            else:
                report = load(mpi_tmp_path / "a", opt).report
            assert len(report.notes) == len(said)
            assert [param.data.tobytes() for param in params] == values
            found = opt.gather_state_dict()
            train(opt, params, range(2, 3))
        if comm.rank:
            continue
        for index, entry in found["state"].items():
            assert entry["step"] == 2
            for key in ("exp_avg", "exp_avg_sq"):
                expected, floor = state["state"][index][key], 2.0**-14
                floor *= np.abs(expected).max()
                np.testing.assert_allclose(entry[key], expected, rtol=0.07, atol=floor)
                if before.get("optim_bits") or not now.get("optim_bits"):
                    np.testing.assert_array_equal(entry[key], expected)


@pytest.mark.parametrize("there", ["full", "8 bits"])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_load_that_fails_leaves_codes_as_they_were(comm, mpi_tmp_path, there, num_steps):
    opt, params = build(comm, there)
    with opt:
        train(opt, params, range(3))
        save(mpi_tmp_path / "a", opt)
    last = read_manifest(mpi_tmp_path / "a").files[-1]
    (opt, params), (twin, others) = build(comm, "8 bits"), build(comm, "8 bits")
    with opt, twin:
        train(opt, params, range(num_steps))
        train(twin, others, range(num_steps))
        harm = flip(last.name, 8 * last.nbytes - 1)
        with harmed(comm, mpi_tmp_path / "a", harm), refused_alike(comm):
            load(mpi_tmp_path / "a", opt)
        train(opt, params, range(num_steps, 4))
        train(twin, others, range(num_steps, 4))
        assert bits_of(opt, params) == bits_of(twin, others)


@pytest.mark.parametrize("change", ["seed", "name"])
def test_other_random_numbers_are_reported(comm, mpi_tmp_path, change):
    opt, params = build(comm, "both")
    with opt:
        train(opt, params, range(1))
        save(mpi_tmp_path / "a", opt)
    opt, params = build(comm, "both", **({"seed": 1} if change == "seed" else {"prefix": "v"}))
    rename = None if change == "seed" else {f"w{i}": f"v{i}" for i in range(3)}
    with opt, warned(comm, CheckpointWarning, "3 parameters have another name or seed"):
        load(mpi_tmp_path / "a", opt, rename=rename)
