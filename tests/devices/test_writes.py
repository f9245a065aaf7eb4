"""Writes to parameters on devices hold in the next step, whether frameworks count them or not."""

import warnings

import numpy as np
import pytest

from shardopt.errors import DivergedWarning, RankMismatchError
from tests.support.arena_device import change, values_of
from tests.support.device_training import draw, up_to_two_ranks

pytestmark = [pytest.mark.mpi, up_to_two_ranks]

FROZEN = (3, 5)


@pytest.fixture(params=[False, True], ids=["unseen", "counted"])
def pair(request, make_pair):
    start = draw(np.random.default_rng(0))
    pair = make_pair(start, device={"counts_writes": request.param}, max_grad_norm=0.5)
    pair.is_counted = request.param
    pair.grads(without=FROZEN)
    pair.step()
    yield pair
    pair.close()


def test_what_all_ranks_write_holds(pair):
    for step in range(3):
        pair.grads(without=FROZEN)
        pair.write(lambda values, step=step: values * values.dtype.type(0.5 + step), [0, 1, 3])
        pair.step()
    pair.grads()  # frozen ones, too
    pair.step()


def test_parameters_may_be_clamped_after_every_step(pair):
    for _ in range(3):
        pair.grads(without=FROZEN)
        pair.step()
        pair.write(lambda values: np.clip(values, -0.5, 0.5))
        pair.compare()


def test_writes_hold_in_steps_that_update_nothing(pair):
    pair.grads()
    pair.write(lambda values: values + values.dtype.type(1))
    pair.step(overflowed=True)
    pair.grads(without=range(6))
    pair.write(lambda values: values + values.dtype.type(1), [0, 3])
    pair.both(lambda opt: opt.step())  # warns
    pair.compare()
    pair.grads()
    pair.step()


def test_writes_hold_although_groups_are_edited_after_them(pair):
    pair.grads(without=FROZEN)
    pair.write(lambda values: values * values.dtype.type(0.5), [0, 2, 3])
    for opt, params in ((pair.opt, pair.params), (pair.reference, pair.others)):
        opt.param_groups[0]["params"].remove(params.pop(1))
    pair.step()
    pair.grads()
    pair.step()


def test_owners_have_the_last_word_on_different_values(pair):
    pair.grads(without=FROZEN)
    pair.write(lambda values: values + values.dtype.type(pair.comm.rank + 1), [0, 3])
    pair.opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergedWarning)
        pair.reference.step()
    trained, frozen = (
        values_of(pair.params[index].data).tobytes() == pair.others[index].data.tobytes()
        for index in (0, 3)
    )
    assert trained
    assert frozen or not pair.is_counted  # then each rank keeps its own


def test_a_write_on_one_rank_is_refused_or_its_owner_has_the_last_word(pair):
    before = values_of(pair.params[0].data)
    pair.grads(without=FROZEN)
    if pair.comm.rank == pair.comm.size - 1:
        change(pair.params[0].data, lambda values: values + values.dtype.type(1))
    if pair.is_counted and pair.comm.size > 1:
        with pytest.raises(RankMismatchError, match="a write to parameter 'param0' on rank"):
            pair.opt.step()
        return
    pair.opt.step()
    after = values_of(pair.params[0].data)
    everyone = pair.comm.allgather(after.tobytes())
    assert set(everyone) == {everyone[0]}
    moved = np.abs(after - before) > 0.5
    owned = owned_by_last(pair, 0)
    assert moved.any() == owned.any()
    assert not moved[~owned].any()


def owned_by_last(pair, index):
    """Return which elements of a parameter the last rank owns."""
    partition, rank = pair.opt.partition, pair.comm.size - 1
    owned = np.zeros(partition.params[index].numel, bool)
    for region in range(len(partition.regions)):
        for other, span, _ in partition.owned_params(partition.shards(0, rank, region)):
            if other == index:
                owned[span.slice] = True
    return owned


def test_writes_are_saved(pair):
    """A save brings home what owners have, as often as there are saves."""
    for _ in range(2):
        pair.write(lambda values: values * values.dtype.type(0.5))
        parts = pair.opt.core.parts
        changes = pair.opt.core.params.find_changes()
        pair.opt.core.enter_call("save()", {})
        pair.opt.core.settle(changes)
        parts.residence.bring_home(params=True, state=False)
        parts.meet(1, "save()")
        for binding, other in zip(parts.registry.bindings, pair.others, strict=True):
            assert binding.data.tobytes() == other.data.tobytes()
        parts.meet(1, "save()")
