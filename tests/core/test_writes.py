"""What all ranks write to their weights between steps has the effect that it has on replicas."""

import io
import itertools

import numpy as np
import pytest

from shardopt.checkpoint import Checkpointer, load, save
from shardopt.errors import NoGradientWarning, NonFiniteWarning
from tests.support.errors import warned
from tests.support.replicas import (
    DTYPES,
    Replicas,
    assert_equal_on_all_ranks,
    share,
    tracking,
    values_of,
    way,
)

__all__ = ["share", "way"]  # fixtures

pytestmark = pytest.mark.mpi


def clamp(array, index):
    np.clip(array, -0.5, 0.5, out=array)


def prune(array, index):
    mask = np.random.default_rng(index).integers(0, 2, array.shape)
    array *= mask.astype(array.dtype)


def rescale(array, index):
    """As spectral norms do; the same on all ranks, as it depends on the values alone."""
    largest = np.abs(array).max(initial=0)
    if largest > 0:
        array /= largest


def add_noise(array, index):
    """The same on all ranks, as their seeds are."""
    noise = np.random.default_rng([7, index]).standard_normal(array.shape)
    array += noise.astype(array.dtype) * array.dtype.type(0.125)


def reinitialise(array, index):
    np.copyto(array, np.random.default_rng([8, index]).standard_normal(array.shape))


def read_from_file(array, index):
    content = np.full(array.shape, 0.25, array.dtype).tobytes()
    if content:
        assert io.BytesIO(content).readinto(array.reshape(-1).view(np.uint8)) == len(content)


def write_an_element(array, index):
    if array.size:
        array.reshape(-1)[array.size // 2] = 3


def write_some(array, index):
    if index % 2:
        array[...] = -1


KINDS = [
    clamp,
    prune,
    rescale,
    add_noise,
    reinitialise,
    read_from_file,
    write_an_element,
    write_some,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("error::shardopt.errors.DivergedWarning")
def test_writes_after_every_step(comm, share, kind, dtype):
    with Replicas(comm, share, values_of(dtype), weight_decay=0.01) as model:
        for _ in range(4):
            model.step()
            model.write(kind)
            assert not model.opt.last_step.diverged
        model.step()


@pytest.mark.parametrize("kind", [clamp, write_an_element, write_some])
def test_writes_are_found_in_every_way(comm, share, way, kind):
    with Replicas(comm, share, values_of()) as model:
        for _ in range(4):
            model.step()
            model.write(kind)
        for _ in range(3):  # what was written once is not written for ever
            model.step()


def test_pages_written_again_and_again_are_kept_and_given_back(comm, share, way):
    with Replicas(comm, share, values_of()) as model:
        kept = []
        for number in range(30):
            model.step()
            kept.append(model.kept_nbytes)
            if number < 6 or 20 < number < 26:
                model.write(clamp)
        if not tracking(way).sees_writes:
            assert not any(kept)  # nobody knows whether it was written
            return
        assert kept[0] == kept[1] == 0
        assert all(kept[2:14])
        assert not any(kept[15:22])  # the last write was before step 6, eight steps are equal
        assert all(kept[23:])


def test_kept_pages_show_what_others_write(comm, share, way):
    """Also where the rank itself stops writing while its pages are kept."""
    with Replicas(comm, share, values_of()) as model:
        for number in range(14):
            model.step(absent=range(3) if number % 2 else ())
            if number < 4 or number == 9:
                model.write(write_an_element if number % 3 else clamp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_that_the_step_does_not_update(comm, share, dtype):
    with Replicas(comm, share, values_of(dtype)) as model:
        for absent in ([0, 4], range(6), [5], []):
            model.write(add_noise)
            if len(absent) == 6:
                with warned(comm, NoGradientWarning):
                    model.step(absent)
            else:
                model.step(absent)


def test_skipped_steps_take_over_what_was_written(comm, share, way):
    with Replicas(comm, share, values_of(), check_finite=True) as model:
        model.step()
        model.write(clamp)
        with warned(comm, NonFiniteWarning):
            model.step(spoiled=True)
        model.write(add_noise)
        model.step(spoiled=True)
        model.step()


def test_what_was_written_last_is_saved(comm, share, mpi_tmp_path):
    with (
        Replicas(comm, share, values_of()) as model,
        Replicas(comm, share, values_of(seed=3)) as other,
    ):
        model.step()
        model.write(add_noise)
        save(mpi_tmp_path / "saved", model.opt)
        model.assert_same()
        other.write(clamp)  # which a load replaces
        load(mpi_tmp_path / "saved", other.opt)
        other.oracle, other.num_steps = model.oracle, model.num_steps
        other.assert_same()
        model.write(clamp)
        with Checkpointer(mpi_tmp_path / "run") as checkpointer:
            checkpointer.save(1, model.opt)
        model.assert_same()
        Checkpointer(mpi_tmp_path / "run").restore(other.opt)
        other.assert_same()
        other.step()


def test_what_was_written_stays_through_other_calls(comm, share):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        model.write(add_noise)
        state = model.opt.gather_state_dict()
        model.assert_same()
        model.write(clamp)
        model.opt.load_state_dict(state)
        model.assert_same()
        model.step()
        model.write(clamp)
        model.assert_same()
    model.assert_same()  # after close()


def test_parameters_of_several_groups_and_dtypes(comm, share, way):
    values = [value for seed, dtype in enumerate(DTYPES) for value in values_of(dtype, seed=seed)]
    with Replicas(comm, share, values) as model:
        for kind in (clamp, add_noise, write_an_element, write_some):
            model.step()
            model.write(kind)
        model.step()


def test_only_the_written_one_of_two_on_a_page(comm, share, way):
    with Replicas(comm, share, values_of(shapes=[(3,), (5,), (7,)])) as model:
        model.step()
        model.write(lambda array, index: array.fill(2) if index == 1 else None)
        found = model.opt.core.params.find_changes().written
        assert [each.param for each in found] == [1]
        model.step()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_master_follows_the_elements_that_were_written(comm, share, dtype):
    with Replicas(comm, share, values_of(dtype), lr=1e-3) as model:
        for _ in range(3):
            model.step()
        masters = [master.copy() for master in model.oracle.masters]
        model.write(write_an_element)
        model.follow()
        changed = [(a != b).sum() for a, b in zip(masters, model.oracle.masters, strict=True)]
        assert changed == [min(1, master.size) for master in masters]
        for _ in range(3):
            model.step()
        state = model.opt.gather_state_dict()
    for index, master in enumerate(model.oracle.masters):
        if state is not None:
            np.testing.assert_array_equal(state["state"][index]["master"], master)


# -- replaced tensors ------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("first", [0, 1])
def test_a_replaced_tensor_wins_over_writes_and_of_several_the_lowest_ranks(comm, share, first):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        for index, param in enumerate(model.params):
            if comm.rank >= first:
                param.data = np.full_like(param.data, 10 + comm.rank)
            elif index == 5:
                param.data[...] = -comm.rank - 1  # on some ranks only
        model.expect(lambda array, index: array.fill(10 + first))
        model.step()
        model.step()


def test_some_are_replaced_and_others_written(comm, share):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        for index, param in enumerate(model.params):
            if index % 2:
                param.data = np.full_like(param.data, 4)
            else:
                param.data[...] = 5
        model.expect(lambda array, index: array.fill(4 if index % 2 else 5))
        model.step()


# -- the state -------------------------------------------------------------------------------------


def own_state(model, key):
    return model.opt.core.parts.memory.state.own_arrays(0)[key]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_written_in_place_is_used(comm, share, way, key):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        own_state(model, key)[...] *= 0.25
        getattr(model.oracle, key)[:] = [array * 0.25 for array in getattr(model.oracle, key)]
        model.step()
        model.step()
        state = model.opt.gather_state_dict()
    for index, expected in enumerate(getattr(model.oracle, key)):
        if state is not None:
            np.testing.assert_array_equal(state["state"][index][key], expected)


@pytest.mark.parametrize("absent", [(), range(6)])
@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
def test_a_written_master_writes_its_parameter(comm, share, absent):
    with Replicas(comm, share, values_of("bfloat16"), lr=1e-3) as model:
        model.step()
        own_state(model, "master")[...] *= 3
        oracle = model.oracle
        oracle.masters = [master * np.float32(3) for master in oracle.masters]
        oracle.params = [master.astype("bfloat16") for master in oracle.masters]
        model.step(absent)
        model.step()


# -- anything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
def test_any_sequence_of_writes_replacements_saves_and_steps(comm, share, seed):
    rng = np.random.default_rng([9, seed])
    shapes = [tuple(rng.integers(0, 90, rng.integers(0, 3))) for _ in range(rng.integers(1, 9))]
    dtype, numbers = DTYPES[seed % len(DTYPES)], itertools.count()
    with Replicas(comm, share, values_of(dtype, [*shapes, (5000,)], seed)) as model:

        def some(array, index):
            """Write to some elements of some parameters."""
            draws = np.random.default_rng([seed, number, index])
            if array.size and draws.integers(2):
                start, stop = sorted(draws.integers(0, array.size + 1, 2))
                array.reshape(-1)[start:stop] = draws.integers(-3, 3)

        def replace(index):
            new = np.random.default_rng([seed, number]).integers(
                -3, 3, model.params[index].data.shape
            )
            if comm.rank % 2 == 0:
                model.params[index].data = new.astype(dtype)
            model.expect(lambda array, i: np.copyto(array, new) if i == index else None)

        for _ in range(25):
            number = next(numbers)
            action = rng.integers(6)
            if action < 2:
                model.write(some)
            elif action == 2:
                replace(int(rng.integers(len(model.params))))
                model.step()
            elif action == 3:
                model.opt.gather_state_dict()
                model.assert_same()
            else:
                model.step(absent=set(rng.integers(0, len(model.params), 2).tolist()))
        assert_equal_on_all_ranks(comm, [param.data for param in model.params])
