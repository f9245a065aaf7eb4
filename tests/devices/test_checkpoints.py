"""Checkpoints of devices are those of CPUs, to the byte, and are loaded by any number of either."""

import functools
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from mpi4py import MPI

from shardopt import NAdam, ShardPolicy
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.errors import CheckpointWarning, DamagedCheckpointError
from tests.checkpoint.make_golden import FOLDER, make_groups
from tests.support.arena_device import arena_devices, on_device
from tests.support.checkpoints import flip
from tests.support.device_models import (
    WAYS,
    Twins,
    build_on,
    entries_of,
    train,
    values_of,
)
from tests.support.device_training import up_to_two_ranks
from tests.support.errors import warned
from tests.support.models import SPECS, params_of

pytestmark = [pytest.mark.mpi(min_size=2), up_to_two_ranks]


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def make(monkeypatch, comm):
    return functools.partial(build_on, monkeypatch, comm, lr=0.1)


def files_of(folder):
    """The bytes of all files but the manifest, which has the time."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def assert_same(left, right):
    assert values_of(left) == values_of(right)
    assert entries_of(left) == entries_of(right)


def test_files_are_those_of_cpus(make, comm, mpi_tmp_path, way):
    twins = Twins(make, way)
    twins.train(range(3), skipped=[3])
    if way == "direct":  # what users have written is saved as well
        twins.both(lambda opt: opt.state[params_of(opt)[0]]["exp_avg"].__imul__(0.5))
    save(mpi_tmp_path / "device", twins.device)
    save(mpi_tmp_path / "cpu", twins.cpu)
    comm.Barrier()
    files = files_of(mpi_tmp_path / "device")
    assert files
    assert files == files_of(mpi_tmp_path / "cpu")
    twins.train(range(3, 5))
    twins.close()


@pytest.mark.parametrize(
    ("saver", "way"), [("cpu", "direct"), ("cpu", "staged"), *(("device", way) for way in WAYS)]
)
@pytest.mark.parametrize("num_savers", [1, 2])
def test_training_goes_on_elsewhere(monkeypatch, comm, mpi_tmp_path, way, saver, num_savers):
    """What one kind saves on some ranks goes on on all ranks of the other, and of the same."""
    if num_savers > comm.size:
        pytest.skip("needs more ranks")
    part = comm.Split(0 if comm.rank < num_savers else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        first = build_on(monkeypatch, part, way if saver == "device" else "cpu", lr=0.1)
        train(first, range(3))
        save(mpi_tmp_path / "a", first)
        first.close()
        part.Free()
    comm.Barrier()
    twins = Twins(functools.partial(build_on, monkeypatch, comm, seed=9, bucket_nbytes=70_000), way)
    train(twins.device, [70])  # what is there is to go
    twins.both(lambda opt: load(mpi_tmp_path / "a", opt))
    twins.assert_alike()
    twins.train(range(3, 5))
    straight = build_on(monkeypatch, comm, "cpu", lr=0.1)
    if num_savers == comm.size:  # gradients of all ranks are alike, but not summed in one order
        train(straight, range(3))
        train(straight, range(3, 5), comm.rank)
        assert_same(twins.device, straight)
    straight.close()
    twins.close()


def test_a_save_is_of_its_step_whatever_comes_after(make, comm, mpi_tmp_path, way):
    twins, may_write = Twins(make, way), Event()
    with Checkpointer(mpi_tmp_path / "run") as checkpointer:
        checkpointer._writer = ThreadPoolExecutor(1)
        checkpointer._writer.submit(may_write.wait)  # nothing is written before the steps
        twins.train(range(2))
        checkpointer.save(2, twins.device)
        saved = values_of(twins.cpu), entries_of(twins.cpu)
        train(twins.device, range(2, 4), comm.rank)
        may_write.set()
        checkpointer.wait()
        checkpointer.restore(twins.cpu)
        assert (values_of(twins.cpu), entries_of(twins.cpu)) == saved
        checkpointer.restore(twins.device)
        twins.train(range(2, 4))
    twins.close()


def test_a_part_is_loaded_and_the_rest_stays(make, comm, mpi_tmp_path, way):
    with make("cpu", seed=4, specs=[SPECS[0], ("other", (8,), "float32"), SPECS[5]]) as other:
        train(other, range(2))
        save(mpi_tmp_path / "a", other)
    twins = Twins(make, way)
    twins.train(range(3))

    def load_some(opt, **options):
        with warned(comm, CheckpointWarning, "a: loaded"):
            load(mpi_tmp_path / "a", opt, **options)

    twins.both(lambda opt: load_some(opt, strict=False))
    twins.assert_alike()
    twins.train([3])
    twins.both(lambda opt: load_some(opt, strict=False, rename={"other": "scale"}, only="params"))
    twins.assert_alike()
    twins.train([4])
    twins.close()


@pytest.mark.parametrize("way", ["direct"])
def test_a_damaged_checkpoint_changes_nothing(make, comm, mpi_tmp_path, way):
    twins = Twins(make, way)
    twins.train(range(2))
    save(mpi_tmp_path / "a", twins.cpu)
    if comm.rank == 0:
        file = max((mpi_tmp_path / "a").glob("*.safetensors"))
        flip(file, file.stat().st_size - 9)
    comm.Barrier()
    fresh = make(way, seed=3)
    for opt in (twins.device, fresh):
        with pytest.raises(DamagedCheckpointError):
            load(mpi_tmp_path / "a", opt)
    twins.train(range(2, 4))
    with make("cpu", seed=3) as like:
        assert_same(fresh, like)
        train(fresh, [0])
        train(like, [0])
        assert_same(fresh, like)
    fresh.close()
    twins.close()


@pytest.mark.parametrize("case", ["v1-2"])
def test_golden_checkpoints_are_loaded_onto_devices(monkeypatch, comm, way, case):
    num_savers = int(case.partition("-")[2])
    groups = make_groups(num_savers, start=0.0)
    for group in groups:
        for param in group["params"]:
            param.data = on_device(param.data)
    policy = ShardPolicy(timeout_s=20, bucket_nbytes=1, offload="cpu" if way == "offload" else None)
    with arena_devices(monkeypatch, has_peers=way != "staged"):
        opt = NAdam(groups, comm=comm, policy=policy)
    like = NAdam(make_groups(num_savers, start=0.0), comm=comm, policy=ShardPolicy(timeout_s=20))
    for each in (opt, like):
        load(FOLDER / case, each)
    assert_same(opt, like)
    opt.close()
    like.close()


def test_frozen_state_takes_no_memory_at_home(monkeypatch, comm, mpi_tmp_path):
    """Pages that no step has updated are neither copied nor touched."""
    specs = [("frozen", (1 << 20,), "float32"), ("trained", (5000,), "float32")]
    with build_on(monkeypatch, comm, "direct", specs=specs) as opt:
        device = opt.core.parts.residence.holder
        train(opt, range(2), skipped=[0])
        before = device.copied_nbytes
        opt.state[params_of(opt)[1]]["exp_avg"]
        assert device.copied_nbytes - before < 2 * 4 * 8192
