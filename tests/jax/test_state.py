"""The state of the optax transformation: saved, mapped, kept and gone back to, or refused."""

import copy
import pickle
import warnings
import weakref

import numpy as np
import pytest

from shardopt.errors import (
    CheckpointError,
    HyperparamsError,
    PartialStateWarning,
    PartitionError,
    RankMismatchError,
    StaleStateWarning,
)
from shardopt.policy import ShardPolicy
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global \
        as_jax, \
        assert_close, \
        assert_equal, \
        grads_of, \
        jax, \
        jnp, \
        mean_grads, \
        nadam, \
        optax, \
        start, \
        train
    from shardopt.jax import nadam
    from tests.support.jax_training import (
        as_jax,
        assert_close,
        assert_equal,
        grads_of,
        jax,
        jnp,
        mean_grads,
        optax,
        start,
        train,
    )


WAYS = {
    "mapped": lambda state: jax.tree.map(lambda leaf: leaf, state),
    "copied": lambda state: jax.tree.map(jnp.copy, state),
    "NumPy's": lambda state: jax.tree.map(np.array, state),
    "pickled": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopied": copy.deepcopy,
    "shallow": copy.copy,
    "partitioned": lambda state: jax.tree.unflatten(*reversed(jax.tree.flatten(state))),
}


def test_states_made_of_leaves_are_as_good(comm, make):
    def train_own(**settings):
        params = start("bfloat16")  # and float32
        return train(make(), lambda *at: grads_of(*at, comm.rank), params=params, **settings)

    expected = train_own()
    for through in WAYS.values():
        assert_equal(train_own(through=through, steps=5), expected)


def go_back(tx, grads_at, keep):
    """Train three steps, and two others that are then undone, and another two."""
    params, kept = start(), None
    state = tx.init(params)
    for step in range(7):
        if step == 3:
            kept = params, keep(state)
        if step == 5:
            params, state = kept
        updates, state = tx.update(grads_at(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_states_may_be_gone_back_to(comm, make):
    def grads_at(params, step):
        return grads_of(params, step, comm.rank)

    ways = [WAYS["copied"], WAYS["pickled"], lambda state: (jax.tree.leaves(state), state)[1]]
    expected = go_back(optax.nadam(0.1), lambda *at: mean_grads(*at, comm), lambda state: state)
    own = go_back(make(keep_states=True), grads_at, lambda state: state)
    assert_close(own, expected)
    for keep in ways:
        assert_equal(go_back(make(), grads_at, keep), own)


@BOTH_WAYS
@pytest.mark.filterwarnings("ignore::shardopt.errors.StaleStateWarning")
def test_states_whose_moments_are_gone_are_refused(comm, make, alone):
    tx, params = make(), start()
    first = tx.init(params)
    _, second = tx.update(params, first, params)
    kept = jax.tree.map(jnp.copy, second)
    with pytest.warns(StaleStateWarning, match="cannot be gone back to"):
        _, third = tx.update(params, second, params)
    with pytest.raises(CheckpointError, match="Copy it before the next update"):
        jax.tree.leaves(first)
    with refused(comm, CheckpointError, "overwritten", "keep_states=True", alone=alone):
        tx.update(params, first if errs(comm, alone) else third, params)
    if comm.size > 1:
        with refused(comm, RankMismatchError, "the call"):
            tx.update(params, kept if is_last(comm) else third, params)
    assert third.count == 2
    updates, _ = tx.update(params, third, params)
    again, _ = tx.update(params, tx.update(params, kept, params)[1], params)
    assert_equal(updates, again)


def test_states_that_are_gone_warn_nobody_who_drops_them(comm, make):
    tx, params = make(), start()
    state = tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            was = weakref.ref(state)
            updates, state = tx.update(params, state, params)
            assert was() is None
            params = optax.apply_updates(params, updates)


@BOTH_WAYS
def test_what_is_no_state_is_refused(comm, make, alone):
    tx, params = make(), start()
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    kept = jax.tree.map(jnp.copy, state)
    deleted = jax.tree.map(jnp.copy, state)
    deleted.fields.exp_avg["a"].delete()

    def having(**fields):
        return jax.tree.unflatten(
            jax.tree.structure(kept.fields._replace(**fields)),
            jax.tree.leaves(kept.fields._replace(**fields)),
        )

    wrong = {
        "nothing": (None, ["must be one of shardopt.jax; got NoneType"]),
        "optax's": (optax.nadam(0.1).init(params), ["got tuple"]),
        "a dict": (having()._asdict(), ["got dict"]),
        "no moments": (jax.tree.map(lambda _: None, kept), ["must"]),
        "a deleted array": (deleted, ["exp_avg of the state must be readable", "deleted"]),
        "shapes": (jax.tree.map(lambda leaf: leaf[:1], kept), ["must have shape"]),
        "abstract": (jax.eval_shape(lambda: kept), ["must"]),
        "floats": (
            jax.tree.map(lambda leaf: leaf.astype(jnp.float32), kept),
            ["mu_product of the state must have integers"],
        ),
    }
    for given, told in wrong.values():
        with refused(comm, CheckpointError, *told, alone=alone):
            tx.update(params, given if errs(comm, alone) else state, params)
    tx.update(params, state, params)


@BOTH_WAYS
def test_what_is_no_state_is_refused_before_there_is_an_optimizer(comm, make, alone):
    params = start()
    saved = pickle.dumps((tx := make()).update(params, tx.init(params), params)[1])
    for wrong in (None, optax.nadam(0.1).init(params)):
        with refused(comm, CheckpointError, "must be one of shardopt.jax", alone=alone):
            make().update(params, wrong if errs(comm, alone) else pickle.loads(saved), params)
    with refused(comm, PartitionError, "params must be given with a state that", alone=alone):
        make().update(params, pickle.loads(saved), None if errs(comm, alone) else params)


def test_schedules_go_back_with_the_state(comm, make):
    schedule = optax.linear_schedule(0.1, 0.0, 8)
    own = go_back(
        make(lr=schedule), lambda *at: grads_of(*at, comm.rank), lambda s: jax.tree.map(jnp.copy, s)
    )
    theirs = go_back(optax.nadam(schedule), lambda *at: mean_grads(*at, comm), lambda s: s)
    assert_close(own, theirs)


def test_states_keep_their_order_when_param_groups_are_edited(comm, make):
    """Leaves of equal shapes would be exchanged without an error."""
    tx, params = make(), as_jax({name: np.full(3, i, np.float32) for i, name in enumerate("abc")})
    _, state = tx.update(params, tx.init(params), params)
    group = state.optimizer.param_groups[0]
    group["params"] = group["params"][::-1]
    updates, state = tx.update(params, state, params)
    np.testing.assert_array_equal(state.exp_avg["a"], 0)
    kept = jax.tree.map(jnp.copy, state)
    for taking in (tx, make()):  # another optimizer, whose groups are those of the tree
        given = kept if taking is tx else pickle.loads(pickle.dumps(kept))
        again, after = taking.update(params, given, params)
        np.testing.assert_array_equal(after.exp_avg["a"], 0)
    group["params"].pop()  # "a"
    updates, state = tx.update(params, kept, params)
    assert_equal(updates, {**again, "a": jnp.zeros(3)})
    np.testing.assert_array_equal(state.step, [0, 3, 3])
    assert_equal(tx.update(params, jax.tree.map(jnp.copy, state), params)[0]["a"], jnp.zeros(3))


def test_moments_that_were_changed_hold(comm, make):
    def edited(names):
        def through(state):
            if jnp.max(optax.tree_utils.tree_get(state, names[0])) == 0:
                return state
            halves = {name: optax.tree_utils.tree_get(state, name) for name in names[1:]}
            return optax.tree_utils.tree_set(
                state,
                **{name: jax.tree.map(lambda leaf: leaf / 2, halves[name]) for name in halves},
            )

        return through

    own = train(
        make(),
        lambda params, step: grads_of(params, step, comm.rank),
        through=edited(["step", "exp_avg", "exp_avg_sq"]),
    )
    theirs = train(
        optax.nadam(0.1),
        lambda *at: mean_grads(*at, comm),
        through=edited(["count", "mu", "nu"]),
    )
    assert_close(own, theirs)


def test_a_state_of_zeros_starts_anew(comm, make):
    def zeros(state):
        return jax.tree.map(jnp.zeros_like, state)

    own = train(make(), lambda *at: grads_of(*at, comm.rank), through=zeros)
    assert_close(own, train(optax.nadam(0.1), lambda *at: mean_grads(*at, comm), through=zeros))
    tx = make()
    state = tx.init(start())
    state = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 2, state)
    np.testing.assert_array_equal(state.exp_avg["a"], 2)
    np.testing.assert_array_equal(state.step, 0)


@pytest.mark.filterwarnings("ignore::shardopt.errors.StaleStateWarning")
def test_the_state_follows_what_is_done_to_its_optimizer(comm, make):
    tx, params = make(), start()
    _, state = tx.update(params, tx.init(params), params)
    saved = copy.deepcopy(state.optimizer.state_dict())
    updates, state = tx.update(params, state, params)
    for is_read in (True, False):
        jax.tree.leaves(state)  # these must not come back
        state.optimizer.load_state_dict(saved)
        assert state.count == 1
        if is_read:
            np.testing.assert_array_equal(state.step, 1)
        again, after = tx.update(params, state, params)
        assert_equal(again, updates)
        if is_read:
            again, after = tx.update(params, state, params)
            assert_equal(again, updates)
        else:
            with refused(comm, CheckpointError, "overwritten"):
                tx.update(params, state, params)
        state = after


@pytest.mark.filterwarnings("ignore::shardopt.errors.StaleStateWarning")
def test_an_update_that_fails_changes_nothing(comm, make):
    tx, params = make(), start()
    _, state = tx.update(params, tx.init(params), params)
    kept = jax.tree.map(jnp.copy, state)
    updates, state = tx.update(params, state, params)
    for bad in ({"b": params["b"]}, {**params, "a": params["a"][1:]}):
        for each in (kept, state):
            with refused(comm, PartitionError):
                tx.update(bad, each, params)
    other = nadam(-1.0, variant="optax", comm=comm, policy=POLICY)
    with refused(comm, HyperparamsError, "lr must be"):
        other.update(params, kept, params)
    with refused(comm, PartitionError, "params must be given with a state of another step"):
        tx.update(params, kept)
    again, _ = tx.update(params, kept, params)
    assert_equal(again, updates)


def test_several_nodes_accept_the_present_state_only(comm, make):
    if comm.size == 1:
        pytest.skip("a node for each rank")
    policy = ShardPolicy(share_node=False, timeout_s=20)
    expected = train(make(), lambda *at: grads_of(*at, comm.rank))
    own = train(make(policy=policy), lambda *at: grads_of(*at, comm.rank))
    assert_close(own, expected)
    tx, params = make(policy=policy), start()
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    with pytest.warns(PartialStateWarning, match=r"Save state\.optimizer"):
        kept = jax.tree.map(jnp.copy, state)
    assert kept.exp_avg is None
    _, state = tx.update(params, kept, params)
    for wrong in (kept, pickle.loads(pickle.dumps(kept))):
        with refused(comm, CheckpointError, "state must be the present one on several nodes"):
            tx.update(params, wrong, params)
    tx.update(params, state, params)
    with refused(comm, CheckpointError, "exp_avg of the state must have 2 arrays; got 0"):
        make().update(params, pickle.loads(pickle.dumps(kept)), params)
    with refused(comm, HyperparamsError, "keep_states must be False"):
        make(policy=policy, keep_states=True).init(params)
