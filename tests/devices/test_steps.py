"""Steps on devices give the bits of steps on CPUs, whichever way gradients and parameters take."""

import math
import warnings

import numpy as np
import pytest

from shardopt.errors import PartitionError
from tests.support.arena_device import change, fill, on_device, values_of
from tests.support.device_training import BFLOAT16, draw, up_to_three_ranks

pytestmark = pytest.mark.mpi


@pytest.fixture
def pair(make_pair):
    pair = make_pair(draw(np.random.default_rng(0)), max_grad_norm=0.5)
    yield pair
    pair.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16, np.float16])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_steps_have_the_bits_of_the_cpu(make_pair, dtype, max_grad_norm):
    pair = make_pair(draw(np.random.default_rng(0), dtype), max_grad_norm=max_grad_norm)
    for step in range(4):
        pair.grads(without=[3] if step == 2 else [])  # nobody has this gradient
        pair.step()
    pair.close()


@up_to_three_ranks
def test_loss_scales_may_differ_between_ranks(pair):
    for _ in range(2):
        pair.grads()
        pair.step(loss_scale=2.0 ** (pair.comm.rank + 1))


@up_to_three_ranks
def test_an_overflow_on_one_rank_skips_the_step(pair):
    for step in range(3):
        pair.grads()
        pair.step(overflowed=step == 1 and pair.comm.rank == pair.comm.size - 1)
        assert pair.opt.last_step.skipped == (step == 1)


@up_to_three_ranks
def test_steps_with_nan_are_skipped(make_pair):
    pair = make_pair(draw(np.random.default_rng(0), BFLOAT16), policy={"check_finite": True})
    for step in range(3):
        pair.grads()
        if step == 1 and pair.comm.rank == 0:
            for param, other in zip(pair.params, pair.others, strict=True):
                fill(param.grad, math.nan)
                other.grad[...] = math.nan
        told = pair.step()
        assert ("skipped on all ranks" in "".join(told)) == (step == 1 and pair.comm.rank == 0)
    pair.close()


@up_to_three_ranks
@pytest.mark.parametrize("is_late", [False, True])
def test_poisoned_parameters_are_reported(make_pair, is_late):
    pair = make_pair(draw(np.random.default_rng(0)), device={"is_late": is_late})
    for step in range(1, 4):
        pair.grads()
        if step == 2:
            fill(pair.params[3].grad, math.nan)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pair.opt.step()
        is_told = step == (3 if is_late and pair.way != "offload" else 2)
        assert len(told) == (is_told and pair.comm.rank == 0)
        assert (pair.opt.last_step.poisoned_since == step) == is_told
    assert pair.opt.last_step.poisoned_param == "param3"
    pair.close()


@up_to_three_ranks
def test_gradients_may_be_none_on_some_ranks(pair):
    for step in range(3):
        pair.grads(without=[pair.comm.rank, 3] if step else [0, 1, 2, 3, 4, 5])
        pair.both(lambda opt: opt.step())
        pair.compare()
        pair.opt.zero_grad(set_to_none=step == 1)
        pair.reference.zero_grad(set_to_none=step == 1)


@up_to_three_ranks
def test_gradients_may_be_other_arrays(pair):
    for step in range(4):
        pair.grads()
        for param, other in zip(pair.params[step:], pair.others[step:], strict=True):
            grad = pair.draw(other)
            param.grad, other.grad = on_device(grad), grad
        if step == 2:  # a view of what another parameter's gradient is copied to
            pair.params[5].grad = pair.params[0].grad[:5000]
            pair.others[5].grad = pair.others[0].grad[:5000]
        if step == 3:
            pair.params[5].grad = pair.others[5].grad = pair.draw(pair.others[5])  # on the host
        pair.step()


@up_to_three_ranks
@pytest.mark.parametrize("what", ["grad", "data"])
@pytest.mark.parametrize("wrong", [(9000, 1)])
def test_arrays_of_another_shape_are_refused_on_all_ranks(pair, what, wrong):
    pair.grads()
    kept = [(getattr(each, what)) for each in (pair.params[0], pair.others[0])]
    if pair.comm.rank == pair.comm.size - 1:
        setattr(pair.params[0], what, on_device(np.zeros(wrong, np.float32)))
        setattr(pair.others[0], what, np.zeros(wrong, np.float32))
    (kind, text), _ = pair.both(lambda opt: opt.step())
    assert kind is PartitionError
    assert f"{what} of parameter 'param0' must keep shape (9000,)" in text
    for each, array in zip((pair.params[0], pair.others[0]), kept, strict=True):
        setattr(each, what, array)
    pair.step()


@up_to_three_ranks
def test_the_lowest_rank_that_replaces_a_parameter_wins(pair):
    for step in range(4):
        pair.grads(without=[5])
        for index in (0, 3, 5):
            value = pair.draw(pair.others[index])
            if pair.comm.rank >= step - 1:
                on_host = step == 3 and index == 0
                pair.params[index].data = value.copy() if on_host else on_device(value)
                pair.others[index].data = value
        pair.step()
    pair.grads()
    pair.step()


@up_to_three_ranks
def test_averaged_gradients_may_be_changed(pair):
    for step in range(3):
        pair.grads(without=[pair.comm.rank])
        pair.both(lambda opt: opt.average_grads(loss_scale=4.0))
        for param, other in zip(pair.params, pair.others, strict=True):
            if other.grad is None:
                assert param.grad is None
                continue
            assert values_of(param.grad).tobytes() == other.grad.tobytes()
            if step:
                change(param.grad, lambda values: values * values.dtype.type(0.25))
                other.grad *= other.grad.dtype.type(0.25)
        pair.both(lambda opt: opt.average_grads(loss_scale=4.0))
        pair.step()


@up_to_three_ranks
def test_gradients_are_accumulated(pair):
    pair.grads()
    for _ in range(2):
        for param, other in zip(pair.params, pair.others, strict=True):
            grad = pair.draw(other)
            change(param.grad, lambda values, grad=grad: values + grad)
            other.grad += grad
    pair.step()
    pair.both(lambda opt: opt.zero_grad(set_to_none=True))
    assert all(param.grad is None for param in pair.params)
    pair.both(lambda opt: opt.step())  # warns: there are no gradients
    pair.compare()
    pair.both(lambda opt: opt.zero_grad())
    pair.grads(zero=False)
    pair.step()


@up_to_three_ranks
def test_closures_are_called_before_the_step(pair):
    losses = []

    def closure():
        losses.append(len(losses))
        pair.grads()
        return 1.5

    pair.grads(zero=False)
    assert pair.opt.step(closure) == 1.5
    for param, other in zip(pair.params, pair.others, strict=True):
        other.grad[...] = values_of(param.grad)
    assert losses == [0]
