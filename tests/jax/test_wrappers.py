"""The wrappers of optax around its transformation give what they give around optax's, or raise."""

import numpy as np
import pytest

from shardopt.errors import ClosedError, HyperparamsError, PartitionError
from shardopt.policy import ShardPolicy
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global assert_close, assert_equal, grads_of, jax, jnp, mean_grads, NAdam, nadam, optax, start
    global train
    from shardopt.jax import NAdam, nadam
    from tests.support.jax_training import (
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


def wrappers():
    synced = optax.LookaheadParams.init_synced
    is_weight = {"a": True, "b": [None, False]}
    return {
        "chain": (lambda tx: optax.chain(optax.scale(2.0), tx, optax.scale(0.5)), start()),
        "lookahead": (lambda tx: optax.lookahead(tx, 2, 0.5), synced(start())),
        "masked": (
            lambda tx: optax.chain(
                optax.masked(tx, is_weight),
                optax.masked(optax.set_to_zero(), {"a": False, "b": [None, True]}),
            ),
            start(),
        ),
        "groups": (
            lambda tx: optax.multi_transform(
                {"x": tx, "y": optax.chain(tx, optax.scale(0.5)), "unused": tx},
                {"a": "x", "b": [None, "y"]},
            ),
            start(),
        ),
    }


@pytest.mark.parametrize("name", ["chain", "lookahead", "masked", "groups"])
def test_wrappers_give_what_they_give_around_optax(comm, make, name):
    wrap, params = wrappers()[name]
    fast = (lambda each: each.fast) if name.startswith("lookahead") else lambda each: each
    own = train(
        wrap(make()), lambda each, step: grads_of(fast(each), step, comm.rank), params=params
    )
    theirs = train(
        wrap(optax.nadam(0.1)), lambda each, step: mean_grads(fast(each), step, comm), params=params
    )
    assert_close(own, theirs)


def test_extra_arguments(comm, make):
    tx, params = make(), start()
    grads = jax.tree.map(lambda leaf: 4 * leaf, params)
    scaled, _ = tx.update(grads, tx.init(params), params, loss_scale=4.0, value=1.0, grad=grads)
    expected, state = tx.update(params, tx.init(params), params)
    assert_equal(scaled, expected)
    _, same = tx.update(params, state, params, overflowed=comm.rank == 0)
    assert state.count == same.count == 1


CHANGED = {"lr": 0.0, "b1": 0.5, "b2": 0.5, "eps": 1.0, "weight_decay": 0.5, "momentum_decay": 0.5}


@pytest.mark.parametrize("variant", ["torch", "optax"])
def test_injected_hyperparameters_hold_at_the_next_update(comm, variant):
    params, names = start(), {"b1": ("betas", 0), "b2": ("betas", 1)}
    tx = optax.inject_hyperparams(nadam)(
        lr=0.1, b1=0.75, b2=0.875, variant=variant, comm=comm, policy=POLICY
    )
    state = tx.init(params)
    with NAdam(params, lr=np.float32(0.1), betas=(0.75, 0.875), variant=variant, comm=comm) as opt:
        group = opt.param_groups[0]
        group.update({each: float(np.float32(group[each])) for each in ("eps", "momentum_decay")})
        for step, (name, value) in enumerate({"lr": np.float32(0.1), **CHANGED, **CHANGED}.items()):
            value = value if step < 7 else np.float32(0.1)
            state.hyperparams[name] = value
            key, index = names.get(name, (name, None))
            if index is None:
                group[key] = float(value)
            else:
                group[key] = tuple(
                    float(value) if i == index else b for i, b in enumerate(group[key])
                )
            grads = grads_of(params, step, comm.rank)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert_close(params, opt.step(grads))
            params = opt.params
    state.inner_state.close()


def test_injected_schedules(comm):
    def inject(factory, name, **settings):
        return optax.inject_hyperparams(factory)(
            **{name: optax.linear_schedule(0.1, 0.0, 4)}, **settings
        )

    ours = {"variant": "optax", "comm": comm, "policy": POLICY}
    theirs = train(inject(optax.nadam, "learning_rate"), lambda *at: mean_grads(*at, comm))
    for name in ("lr", "learning_rate"):
        own = train(inject(nadam, name, **ours), lambda *at: grads_of(*at, comm.rank))
        assert_close(own, theirs)


def test_an_injected_norm_to_clip_to(comm):
    tx = optax.inject_hyperparams(nadam)(max_grad_norm=0.5, comm=comm, policy=POLICY)
    state, params = tx.init(start()), start()
    for norm in (0.5, 0.25):
        state.hyperparams["max_grad_norm"] = norm
        _, state = tx.update(params, state, params)
        report = state.inner_state.optimizer.last_step
        assert report.clip_factor == pytest.approx(norm / report.grad_norm, rel=1e-4)
    state.inner_state.close()


def test_a_new_transformation_takes_the_state_over(comm, make):
    tx, params = make(), start()
    _, state = tx.update(params, tx.init(params), params)
    group = state.optimizer.param_groups[0]
    group["lr"] = 0.3  # holds until the transformation has another one
    _, state = tx.update(params, state, params)
    assert group["lr"] == 0.3
    _, state = make(lr=0.2).update(params, state, params)
    assert group["lr"] == 0.2
    with refused(comm, HyperparamsError, "comm and policy must be those"):
        make(policy=ShardPolicy(timeout_s=21)).update(params, state, params)
    with refused(comm, HyperparamsError, "lr must be"):
        make(lr=-1.0).update(params, state, params)
    kept = jax.tree.map(jnp.copy, state)
    expected, after = tx.update(params, state, params)
    after.close()
    with pytest.raises(ClosedError):
        tx.update(params, after, params)
    updates, state = tx.update(params, kept, params)  # another optimizer takes it
    assert_equal(updates, expected)
    state.close()


def test_names_of_optax(comm, make):
    params = start()
    settings = {"lr": None, "learning_rate": 0.1, "b1": 0.8, "b2": 0.99, "eps": 1e-4}
    own, _ = (tx := make(**settings)).update(params, tx.init(params), params)
    theirs = optax.nadam(0.1, 0.8, 0.99, 1e-4)
    assert_close(own, theirs.update(params, theirs.init(params), params)[0])
    pairs = make(betas=(0.8, 0.99), eps=1e-4)
    assert_equal(own, pairs.update(params, pairs.init(params), params)[0])
    for wrong, told in {
        "learning_rate": "lr must be given once; got learning_rate",
        "eps_root": "eps_root must be 0",
        "mu_dtype": "mu_dtype must be None",
    }.items():
        with refused(comm, HyperparamsError, told):
            make(**{wrong: 0.5}).init(params)
    with refused(comm, HyperparamsError, "betas must be given once; got b2"):
        make(b2=0.9, betas=(0.9, 0.99)).init(params)
    for betas in (0.9, (0.9,), (0.9, 0.99, 0.999), ()):
        with refused(comm, HyperparamsError, "betas must be"):
            make(betas=betas).init(params)


WRONG = {
    "names": ({"learning_rate": 0.5}, "lr must be given once"),
    "value": ({"eps": -1.0}, "eps must be"),
    "schedule": ({"lr": lambda count: None}, "lr must be"),
}


@BOTH_WAYS
@pytest.mark.parametrize("name", WRONG)
def test_settings_that_are_wrong_are_refused_on_all_ranks(comm, make, name, alone):
    wrong, told = WRONG[name]
    settings, params = wrong if errs(comm, alone) else {}, start()
    with refused(comm, HyperparamsError, told, alone=alone):
        make(**settings).init(params)
    _, state = (tx := make()).update(params, tx.init(params), params)
    with refused(comm, HyperparamsError, told, alone=alone):
        make(**settings).update(params, state, params)
    tx.update(params, state, params)


def test_trees_of_nothing_and_leaves_that_cannot_be_trained(comm, make):
    tx = make()
    for empty in ({}, {"a": None}):
        state = tx.init(empty)
        updates, state = tx.update(empty, state, empty)
        assert updates == empty
        assert tx.update(empty, jax.tree.map(jnp.copy, state), empty)[0] == empty
    with refused(comm, PartitionError, "got int32", "Leave it out"):
        tx.init({"n": jnp.asarray(np.ones(3, np.int32))})
    with refused(comm, PartitionError, "got complex64", "optax.contrib.split_real_and_imaginary"):
        tx.init({"z": jnp.asarray(np.ones(3, np.complex64))})


def test_traced_calls_are_refused_before_they_do_anything(comm, make):
    tx, params = make(), start()
    state = tx.init(params)
    told = "outside of jax.jit"
    with refused(comm, PartitionError, told):
        jax.jit(tx.init)(params)
    with refused(comm, PartitionError, told):
        jax.jit(tx.update)(params, state, params)
    with refused(comm, PartitionError, told):  # all arguments are known, and yet it may not run
        jax.lax.cond(False, lambda: tx.update(params, state, params)[0], lambda: params)
    with refused(comm, PartitionError, told):
        jax.jit(lambda: state.optimizer.step(params))()
    injected = optax.inject_hyperparams(nadam)(0.1, comm=comm, policy=POLICY)
    inner = injected.init(params)
    with refused(comm, PartitionError, told):
        jax.jit(injected.update)(params, inner, params)
    for wrapped in (optax.apply_if_finite(tx, 3), optax.MultiSteps(tx, 2)):
        with refused(comm, PartitionError, told):
            wrapped.update(params, wrapped.init(params), params)
    assert state.count == 0
    inner.inner_state.close()
