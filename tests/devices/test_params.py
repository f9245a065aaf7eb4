"""Parameters on devices come, leave, are loaded and refused as those on CPUs are."""

import gc

import numpy as np
import pytest

from shardopt.backends.base import address_of
from shardopt.errors import PartitionError
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import on_device, values_of
from tests.support.device_training import BFLOAT16, devices_of, draw, policy_of, up_to_two_ranks

pytestmark = [pytest.mark.mpi, up_to_two_ranks]


@pytest.fixture
def start():
    return draw(np.random.default_rng(0))


@pytest.fixture
def pair(make_pair, start):
    pair = make_pair(start, max_grad_norm=0.5)
    pair.grads()
    pair.step()
    yield pair
    pair.close()


def add(pair, dtype, **options):
    """Add a group of two parameters, one of which has a gradient already."""
    for params, make in ((pair.params, on_device), (pair.others, np.array)):
        rng = np.random.default_rng(5)
        new = [Parameter(make(value)) for value in draw(rng, dtype, [(6000,), (40, 40)])]
        new[0].grad = make(draw(rng, dtype, [(6000,)])[0])
        opt = pair.opt if params is pair.params else pair.reference
        opt.add_param_group({"params": new, **options})
        params += new


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_groups_are_added(pair, dtype):
    add(pair, dtype, lr=0.3)
    pair.grads(zero=False)
    pair.step()
    pair.grads(without=[6])
    pair.step()


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_parameters_leave_with_memory_of_their_own(make_pair, dtype):
    pair = make_pair(draw(np.random.default_rng(0), dtype), max_grad_norm=0.5)
    pair.grads()
    pair.step()
    gone = pair.params.pop(3), pair.others.pop(3)
    for opt, param in zip((pair.opt, pair.reference), gone, strict=True):
        opt.param_groups[0]["params"].remove(param)
        opt.param_groups[0]["lr"] = 0.05
    for _ in range(2):  # what is left of the gradient must not count in the norm
        pair.grads()
        pair.step()
    kept = values_of(gone[0].data)
    assert kept.tobytes() == gone[1].data.tobytes()
    first, last = address_of(pair.params[0].data), address_of(pair.params[-1].data)
    assert not first <= address_of(gone[0].data) <= last
    assert values_of(gone[0].grad).tobytes() == gone[1].grad.tobytes()
    for params, each, opt in (
        (pair.params, gone[0], pair.opt),
        (pair.others, gone[1], pair.reference),
    ):
        opt.param_groups[0]["params"].append(each)  # and comes back
        params.append(each)
    for opt in (pair.opt, pair.reference):  # before it is taken over
        opt.zero_grad(set_to_none=True)
        opt.zero_grad()
    for _ in range(2):
        pair.both(lambda opt: opt.average_grads())  # takes it over
        pair.grads()
        pair.step()
    pair.close()


def test_values_are_loaded(pair, start):
    for kind in (np.array, on_device):
        host = {f"param{i}": pair.draw(each, pair.same) for i, each in enumerate(start)}
        device = {name: kind(value) for name, value in host.items()}
        is_first = pair.comm.rank == 0
        left = pair.opt.load_params({**device, "buffer": 1} if is_first else None)
        assert left == ["buffer"]
        pair.reference.load_params(host if is_first else None)
        pair.compare()
        pair.grads()
        pair.step()


def test_values_of_16_bits_are_loaded(make_pair, start):
    pair = make_pair([value.astype(BFLOAT16) for value in start])
    values = {f"param{i}": pair.draw(each, pair.same) for i, each in enumerate(pair.others)}
    is_first = pair.comm.rank == 0
    for opt in (pair.opt, pair.reference):
        opt.load_params(values if is_first else None)  # sent to the others
    for index, other in enumerate(pair.others):
        assert other.data.tobytes() == values[f"param{index}"].tobytes()
    pair.compare()
    pair.close()


def test_the_values_of_one_rank_are_adopted(pair):
    pair.write(lambda values: values + pair.comm.rank)
    value = pair.draw(pair.others[0])
    pair.params[0].data, pair.others[0].data = on_device(value), value
    pair.both(lambda opt: opt.adopt(rank=pair.comm.size - 1))
    pair.compare()
    pair.grads()
    pair.step()


def test_close_leaves_the_parameters_and_nothing_else(make_pair, start):
    pair = make_pair([value.astype(BFLOAT16) for value in start], max_grad_norm=0.5)
    add(pair, np.float32)
    pair.grads()
    pair.step()
    params_nbytes = sum(
        region.numel * {"bfloat16": 2, "float32": 4}[region.dtype]
        for region in pair.opt.partition.regions
    )
    pair.close()
    gc.collect()
    pair.compare()
    assert all(param.grad is None for param in pair.params)
    assert params_nbytes <= pair.device.nbytes < 1.1 * params_nbytes + 4 * 4096
    pair.params, pair.opt = (), None
    gc.collect()
    assert pair.device.nbytes == 0


def test_two_optimizers_share_the_device(make_pair, start):
    pairs = [make_pair(start, max_grad_norm=0.5), make_pair(start[::-1], lr=0.2)]
    for pair in (*pairs, *pairs):
        pair.grads()
        pair.step()
    with pairs[0].opt, pairs[0].reference:
        pairs[0].grads()
        pairs[0].step()
    pairs[1].grads()
    pairs[1].step()
    pairs[1].close()


@pytest.fixture
def make_device_opt(comm, monkeypatch, way):
    """Return a function that makes an optimizer whose device may be refused."""

    def make(params, **options):
        with devices_of(monkeypatch, way):
            return NAdam(params, comm=comm, policy=policy_of(way), **options)

    return make


def test_devices_may_not_be_mixed(comm, make_device_opt):
    host, device = Parameter(np.ones(5)), Parameter(on_device(np.ones(5)))
    with pytest.raises(PartitionError, match="'param1' must be on cuda:0.*; got cpu. Move it"):
        make_device_opt([device, host])
    with pytest.raises(PartitionError, match="'param1' must be on cpu.*; got cuda:0"):
        make_device_opt([host, device])
    if comm.size > 1:
        mine = device if comm.rank else host
        with pytest.raises(PartitionError, match="'param0' must be on cpu, as .* other ranks are"):
            make_device_opt([mine])
    with make_device_opt([Parameter(on_device(np.ones(5)))]) as opt:
        with pytest.raises(PartitionError, match="'param1' must be on cuda:0"):
            opt.add_param_group({"params": [host]})
        opt.param_groups[0]["params"].append(host)
        with pytest.raises(PartitionError, match="'param1' must be on cuda:0"):
            opt.step()
        opt.step()


def test_the_error_of_one_rank_is_not_taken_for_its_device(comm, make_device_opt):
    last = comm.rank == comm.size - 1
    wrong = [3.0] if last else [Parameter(on_device(np.ones(5)))]
    with pytest.raises(PartitionError, match="params must hold shardopt.numpy.Parameter"):
        make_device_opt(wrong)
    with pytest.raises(PartitionError, match="params must hold at least one parameter"):
        make_device_opt([] if last else [Parameter(on_device(np.ones(5)))])


def test_all_parameters_may_leave_and_come_back(pair):
    pair.grads()  # which leave with them
    for opt in (pair.opt, pair.reference):
        opt.param_groups[0]["params"].clear()
    pair.both(lambda opt: opt.step())
    gc.collect()
    assert pair.device.nbytes == 0
    for opt, params in ((pair.opt, pair.params), (pair.reference, pair.others)):
        opt.param_groups[0]["params"] += params
    pair.both(lambda opt: opt.step())  # warns: their state is gone
    pair.compare()
    pair.grads()
    pair.step()


def test_parameters_may_not_share_memory_but_may_interleave(make_device_opt):
    whole = on_device(np.ones((6, 8), np.float32))
    with pytest.raises(PartitionError, match="must not share memory; got 'param0' and 'param1'"):
        make_device_opt([Parameter(whole[:4]), Parameter(whole[3:])])
    params = [Parameter(whole[:, :4]), Parameter(whole[:, 4:])]
    opt = make_device_opt(params)
    with pytest.raises(PartitionError, match="must not share memory"):
        opt.add_param_group({"params": [Parameter(params[0].data[1:])]})
    opt.close()
