"""Several nodes whose ranks compute on devices have the bits of several nodes of CPUs."""

import contextlib

import numpy as np
import pytest

import shardopt.numpy
from shardopt.layout.traffic import plan_traffic
from shardopt.numpy import Parameter
from shardopt.overlap.backward import BackwardOverlap, NoOverlap
from tests.support.arena_device import fill, on_device, values_of
from tests.support.device_training import BFLOAT16, draw
from tests.support.nodes import several_nodes

pytestmark = pytest.mark.mpi(min_size=2)

SHAPES = [(9000,), (), (70, 70), (0,), (90_000,), (3, 5), (50_000,)]
BUCKET_NBYTES = 70_000  # some chunks: more buckets than can be in transit
COUNTS_WRITES = {"counts_writes": True}


@pytest.fixture
def make_nodes(comm, make_pair):
    """Return a function that makes a ``Pair`` on nodes of two ranks, or of one if that fails."""
    with contextlib.ExitStack() as stack:

        def make(dtype=np.float32, *, policy=None, **options):
            share = {"share_node": several_nodes(comm)[0], "bucket_nbytes": BUCKET_NBYTES}
            start = draw(np.random.default_rng(comm.rank), dtype, SHAPES)  # rank 0's values win
            pair = make_pair(start, policy={**share, **(policy or {})}, **options)
            stack.callback(pair.close)
            return pair

        yield make


@pytest.mark.parametrize(
    ("dtype", "max_grad_norm"), [(np.float32, None), (BFLOAT16, 0.5), (np.float16, None)]
)
def test_steps_have_the_bits_of_cpus(make_nodes, dtype, max_grad_norm):
    pair = make_nodes(dtype, max_grad_norm=max_grad_norm)
    pair.compare()
    for without in [6], [2], []:  # the buckets of the last one are not active at first
        pair.grads(without=without)
        pair.step()


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_a_narrow_wire_rounds_alike(comm, make_nodes, wire_dtype):
    pair = make_nodes(policy={"wire_dtype": wire_dtype})
    pair.grads()
    pair.step()
    place = pair.opt.core.topology.places[comm.rank]
    planned = plan_traffic(pair.opt.partition, *place, wire_dtype)
    assert (pair.opt.last_step.sent_nbytes, pair.opt.last_step.sent_messages) == planned


def test_nothing_is_sent_during_backward(make_nodes, monkeypatch):
    monkeypatch.setattr(shardopt.numpy._NumpyAdapter, "reports_grads", True)
    pair = make_nodes()
    assert isinstance(pair.opt.core.parts.overlap, NoOverlap)
    assert isinstance(pair.reference.core.parts.overlap, BackwardOverlap)


def test_averages_reach_all_gradients(make_nodes):
    pair = make_nodes(max_grad_norm=0.5)
    for without in [2], [], [2]:
        pair.grads(without=without)
        pair.both(lambda opt: opt.average_grads())
        for param, other in zip(pair.params, pair.others, strict=True):
            assert (param.grad is None) == (other.grad is None)
            if other.grad is not None:
                assert values_of(param.grad).tobytes() == other.grad.tobytes()
        pair.step()


def test_what_users_write_and_replace_reaches_all_nodes(comm, make_nodes):
    pair = make_nodes(device=COUNTS_WRITES, policy={"check_finite": True})
    for step in range(3):
        pair.grads(without=[4])
        pair.write(lambda values: values + 1, which=[0, 4])  # of which one is not updated
        if comm.rank == comm.size - 1:
            replaced = pair.draw(pair.others[2])
            pair.params[2].data, pair.others[2].data = on_device(replaced), replaced.copy()
            if step == 1:
                fill(pair.params[0].grad, np.inf)
                pair.others[0].grad[...] = np.inf
        pair.step()
        assert pair.opt.last_step.skipped == (step == 1)


def test_groups_come_later(make_nodes):
    pair = make_nodes()
    later = draw(np.random.default_rng(1), np.float32, [(30_000,), (7,)])
    pair.grads()
    pair.step()
    new, others = [Parameter(on_device(each)) for each in later], [*map(Parameter, later)]
    pair.opt.add_param_group({"params": new})
    pair.reference.add_param_group({"params": others})
    pair.params, pair.others = [*pair.params, *new], [*pair.others, *others]
    pair.grads()
    pair.step()


def test_parameters_of_one_rank_reach_all_nodes(comm, make_nodes):
    pair = make_nodes()
    loaded = draw(np.random.default_rng(2), np.float32, SHAPES)
    pair.grads()
    pair.step()
    if comm.rank == 1:
        pair.write(lambda values: values + 1)
    pair.both(lambda opt: opt.adopt(1))
    pair.compare()
    pair.grads()
    pair.step()
    names = [param.spec.name for param in pair.opt.partition.params]
    pair.both(lambda opt: opt.load_params(dict(zip(names, loaded, strict=True))))
    pair.compare()
