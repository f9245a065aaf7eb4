"""The optimizer state of devices: what users see of it, and what they do to it, is as on CPUs."""

import copy
import functools

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import Parameter
from shardopt.errors import CheckpointError, PartialStateWarning
from tests.support.arena_device import fill, memory_of, on_device
from tests.support.device_models import (
    WAYS,
    Twins,
    build_on,
    entries_of,
    shown_by,
    train,
    values_of,
)
from tests.support.errors import is_last, refused
from tests.support.models import UP_TO_THREE_RANKS, params_of

pytestmark = [pytest.mark.mpi, UP_TO_THREE_RANKS]

SPECS = [
    ("weight", (3, 4096), "float32"),
    ("small", (5,), "float32"),
    ("brain", (4097,), "bfloat16"),
]
WHOLE = pytest.mark.parametrize("way", ["direct", "offload"])
EVERY_WAY = pytest.mark.parametrize("way", WAYS)
DIRECT = pytest.mark.parametrize("way", ["direct"])


@pytest.fixture
def make(monkeypatch, comm):
    return functools.partial(build_on, monkeypatch, comm, specs=SPECS, lr=0.1, max_grad_norm=1.0)


@pytest.fixture(params=["direct", "staged"])
def way(request):
    return request.param


@pytest.fixture
def twins(make, way):
    twins = Twins(make, way)
    twins.train(range(2))
    yield twins
    twins.train([90])  # all goes on
    twins.close()


def weight_of(opt):
    return params_of(opt)[0]


# -- what users see --------------------------------------------------------------------------------


@WHOLE
def test_state_is_looked_up_as_on_cpus(twins, way):
    entry = twins.device.state[weight_of(twins.device)]
    for step in range(2, 4):
        assert shown_by(twins.device) == shown_by(twins.cpu)
        assert type(entry["exp_avg"]) is np.ndarray
        shown = twins.cpu.state[weight_of(twins.cpu)]["exp_avg"]
        np.testing.assert_array_equal(entry["exp_avg"], shown)
        twins.train([step])


@DIRECT
def test_an_array_shows_the_state_as_it_was_looked_up(comm, twins, way):
    entry = twins.device.state[weight_of(twins.device)]
    array = entry["exp_avg"]
    before = array.copy()
    train(twins.device, [2], twins.rank)
    train(twins.cpu, [2], twins.rank)
    np.testing.assert_array_equal(array, before)
    comm.Barrier()  # before any rank looks it up once more
    assert not np.array_equal(entry["exp_avg"], before)


@WHOLE
def test_one_rank_alone_may_look(comm, twins, way):
    if is_last(comm):
        assert shown_by(twins.device) == shown_by(twins.cpu)
        saved = copy.deepcopy(twins.device.state_dict())
        assert repr(saved) == repr(twins.cpu.state_dict())


@EVERY_WAY
def test_nothing_comes_home_unless_somebody_asks(make, comm, way):
    with make(way, bucket_nbytes=1 << 20) as opt:
        device = opt.core.parts.residence.holder
        train(opt, [0], comm.rank)
        assert opt.state[weight_of(opt)]["step"] == 1  # is no array
        copied_nbytes, num_buffers = device.copied_nbytes, device.num_buffers
        train(opt, [1], comm.rank)
        each_step = device.copied_nbytes - copied_nbytes
        train(opt, [2], comm.rank)
        assert device.copied_nbytes == copied_nbytes + 2 * each_step
        if way == "direct":
            assert each_step == 0
        assert device.num_buffers == num_buffers
        assert not opt.core.parts.memory.state.arrays(0)["exp_avg"].any() or way == "offload"
        for _ in range(2):  # the second time it is there
            copied_nbytes = device.copied_nbytes
            entries_of(opt)
            assert device.num_buffers == num_buffers + (0 if way == "offload" else 2)
        assert device.copied_nbytes == copied_nbytes


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", ["staged"])
def test_a_rank_that_reaches_no_others_has_its_own_part(comm, twins, way):
    opt = twins.device
    with pytest.raises(KeyError, match=r"each rank has a part of it. Call gather_state_dict\(\)"):
        opt.state[weight_of(opt)]["exp_avg"]
    with pytest.warns(PartialStateWarning, match=f"the part of rank {comm.rank} of {comm.size}"):
        part = opt.state_dict()
    parts, whole = comm.allgather(part), comm.bcast(twins.cpu.state_dict())
    for index, entry in whole["state"].items():
        for key in {"exp_avg", "exp_avg_sq", "master"} & set(entry):
            flat = np.full(entry[key].size, np.nan, entry[key].dtype)
            for each in parts:
                own = each["state"][index]
                ends = np.cumsum([stop - start for start, stop in own["slices"]])
                pieces = np.split(own[key], ends[:-1]) if len(ends) else []
                for (start, stop), piece in zip(own["slices"], pieces, strict=True):
                    flat[start:stop] = piece
            np.testing.assert_array_equal(flat.reshape(entry[key].shape), entry[key])
    twins.train([2])
    opt.load_state_dict(part)  # the parts of all ranks are the whole
    twins.cpu.load_state_dict(copy.deepcopy(whole))
    twins.assert_alike()
    with refused(comm, CheckpointError, "nothing of node 0 of"):
        opt.load_state_dict(None if comm.rank == 0 else part)


# -- what they do to it ----------------------------------------------------------------------------


def scale_in_place(opt):
    opt.state[weight_of(opt)]["exp_avg"][1:, 100:] *= 0.5


def assign(opt):
    opt.state[weight_of(opt)]["exp_avg"] = opt.state[weight_of(opt)]["exp_avg"] * 0.5


def assign_an_entry(opt):
    entry = opt.state[weight_of(opt)]
    opt.state[weight_of(opt)] = {**entry, "exp_avg_sq": entry["exp_avg_sq"] * 0.5}


def write_a_master(opt):
    opt.state[params_of(opt)[2]]["master"][: 4097 // 2] += 1


def turn_round(opt):
    opt.state[weight_of(opt)]["exp_avg"] = opt.state[weight_of(opt)]["exp_avg"][::-1]


def assign_without_a_look(opt):
    moments = {key: np.full((3, 4096), 0.5, np.float32) for key in ("exp_avg", "exp_avg_sq")}
    opt.state[weight_of(opt)] = {"step": 3, "mu_product": 0.5, **moments}


def assign_from_the_device(opt):
    values = np.full((3, 4096), 0.25, np.float32)
    is_home = opt.core.parts.residence.is_home
    opt.state[weight_of(opt)]["exp_avg"] = values if is_home else on_device(values)


@WHOLE
@pytest.mark.parametrize(
    ("write", "skipped"),
    [
        (scale_in_place, ()),
        (scale_in_place, (0, 2)),
        (assign, (0, 2)),
        (assign_an_entry, ()),
        (write_a_master, ()),
        (write_a_master, (0, 2)),  # which have no gradients
        (turn_round, ()),
        (assign_without_a_look, (0, 2)),
        (assign_from_the_device, (0, 2)),
    ],
)
def test_writes_hold_from_the_next_step_on(twins, way, write, skipped):
    twins.both(write)
    twins.train([2], skipped=skipped)
    twins.both(write)
    twins.assert_alike()
    twins.train([3])


@DIRECT
@pytest.mark.parametrize("then", ["step", "look", "save"])
def test_a_write_to_an_array_from_before_a_step_is_refused(comm, twins, way, then):
    opt = twins.device
    array = opt.state[weight_of(opt)]["exp_avg"]
    twins.both(lambda opt: train(opt, [2], twins.rank))
    array[0, :5] = 7
    with refused(comm, CheckpointError, "exp_avg of parameter 'weight'", "It is dropped"):
        if then == "step":
            opt.step()
        if then == "look":
            opt.state[weight_of(opt)]["exp_avg"]
        if then == "save":
            opt.gather_state_dict()
    twins.assert_alike()
    twins.both(scale_in_place)


@DIRECT
@pytest.mark.skipif(MPI.COMM_WORLD.size > 1, reason="what another rank looks up changes the bytes")
def test_the_same_bytes_written_to_an_old_array_are_no_write(twins, way):
    array = twins.device.state[weight_of(twins.device)]["exp_avg"]
    twins.both(lambda opt: train(opt, [2], twins.rank))
    array[...] = array.copy()
    twins.both(scale_in_place)
    twins.train([3])


@DIRECT
@pytest.mark.mpi(min_size=2)
def test_one_rank_that_writes_to_an_old_array_stops_all(comm, twins, way):
    opt = twins.device
    array = opt.state[weight_of(opt)]["exp_avg"]
    twins.both(lambda opt: train(opt, [2], twins.rank))
    if is_last(comm):
        array[0, :5] = 7
    with refused(comm, CheckpointError, "It is dropped", alone=True):
        opt.step()
    twins.assert_alike()


def reset(opt):
    opt.reset_state()


def reset_one(opt):
    opt.reset_state([weight_of(opt)])


def delete(opt):
    del opt.state[weight_of(opt)]


def edit_counts(opt):
    opt.state[weight_of(opt)]["step"] = 0
    opt.state[weight_of(opt)]["mu_product"] = 0.5


@pytest.mark.parametrize(
    ("edit", "skipped"),
    [(reset, ()), (reset_one, (0,)), (delete, ()), (edit_counts, ()), (edit_counts, (0,))],
)
def test_edits_hold_from_the_next_step_on(twins, edit, skipped):
    twins.both(edit)
    twins.train([2], skipped=skipped)
    twins.both(edit)
    twins.assert_alike()


@WHOLE
def test_a_reset_wins_over_what_was_written_before(twins, way):
    twins.both(scale_in_place)
    twins.both(reset_one)
    twins.train([2])


# -- state dicts and values ------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "on_ranks"), [("device", "all"), ("cpu", "one")])
def test_a_state_dict_goes_from_one_to_the_other(comm, twins, source, on_ranks):
    saved = getattr(twins, source).gather_state_dict(comm.size - 1)
    twins.train(range(2, 4))
    if on_ranks == "all":
        saved = comm.bcast(saved, comm.size - 1)
    twins.both(lambda opt: opt.load_state_dict(saved))
    twins.train(range(4, 6))


@WHOLE
def test_the_present_state_dict_is_loaded_in_place(twins, way):
    twins.both(lambda opt: opt.load_state_dict(opt.state_dict()))
    saved = twins.device.state_dict()
    twins.train([2])
    if way == "direct":
        with pytest.raises(CheckpointError, match="must be of the present step"):
            twins.device.load_state_dict(saved)


def test_parameters_without_an_entry_start_anew(comm, twins):
    saved = comm.bcast(twins.cpu.gather_state_dict())
    del saved["state"][0]
    twins.both(lambda opt: opt.load_state_dict(saved))
    twins.assert_alike()


def test_values_are_loaded_from_anywhere(twins):
    values = {p.name: np.full(p.data.shape, 0.5, p.data.dtype) for p in params_of(twins.cpu)}
    twins.cpu.load_params(values)
    twins.device.load_params({**values, "weight": on_device(values["weight"])})
    twins.assert_alike()


@EVERY_WAY
def test_all_adopt_what_one_rank_has(comm, twins, way):
    shows_state = twins.device.core.states.is_whole

    def change(opt):
        if comm.rank == 0:
            is_home = opt.core.parts.residence.is_home
            new = np.full(5, 2, np.float32)
            fill(weight_of(opt).data, 0.5)
            params_of(opt)[1].data = new if is_home else on_device(new)
            if shows_state:
                scale_in_place(opt)
        opt.adopt(rank=0)

    twins.both(lambda opt: opt.adopt(rank=comm.size - 1))  # nothing has changed
    twins.assert_alike()
    twins.both(change)
    twins.assert_alike()
    assert (np.frombuffer(values_of(twins.device)["weight"], np.float32) == 0.5).all()


# -- parameters come and go ------------------------------------------------------------------------


@EVERY_WAY
def test_parameters_come_and_go(twins, way):
    def edit(opt):
        params = opt.param_groups[0]["params"]
        del params[0]
        new = np.linspace(0, 1, 5000, dtype=np.float32)
        is_home = opt.core.parts.residence.is_home
        params.append(Parameter(new if is_home else on_device(new), "new"))

    twins.both(edit)
    twins.train(range(2, 4))
    memory = twins.device.core.parts.memory
    left = memory.buffers[0].node_grads, memory.state.arrays(0).values()
    for array in [*left[0], *left[1]]:
        assert not memory_of(array)[: min(3 * 4096, array.size)].any()  # padding, by now
    for array in memory.state._computed[0].arrays.values():
        assert np.count_nonzero(memory_of(array)) <= 5


def test_state_outlives_the_optimizer(make, comm, way):
    opt = make(way)
    train(opt, [0], comm.rank)
    entry = opt.state[weight_of(opt)]
    expected = None if "exp_avg" not in entry else entry["exp_avg"].copy()
    bits = values_of(opt)
    opt.close()
    if expected is not None:
        np.testing.assert_array_equal(entry["exp_avg"], expected)
    assert len(bits) == 3
