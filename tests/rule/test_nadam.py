"""Hyperparameters and coefficients, without any array."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.errors import HyperparamsError, ShardoptError
from shardopt.rule.nadam import VARIANTS, Hyperparams, StepCount, mu_product_at, step_coefficients
from tests.support.reference import PaperNAdam


def reals(low, high):
    return st.floats(low, high, allow_nan=False)


hypers = st.fixed_dictionaries(
    {
        "lr": reals(0, 10),
        "betas": st.tuples(reals(0, 0.9999), reals(0, 0.9999)),
        "eps": reals(1e-12, 1),
        "weight_decay": reals(0, 1),
        "momentum_decay": reals(0, 1),
        "maximize": st.booleans(),
        "variant": st.sampled_from(VARIANTS),
    }
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "fast"),
        ("lr", 1j),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("momentum_decay", -0.1),
        ("betas", (1.0, 0.999)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9, math.nan)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("betas", (0.9 + 0.1j, 0.999)),
        ("variant", "nesterov"),
    ],
)
def test_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(HyperparamsError, match=rf"^{name}.* must .*; got .*\. .*\.$") as raised:
        Hyperparams(**{name: value})
    assert isinstance(raised.value, ValueError)  # what torch raises
    assert isinstance(raised.value, ShardoptError)


def test_lucid_has_no_decoupled_decay():
    with pytest.raises(HyperparamsError, match="decoupled_weight_decay must be False"):
        Hyperparams(variant="lucid", decoupled_weight_decay=True)


def test_borders_are_allowed():
    Hyperparams(lr=0, betas=(0, 0), eps=0, weight_decay=0, momentum_decay=0)


@pytest.mark.parametrize("lr", [1e-2, np.float32(1e-2), np.array(1e-2)])
def test_lr_may_be_an_array_of_one(lr):
    assert Hyperparams(lr=lr).lr == pytest.approx(1e-2)


@given(hypers, st.booleans(), reals(-10, 10), st.lists(reals(-10, 10), min_size=1, max_size=30))
def test_coefficients_follow_the_paper(settings, decoupled, start, grads):
    if settings["variant"] != "lucid":
        settings = settings | {"decoupled_weight_decay": decoupled}
    if settings["variant"] == "optax":  # has decoupled decay only, applied to the old parameter
        settings |= {"decoupled_weight_decay": True}
    hyper, clock = Hyperparams(**settings), StepCount()
    paper = PaperNAdam(start, **settings)
    p, m, v = start, 0.0, 0.0
    for grad in grads:
        paper.step(grad)
        clock = clock.after_step(hyper)
        c = step_coefficients(hyper, clock, grad_scale=1.0)
        g = c.source_scale * grad + c.weight_decay * p
        m = c.m_decay * m + c.m_gain * g
        v = c.beta2 * v + c.v_gain * g * g
        u = (c.g_scale * g + c.m_scale * m) / (math.sqrt(v * c.v_scale) + c.eps)
        p -= c.param_decay * p + u
        assert m == pytest.approx(float(paper.exp_avg), rel=1e-9, abs=1e-12)
        assert v == pytest.approx(float(paper.exp_avg_sq), rel=1e-9, abs=1e-12)
        assert p == pytest.approx(float(paper.param), rel=1e-7, abs=1e-7)
    assert clock.step == len(grads)


@given(reals(0, 4), reals(-5, 5))
def test_grad_scale_scales_the_gradient(scale, grad):
    hyper, clock = Hyperparams(), StepCount(1, 0.5)
    assert step_coefficients(hyper, clock, scale).source_scale * grad == scale * grad
    maximize = Hyperparams(maximize=True)
    assert step_coefficients(maximize, clock, scale).source_scale * grad == -scale * grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_mu_product_can_be_rebuilt(variant):
    hyper, clock = Hyperparams(variant=variant, momentum_decay=0.1), StepCount()
    for step in range(1, 9000):  # into the smallest numbers, where it stays
        clock = clock.after_step(hyper)
        if step in (1, 2, 10, 8999):
            assert mu_product_at(step, hyper) == clock.mu_product
    assert mu_product_at(0, hyper) == 1.0
    assert mu_product_at(10**12, hyper) == clock.mu_product
