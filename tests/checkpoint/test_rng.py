"""Random streams go on as if nothing had been saved, or are seeded anew, on all ranks alike."""

import sys
import types
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.checkpoint.rng.streams import capture_rng, restore_rng
from shardopt.errors import CheckpointError, RandomStreamWarning
from tests.support.errors import is_last, warned
from tests.support.frameworks import require
from tests.support.streams import (
    KINDS,
    draw,
    make_generator,
    seed_all,
    standing,
    through_json,
)


@pytest.fixture
def torch():
    return require("torch")


@pytest.mark.mpi
def test_every_draw_is_as_it_would_have_been(comm):
    generators = seed_all(comm.rank)
    states = comm.allgather(through_json(capture_rng(**generators)))
    expected = [draw(generators) for _ in range(300)]  # all of MT19937's 624 words and more
    others = seed_all(comm.rank + 99)
    restore_rng(states, comm, **others)
    assert [draw(others) for _ in range(300)] == expected


@pytest.mark.mpi
def test_torch_goes_on(comm, torch):
    test_every_draw_is_as_it_would_have_been(comm)  # torch draws with them once it is imported
    torch.manual_seed(comm.rank)
    states = comm.allgather(through_json(capture_rng()))
    expected = torch.rand(2000)
    restore_rng(states)
    assert torch.equal(torch.rand(2000), expected)


def test_what_generators_hold_back_is_saved():
    state = capture_rng(**seed_all(0))
    assert state["python"]["gauss_next"] is not None
    assert state["numpy"]["has_gauss"] == 1
    held_back = [kind for kind in KINDS if state["generators"][kind].get("has_uint32") == 1]
    assert held_back == [kind for kind in KINDS if kind != "MT19937"]


def test_a_state_does_not_change_with_its_stream():
    generators = seed_all(0)
    state = capture_rng(**generators)
    before = through_json(state)
    for _ in range(300):
        draw(generators)
    np.testing.assert_equal(state, before)


def test_streams_that_have_never_been_drawn_from():
    states = [through_json(capture_rng(order=np.random.default_rng(3)))]
    order = np.random.default_rng(4)
    restore_rng(states, MPI.COMM_SELF, order=order)
    assert order.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_functions_may_draw_from_any_kind(kind):
    usual = np.random.mtrand.get_bit_generator()
    np.random.set_bit_generator(getattr(np.random, kind)(5))
    try:
        np.random.standard_normal()
        states = [through_json(capture_rng())]
        expected = np.random.standard_normal(5)
        restore_rng(states, MPI.COMM_SELF)
        assert (np.random.standard_normal(5) == expected).all()
        with pytest.warns(RandomStreamWarning):
            restore_rng(states * 2, MPI.COMM_SELF)
        assert (np.random.standard_normal(5) != expected).all()
    finally:
        np.random.set_bit_generator(usual)


OTHER_SIZES = pytest.mark.parametrize(
    "resize",
    [
        pytest.param(lambda states: states[:-1], marks=pytest.mark.mpi(min_size=2)),
        pytest.param(lambda states: [*states, states[0]]),
        pytest.param(lambda states: states * 3),
    ],
    ids=["one less", "one more", "three times"],
)


def restore_warned(comm, states, generators):
    with warned(comm, RandomStreamWarning, f"{len(states)} ranks have saved them, but "):
        restore_rng(states, comm, **generators)


@pytest.mark.mpi
@OTHER_SIZES
def test_on_other_ranks_all_streams_are_seeded_anew(comm, resize):
    generators = seed_all(0)  # all ranks' streams are alike
    states = resize(comm.allgather(through_json(capture_rng(**generators))))
    restore_warned(comm, states, generators)
    drawn = draw(generators)
    for column in zip(*comm.allgather(drawn), strict=True):
        assert len(set(column)) == comm.size  # every stream is another one on every rank
    assert len(set(drawn)) == len(drawn)
    for state in states:  # as files may order them
        state["generators"] = dict(sorted(state["generators"].items(), reverse=True))
    others = seed_all(99)
    restore_warned(comm, states, others)
    assert draw(others) == drawn  # alike when it is repeated


def test_generators_of_one_kind_are_seeded_differently():
    generators = {name: make_generator("PCG64", 0) for name in ("order", "noise")}
    states = [capture_rng(**generators)] * 2
    restore_warned(MPI.COMM_SELF, states, generators)
    assert generators["order"].random() != generators["noise"].random()


@pytest.mark.mpi
def test_new_streams_depend_on_all_that_was_saved(comm):
    def draw_after(states):
        generators = seed_all(7)
        restore_warned(comm, states, generators)
        return draw(generators)

    states = through_json(capture_rng(**seed_all(0)))
    states = [states, through_json(states)] * comm.size
    drawn = draw_after(states)
    states[1]["python"]["pos"] -= 1
    after_pos = draw_after(states)
    states[1]["generators"]["SFC64"]["state"]["state"] = np.arange(4, dtype=np.uint64)
    for column in zip(drawn, after_pos, draw_after(states), strict=True):
        assert len(set(column)) == 3


@pytest.mark.mpi
def test_the_number_of_ranks_matters(comm):
    states = [capture_rng()] * (comm.size + 1)
    restore_warned(comm, states, {})
    drawn = draw({})
    if comm.size > 1 and comm.rank == 0:
        with pytest.warns(RandomStreamWarning):
            restore_rng(states, MPI.COMM_SELF)
        assert not set(drawn) & set(draw({}))


@pytest.mark.mpi
def test_where_warnings_are_errors_nothing_changes(comm):
    generators = seed_all(comm.rank)
    states = [capture_rng(**generators)] * (comm.size + 1)
    draw(generators)
    before = standing(generators)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RandomStreamWarning):
            restore_rng(states, comm, **generators)
    assert standing(generators) == before


def test_torch_may_be_saved_and_not_imported_later(torch, monkeypatch):
    generators = seed_all(0)
    states = [capture_rng(**generators)]
    torch_after = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        expected = draw(generators)
        restore_rng(states, MPI.COMM_SELF, **generators)
        assert draw(generators) == expected
    assert torch.equal(torch.get_rng_state(), torch_after)


def test_torch_may_be_imported_and_not_saved(torch, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        states = [capture_rng()]
    assert states[0]["torch"] is None
    before = torch.get_rng_state()
    restore_rng(states, MPI.COMM_SELF)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.warns(RandomStreamWarning):
        restore_rng(states * 2, MPI.COMM_SELF)
    assert not torch.equal(torch.get_rng_state(), before)


class Devices:
    """Stands in for torch.cuda with generators of the CPU; shows what is called, not that CUDA."""

    def __init__(self, torch, number, current=0):
        self.current = current
        self.generators = [torch.Generator("cpu").manual_seed(index) for index in range(number)]

    def is_initialized(self):
        return True

    def device_count(self):
        return len(self.generators)

    def current_device(self):
        return self.current

    def get_rng_state_all(self):
        return [generator.get_state() for generator in self.generators]

    def set_rng_state(self, state, device):
        self.generators[device].set_state(state)


def told_of_devices(before, after):
    if before in (0, after):
        return nullcontext()
    return warned(MPI.COMM_SELF, RandomStreamWarning, f"{before} CUDA devices .* has {after}: ")


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 2), (2, 3), (2, 0), (0, 2)])
def test_cuda_devices_go_on_by_number(torch, monkeypatch, before, after):
    make_cpu_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: make_cpu_generator("cpu"))
    monkeypatch.setattr(torch, "cuda", Devices(torch, before))
    old = torch.cuda.generators
    states = [through_json(capture_rng())]
    monkeypatch.setattr(torch, "cuda", Devices(torch, after))
    for generator in torch.cuda.generators:
        torch.rand(3, generator=generator)
    expected = [torch.rand((), generator=generator) for generator in old[:after]]
    with told_of_devices(before, after):
        restore_rng(states, MPI.COMM_SELF)
    for generator, value in zip(torch.cuda.generators, expected, strict=False):
        assert torch.rand((), generator=generator) == value


@pytest.mark.parametrize(("before", "after"), [((4, 3), (1, 0)), ((2, 0), (2, 1))])
def test_the_stream_of_the_device_in_use_follows_its_rank(torch, monkeypatch, before, after):
    make_cpu_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: make_cpu_generator("cpu"))
    monkeypatch.setattr(torch, "cuda", Devices(torch, *before))
    expected = torch.cuda.generators[before[1]]
    state = through_json(capture_rng())
    monkeypatch.setattr(torch, "cuda", Devices(torch, *after))
    with told_of_devices(before[0], after[0]):
        restore_rng([state], MPI.COMM_SELF)
    new = torch.cuda.generators[after[1]]
    assert torch.equal(torch.rand(5, generator=new), torch.rand(5, generator=expected))


def test_a_state_without_the_device_in_use_goes_on_by_number(torch, monkeypatch):
    make_cpu_generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: make_cpu_generator("cpu"))
    monkeypatch.setattr(torch, "cuda", Devices(torch, 2, 1))
    state = through_json(capture_rng())
    del state["torch"]["device"]
    monkeypatch.setattr(torch, "cuda", Devices(torch, 2, 0))
    torch.cuda.generators[0].manual_seed(7)
    restore_rng([state], MPI.COMM_SELF)
    assert [generator.initial_seed() for generator in torch.cuda.generators] == [0, 1]


@pytest.mark.parametrize("device", [2, -1, None, True])
def test_a_device_that_was_not_saved_is_refused(torch, monkeypatch, device):
    monkeypatch.setattr(torch, "cuda", Devices(torch, 2))
    state = through_json(capture_rng())
    state["torch"]["device"] = device
    with pytest.raises(CheckpointError, match=r"\['device'\] must be a whole number from 0 to 1"):
        restore_rng([state], MPI.COMM_SELF)


@pytest.mark.mpi
def test_a_device_that_fails_at_last_fails_all_ranks(comm, torch, monkeypatch):
    states = comm.allgather(capture_rng())

    def fail(_):
        raise RuntimeError("a device error")

    if is_last(comm):
        monkeypatch.setattr(torch, "set_rng_state", fail)
    with pytest.raises(RuntimeError, match="a device error"):
        restore_rng(states, comm)


@pytest.fixture
def cupy(monkeypatch):
    """Stands in for CuPy, as its documentation and source have it; it tells no state either."""
    stream = np.random.RandomState(0)

    def seed(number):
        assert type(number) is np.uint64  # as NumPy 2 would not cast an int64 to it
        stream.seed([int(number) >> 32, int(number) & 0xFFFFFFFF])

    cupy = types.ModuleType("cupy")
    cupy.is_available = lambda: True
    cupy.random = types.SimpleNamespace(seed=seed, randint=stream.randint, rand=stream.rand)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def test_cupy_begins_the_same_stream_at_both_ends(cupy):
    undisturbed = np.random.RandomState(0).rand(3)
    states = [through_json(capture_rng())]
    expected = cupy.random.rand(3)
    assert (expected != undisturbed).all()  # the price of it
    restore_rng(states, MPI.COMM_SELF)
    assert (cupy.random.rand(3) == expected).all()


def test_cupy_is_seeded_anew_on_other_ranks(cupy):
    states = [through_json(capture_rng())] * 2
    expected = []
    for _ in range(2):
        with pytest.warns(RandomStreamWarning):
            restore_rng(states, MPI.COMM_SELF)
        expected.append(cupy.random.rand())
    assert expected[0] == expected[1]


def test_cupy_without_a_device_is_let_alone(cupy):
    states = [capture_rng()]
    cupy.is_available = lambda: False
    del cupy.random
    assert capture_rng()["cupy"] is None
    restore_rng(states, MPI.COMM_SELF)
    with pytest.warns(RandomStreamWarning):
        restore_rng(states * 2, MPI.COMM_SELF)
