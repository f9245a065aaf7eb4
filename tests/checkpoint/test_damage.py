"""Whatever befalls a checkpoint, loading finds it, on all ranks alike, and changes nothing."""

import os
import shutil

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, MANIFEST_NAME
from shardopt.checkpoint.format.reader import read_manifest
from shardopt.core.sharded_optimizer import sharded_of
from shardopt.errors import CheckpointError, CheckpointWarning
from tests.checkpoint.make_golden import FOLDER, make_groups
from tests.support.damage import (
    add,
    add_folder,
    assert_refused,
    borrow,
    exchange,
    extend,
    flip,
    harmed,
    params_of,
    refused_alike,
    remove,
    rewrite,
    standing,
    truncate,
    words_for_flip,
)
from tests.support.errors import warned
from tests.support.models import UP_TO_THREE_RANKS

pytestmark = [pytest.mark.mpi, UP_TO_THREE_RANKS]

SMALL, LARGE = "saved by three ranks", "of many chunks"
STATES = pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
KINDS = pytest.mark.parametrize("kind", [SMALL, LARGE])
GOLDEN = FOLDER / "v1-3"
LONG_NAME = "n" * 180_000
"""Stands six times in a header, which is then longer than a chunk."""


def make_params(seed):
    """Several chunks for each of four ranks, in three dtypes."""
    generator = np.random.default_rng(seed)
    specs = [(LONG_NAME, (300_000,), "float32"), ("b", (90_001,), "bfloat16"), ("c", (), "float64")]
    return [
        Parameter(generator.standard_normal(shape, np.float32).astype(np.dtype(dtype)), name)
        for name, shape, dtype in specs
    ]


def step(opt, value):
    opt.zero_grad()
    for param in params_of(opt):
        param.grad[...] = value
    opt.step()


def build(comm, kind, stepped):
    """An optimizer of the checkpoint's model, with a state that is not the checkpoint's."""
    policy = ShardPolicy(bucket_nbytes=1 << 18, timeout_s=20, threads=1)
    groups = make_groups(3, start=0.5) if kind == SMALL else make_params(9)
    opt = NAdam(groups, lr=0.3, comm=comm, policy=policy)
    for value in (0.5, -0.25) if stepped else ():
        step(opt, value)
    opt.param_groups[0]["note"] = "of my own"
    return opt


@pytest.fixture
def paths(comm, mpi_tmp_path):
    """Gives a checkpoint of a kind that tests may harm."""

    def make(kind, name="a", seed=0, value=1.0):
        path = mpi_tmp_path / name
        if kind == SMALL:
            if comm.rank == 0:
                shutil.copytree(GOLDEN, path)
            comm.Barrier()
            return path
        policy = ShardPolicy(bucket_nbytes=1 << 18, timeout_s=20, threads=1)
        with NAdam(make_params(seed), comm=comm, policy=policy) as opt:
            step(opt, value)
            save(path, opt, extra={"big": np.arange(200_000), "per_rank": np.ones(3)})
        return path

    return make


def places(path, seed, count):
    """``count`` bits, in every file alike: of headers, of chunks' edges and of anywhere."""
    generator = np.random.default_rng(seed)
    manifest = read_manifest(path)
    sizes = {MANIFEST_NAME: ((path / MANIFEST_NAME).stat().st_size, 100)}
    sizes |= {file.name: (file.nbytes, file.header_nbytes) for file in manifest.files}
    for index in range(count):
        name, (nbytes, header_nbytes) = list(sizes.items())[index % len(sizes)]
        edges = [0, header_nbytes - 1, header_nbytes % nbytes, nbytes - 1]
        edges += [*range(CHUNK_NBYTES, nbytes, CHUNK_NBYTES)]
        byte = (
            int(generator.integers(header_nbytes)),
            edges[int(generator.integers(len(edges)))],
            int(generator.integers(nbytes)),
        )[index // len(sizes) % 3]
        yield name, 8 * byte + int(generator.integers(8))


def assert_flips_are_found(comm, paths, kind, stepped, seed, count):
    path = paths(kind)
    with build(comm, kind, stepped) as opt:
        for name, bit in places(path, seed, count):
            assert_refused(comm, path, opt, flip(name, bit), *words_for_flip(name, bit))
        load(path, opt)


@STATES
@KINDS
def test_a_flipped_bit_is_found(comm, paths, kind, stepped):
    assert_flips_are_found(comm, paths, kind, stepped, seed=1, count=60)


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
@STATES
@KINDS
def test_ten_thousand_flipped_bits_are_found(comm, paths, kind, stepped, seed):
    assert_flips_are_found(comm, paths, kind, stepped, seed, count=625)


def test_state_that_nobody_has_had_in_hand_is_zero_again(comm, paths):
    path = paths(LARGE)
    last = read_manifest(path).files[-1]
    with build(comm, LARGE, stepped=False) as opt, build(comm, LARGE, stepped=False) as twin:
        assert sharded_of(opt).is_state_untouched
        with harmed(comm, path, flip(last.name, 8 * last.nbytes - 1)), refused_alike(comm):
            load(path, opt)
        assert standing(opt)[0] == standing(twin)[0]
        load(path, opt)


def test_state_that_one_rank_has_written_before_the_first_step_stays(comm, paths):
    path = paths(LARGE)
    last = read_manifest(path).files[-1]
    with build(comm, LARGE, stepped=False) as opt:
        if comm.rank == comm.size - 1:
            first, moment = params_of(opt)[0], np.full(300_000, 0.5, np.float32)
            counts = {"step": 0, "mu_product": 1.0}
            opt.state[first] = {**counts, "exp_avg": moment, "exp_avg_sq": moment.copy()}
        opt.adopt(rank=comm.size - 1)
        assert sharded_of(opt).is_state_untouched == (comm.rank < comm.size - 1)
        with harmed(comm, path, flip(last.name, 8 * last.nbytes - 1)), refused_alike(comm):
            load(path, opt)
        sharded = sharded_of(opt)
        tensors = [t for t in sharded.tensors() if t.param == 0 and t.key != "param"]
        assert all((array == 0.5).all() for array in sharded.arrays(tensors))


@STATES
def test_a_truncated_file_is_found(comm, paths, stepped):
    path = paths(SMALL)
    with build(comm, SMALL, stepped) as opt:
        for file in read_manifest(path).files:
            last = file.nbytes - 1
            for nbytes in sorted({0, 7, 8, 100, 4095, 4096, last // 4096 * 4096, last}):
                got = f"file {file.name} must have {file.nbytes} bytes; got {nbytes}"
                assert_refused(comm, path, opt, truncate(file.name, nbytes), got)
        size = (path / MANIFEST_NAME).stat().st_size
        for nbytes in (0, 1, 40, 78, 79, 80, 1000, size - 1):
            assert_refused(comm, path, opt, truncate(MANIFEST_NAME, nbytes), MANIFEST_NAME)


@STATES
def test_an_extended_file_is_found(comm, paths, stepped):
    path = paths(SMALL)
    with build(comm, SMALL, stepped) as opt:
        for file in read_manifest(path).files:
            for more in (b"\0", b" " * 4096):
                got = f"file {file.name} must have {file.nbytes} bytes"
                assert_refused(comm, path, opt, extend(file.name, more), got)
        for more in (b"\0", b"\n", b" ", b"{}"):
            assert_refused(comm, path, opt, extend(MANIFEST_NAME, more), MANIFEST_NAME, "SHA-256")


@STATES
def test_zeros_in_the_place_of_bytes_are_found(comm, paths, stepped):
    """What a file system leaves that lost pages, or delayed the data beyond the size."""
    path = paths(SMALL)
    with build(comm, SMALL, stepped) as opt:
        for file in read_manifest(path).files:
            for start, stop in [(0, file.nbytes), (0, 4096), (4096, file.nbytes)]:
                hole = b"\0" * (stop - start)
                harm = rewrite(
                    file.name, lambda old, s=start, h=hole: old[:s] + h + old[s:][len(h) :]
                )
                assert_refused(comm, path, opt, harm, f"chunk 0 of file {file.name}")
        assert_refused(
            comm, path, opt, rewrite(MANIFEST_NAME, lambda old: bytes(len(old))), MANIFEST_NAME
        )


@STATES
def test_a_missing_file_is_found(comm, paths, stepped):
    path = paths(SMALL)
    with build(comm, SMALL, stepped) as opt:
        for file in read_manifest(path).files:
            told = f"file {file.name} must be there; got none"
            assert_refused(comm, path, opt, remove(file.name), told)
        told = f"{path} must hold a {MANIFEST_NAME}; got none"
        assert_refused(comm, path, opt, remove(MANIFEST_NAME), told)


def test_a_surplus_file_is_found(comm, paths):
    path = paths(SMALL)
    with build(comm, SMALL, stepped=True) as opt:
        for harm in (
            add("rank-00003-of-00004.safetensors"),
            add("manifest.json.part", b"{}"),
            add_folder("step-000000000003"),
        ):
            assert_refused(comm, path, opt, harm, "hold only what was saved")
        with harmed(comm, path, add(".nfs000000000000001")):
            load(path, opt)  # what is hidden is not ours


def test_exchanged_files_are_found(comm, paths, mpi_tmp_path):
    path = paths(SMALL)
    names = [file.name for file in read_manifest(path).files]
    with build(comm, SMALL, stepped=True) as opt:
        for first, second in [(0, 1), (1, 2), (0, 2)]:
            told = f"file {names[first]} must have "
            assert_refused(comm, path, opt, exchange(names[first], names[second]), told)
        assert_refused(comm, path, opt, exchange(names[0], MANIFEST_NAME), MANIFEST_NAME)


def test_files_of_equal_size_that_are_exchanged_are_found(comm, mpi_tmp_path):
    """Two ranks' files of equal size, and files of another step and of another attempt."""
    if comm.size == 1:
        pytest.skip("needs two files")
    policy = ShardPolicy(bucket_nbytes=1 << 20, timeout_s=20, threads=1)
    values = np.arange(4096 * 4 * comm.size, dtype=np.float32)
    with NAdam([Parameter(values, "w")], comm=comm, policy=policy) as opt:
        for name in "abc":
            save(mpi_tmp_path / name, opt)
            step(opt, 1.0)
        files = read_manifest(mpi_tmp_path / "a").files
        assert len({file.nbytes for file in files}) == 1
        first, second = files[0].name, files[1].name
        for name, harm in {
            "a": exchange(first, second),
            "b": borrow(second, mpi_tmp_path / "a"),
            "c": borrow(second, mpi_tmp_path / "b"),
        }.items():
            told = (f"file {second} must", "digest")
            assert_refused(comm, mpi_tmp_path / name, opt, harm, "chunk 0 of file", told[1])
        harm = borrow(MANIFEST_NAME, mpi_tmp_path / "b")
        assert_refused(comm, mpi_tmp_path / "a", opt, harm, "chunk 0 of file")


def test_things_that_are_no_files_are_found(comm, paths):
    path = paths(SMALL)
    name = read_manifest(path).files[1].name

    def replace_by(make, name):
        def harm(path):
            undo = remove(name)(path)
            make(path / name)

            def back():
                (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
                undo()

            return back

        return harm

    with build(comm, SMALL, stepped=True) as opt:
        for make in (
            os.mkdir,
            os.mkfifo,
            lambda place: place.symlink_to("/dev/zero"),
            lambda place: place.symlink_to("/dev/null"),
            lambda place: place.symlink_to(place),
            lambda place: place.symlink_to("/nowhere/at/all"),
        ):
            assert_refused(comm, path, opt, replace_by(make, name), name)
            assert_refused(comm, path, opt, replace_by(make, MANIFEST_NAME), MANIFEST_NAME)


@STATES
def test_an_intact_checkpoint_loads_after_a_damaged_one(comm, paths, stepped):
    damaged, intact = paths(LARGE), paths(LARGE, "b", seed=5, value=-3.0)
    file = read_manifest(damaged).files[-1]
    with build(comm, LARGE, stepped=False) as opt:
        load(intact, opt)
        expected = standing(opt)[0]
    with build(comm, LARGE, stepped) as opt:
        if comm.rank == 0:
            flip(file.name, 8 * (file.header_nbytes + file.nbytes) // 2)(damaged)
        comm.Barrier()
        with refused_alike(comm):
            load(damaged, opt)
        assert len(load(intact, opt).extra["big"]) == 200_000
        assert standing(opt)[0] == expected
        step(opt, 0.5)
        assert opt.last_step.step == 2


@pytest.mark.parametrize(
    ("what", "stepped"),
    [
        ("data", False),
        ("data", True),
        ("header", False),
        ("manifest", True),
        ("no manifest", False),
        ("a file less", True),
    ],
)
def test_an_older_checkpoint_is_restored_in_the_place_of_a_damaged_one(
    comm, mpi_tmp_path, stepped, what
):
    with (
        build(comm, SMALL, stepped=True) as opt,
        Checkpointer(mpi_tmp_path, asynchronous=False) as saver,
    ):
        states = []
        for number in (10, 20, 30):
            step(opt, float(number))
            saver.save(number, opt, extra={"number": number})
            states.append(standing(opt)[:2])
    newest = mpi_tmp_path / "step-000000000030"
    comm.Barrier()
    file = read_manifest(newest).files[-1]
    harm, told = {
        "data": (flip(file.name, 8 * file.nbytes - 1), f"chunk 0 of file {file.name}"),
        "header": (flip(file.name, 80), f"chunk 0 of file {file.name}"),
        "manifest": (flip(MANIFEST_NAME, 8000), "SHA-256"),
        "no manifest": (remove(MANIFEST_NAME), f"hold a {MANIFEST_NAME}"),
        "a file less": (remove(file.name), f"file {file.name} must be there"),
    }[what]
    comm.Barrier()
    if comm.rank == 0:
        harm(newest)
    comm.Barrier()
    with build(comm, SMALL, stepped) as opt, Checkpointer(mpi_tmp_path) as saver:
        match = rf"passed over\. {newest.name}: (.|\n)*{told}"
        with warned(comm, CheckpointWarning, match):
            restored = saver.restore(opt)
        assert (restored.step, restored.extra) == (20, {"number": 20})
        assert standing(opt)[:2] == states[1]
        before = standing(opt)
        with refused_alike(comm, CheckpointError, "a checkpoint of step 30", told):
            saver.restore(opt, step=30)
        assert standing(opt) == before


def test_nothing_is_restored_where_all_are_damaged(comm, mpi_tmp_path):
    with build(comm, SMALL, stepped=True) as opt:
        for number in (1, 2):
            save(mpi_tmp_path / f"step-{number:012d}", opt)
        comm.Barrier()
        if comm.rank == 0:
            for path in mpi_tmp_path.iterdir():
                flip(MANIFEST_NAME, 4000)(path)
        comm.Barrier()
        before = standing(opt)
        with (
            Checkpointer(mpi_tmp_path) as saver,
            refused_alike(comm, CheckpointError, "step-000000000001: ", "step-000000000002: "),
        ):
            saver.restore(opt)
        assert standing(opt) == before
