"""JAX hands all gradients over in the step, and trains in stage 2 to the bits of stage 1."""

import numpy as np
import pytest

from shardopt.errors import (
    HyperparamsError,
    PartitionError,
    RankMismatchError,
)
from shardopt.policy import ShardPolicy
from tests.support.errors import BOTH_WAYS, errs, is_last, refused

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, jax, jnp
    import jax
    import jax.numpy as jnp

    from shardopt.jax import NAdam


SMALL = {"bucket_nbytes": 1, "ring_nbytes": 1}  # a chunk in each bucket, two buckets of each rank
SHAPES = {"a": (40, 120), "b": (33, 70), "c": (), "d": (9000,), "e": (0, 3), "f": (70,)}


def policy(stage, **settings):
    if stage == 1:
        settings.pop("ring_nbytes", None)
    return ShardPolicy(stage=stage, timeout_s=20, threads=1, **settings)


def draw(step, rank, dtype="float32"):
    """Return a tree like the parameters; its arrays are NumPy's, for which JAX compiles nothing."""
    rng, dtype = np.random.default_rng([step, rank]), jnp.dtype(dtype)
    return {
        name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()
    }


def grads_of(comm, step, dtype="float32"):
    """Return gradients: in the second step the last rank has none, in the third some lack some."""
    if step == 1 and is_last(comm) and comm.size > 1:
        return dict.fromkeys(SHAPES)
    grads = draw(step, comm.rank, dtype)
    if step == 2:
        grads = {**grads, "a": None, **({"d": None} if is_last(comm) else {})}
    return grads


def run(comm, stage, settings, dtype="float32", **arguments):
    """Train; return the bytes of all parameters and of the state, and the norms."""
    norms = []
    chosen = policy(stage, **settings)
    params = draw(99, 0, dtype)
    with NAdam(params, lr=0.1, comm=comm, policy=chosen, **arguments) as opt:
        for step in range(4):
            params = opt.step(grads_of(comm, step, dtype))
            norms.append(opt.last_step.grad_norm)
        state = comm.bcast(opt.gather_state_dict())["state"]
    moments = [np.asarray(entry["exp_avg"]).tobytes() for entry in state.values()]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)], moments, norms


@pytest.mark.parametrize("share", [True, False], ids=["one node", "nodes"])
@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (SMALL, {}),
        (SMALL, {"max_grad_norm": 0.5}),
        ({"check_finite": True}, {"max_grad_norm": 0.5}),
        ({**SMALL, "optim_bits": 8}, {}),
    ],
    ids=["plain", "clipped", "checked", "8 bits"],
)
def test_bits_are_those_of_stage_one(comm, share, settings, arguments):
    settings = {"share_node": share, **settings}
    assert run(comm, 2, settings, **arguments) == run(comm, 1, settings, **arguments)


@pytest.mark.parametrize("share", [True, False], ids=["one node", "nodes"])
@pytest.mark.parametrize("settings", [{}, {"master_weights": False, "optim_bits": 8}])
def test_bits_of_sixteen_bits(comm, share, settings):
    settings, dtype = {**SMALL, **settings, "share_node": share}, "bfloat16"
    ours, theirs = (run(comm, stage, settings, dtype, max_grad_norm=0.5) for stage in (2, 1))
    assert ours == theirs


def test_sums_by_node_are_those_of_every_exchange(comm):
    """A step has one gradient of each leaf."""
    if comm.size == 1:
        return
    settings = {**SMALL, "share_node": False}
    by_node = run(comm, 2, {**settings, "accumulate": "node"}, max_grad_norm=0.5)
    assert by_node == run(comm, 2, settings, max_grad_norm=0.5)


@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
@pytest.mark.parametrize("share", [True, False], ids=["one node", "nodes"])
def test_a_step_without_any_gradient_forgets_the_last_one(comm, share):
    chosen = policy(2, share_node=share)
    with NAdam(draw(99, 0), comm=comm, max_grad_norm=1.0, policy=chosen) as opt:
        opt.step(draw(0, comm.rank))
        before = opt.params
        params = opt.step(dict.fromkeys(SHAPES))
        assert opt.last_step.grad_norm == 0.0
        jax.tree.map(np.testing.assert_array_equal, params, before)


def test_gradients_that_were_missing_come_back_in_one_round(comm):
    """A step has one gradient of each leaf, so that it sends each bucket once."""
    if comm.size == 1:
        return
    sent = []
    with NAdam(draw(99, 0), comm=comm, policy=policy(2, share_node=False, **SMALL)) as opt:
        for step in range(4):
            opt.step(grads_of(comm, step))
            sent.append(opt.last_step.sent_messages)
    assert sent[3] == sent[0]


def test_skipped_steps_leave_nothing_behind(comm):
    def train(stage):
        chosen = policy(stage, check_finite=True, **SMALL)
        with NAdam(draw(99, 0), comm=comm, policy=chosen) as opt:
            for step in range(3):
                grads = draw(step, comm.rank)
                if step == 1 and is_last(comm):
                    grads["d"][7] = np.inf
                opt.step(grads, overflowed=step == 0 and is_last(comm))
            return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(opt.params)]

    assert train(2) == train(1)


@BOTH_WAYS
def test_an_error_leaves_nothing_behind(comm, alone):
    def train(stage):
        with NAdam(draw(99, 0), comm=comm, policy=policy(stage, **SMALL)) as opt:
            opt.step(draw(0, comm.rank))
            wrong = {**draw(1, comm.rank), "d": jnp.zeros(8)}
            with refused(comm, PartitionError, "grad of parameter \"['d']\"", alone=alone):
                opt.step(wrong if errs(comm, alone) else draw(1, comm.rank))
            opt.step(draw(2, comm.rank))
            return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(opt.params)]

    assert train(2) == train(1)


def test_loss_scales_must_be_the_same(comm):
    with NAdam(draw(99, 0), comm=comm, policy=policy(2)) as opt:
        opt.step(draw(0, comm.rank), loss_scale=4.0)
        if comm.size > 1:
            with pytest.raises(RankMismatchError, match="loss_scale must be the same"):
                opt.step(draw(1, comm.rank), loss_scale=1.0 + comm.rank)
        opt.step(draw(2, comm.rank), loss_scale=2.0)
        assert opt.last_step.step == 2


def test_optax_takes_it(comm, make):
    import optax

    results = []
    for stage in (2, 1):
        tx = make(policy=policy(stage, share_node=False, **SMALL))
        params = draw(99, 0)
        state = tx.init(params)
        for step in range(3):
            grads = jax.tree.map(jnp.asarray, draw(step, comm.rank))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)])
    assert results[0] == results[1]


def test_a_node_has_one_row(comm):
    reports = []
    for stage in (1, 2):
        with NAdam(draw(99, 0), comm=comm, policy=policy(stage)) as opt:
            opt.step(draw(0, comm.rank))
            reports.append(opt.memory_report())
    rows, one = reports
    assert one.grads_node_nbytes * comm.size == rows.grads_node_nbytes
    assert one.ring_node_nbytes > one.late_node_nbytes == 0  # they are JAX's until the step ends
    saved = (comm.size - 1) * one.grads_node_nbytes
    assert one.node_nbytes - one.ring_node_nbytes + saved == rows.node_nbytes


def test_what_is_refused(comm):
    params = {"w": jnp.zeros(5)}
    chosen = ShardPolicy(stage=2, update_in_backward=True)
    with pytest.raises(HyperparamsError, match="with a framework that does not report"):
        NAdam(params, comm=comm, policy=chosen)
