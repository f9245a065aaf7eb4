"""Hyperparameters and coefficients, without any array."""

import importlib
import inspect
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardopt.errors import HyperparamsError, ShardoptError
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Hyperparams
from shardopt.rule.nadam import NAdam, mu_product_at
from shardopt.rule.rules import HYPERPARAM_NAMES, RULES
from tests.support.frameworks import require
from tests.support.papers import PAPERS


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
        "variant": st.sampled_from(NAdam.variants),
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
        NAdam(**{name: value})
    assert isinstance(raised.value, ValueError)  # what torch raises
    assert isinstance(raised.value, ShardoptError)


def test_lucid_has_no_decoupled_decay():
    with pytest.raises(HyperparamsError, match="decoupled_weight_decay must be False"):
        NAdam(variant="lucid", decoupled_weight_decay=True)


def test_borders_are_allowed():
    NAdam(lr=0, betas=(0, 0), eps=0, weight_decay=0, momentum_decay=0)


@pytest.mark.parametrize("lr", [1e-2, np.float32(1e-2), np.array(1e-2)])
def test_lr_may_be_an_array_of_one(lr):
    assert NAdam(lr=lr).lr == pytest.approx(1e-2)


@pytest.mark.parametrize("name", RULES)
@given(hypers, st.booleans(), reals(-10, 10), st.lists(reals(-10, 10), min_size=1, max_size=30))
def test_coefficients_follow_the_papers(name, settings, decoupled, start, grads):
    rule = RULES[name]
    settings = {key: value for key, value in settings.items() if key in rule.names()}
    assume(settings["variant"] in rule.variants)
    if (name, settings["variant"]) != ("NAdam", "lucid"):
        settings |= {"decoupled_weight_decay": decoupled or name == "AdamW"}
    if settings["variant"] == "optax":  # has decoupled decay only, applied to the old parameter
        settings |= {"decoupled_weight_decay": True}
    hyper, count = rule(**settings), StepCount()
    paper = PAPERS[name](start, **settings)
    p, m, v = start, 0.0, 0.0
    for grad in grads:
        paper.step(grad)
        count = hyper.after_step(count)
        c = hyper.coefficients(count, grad_scale=1.0)
        g = c.source_scale * grad + c.weight_decay * p
        m = c.m_decay * m + c.m_gain * g
        v = c.beta2 * v + c.v_gain * g * g
        u = (c.g_scale * g + c.m_scale * m) / (math.sqrt(v * c.v_scale) + c.eps)
        p -= c.param_decay * p + u
        assert m == pytest.approx(float(paper.exp_avg), rel=1e-9, abs=1e-12)
        assert v == pytest.approx(float(paper.exp_avg_sq), rel=1e-9, abs=1e-12)
        assert p == pytest.approx(float(paper.param), rel=1e-7, abs=1e-7)
    assert count.step == len(grads)


@pytest.mark.parametrize("name", RULES)
def test_defaults_are_torchs(name):
    torch = pytest.importorskip("torch")
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    for key in set(RULES[name].names()) & set(theirs):
        assert getattr(RULES[name](), key) == theirs[key].default, key


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax", "lucid"])
def test_constructors_have_the_defaults_of_their_rules(framework):
    require(framework)
    front_end = importlib.import_module(f"shardopt.{framework}")
    for name, rule in RULES.items():
        arguments = inspect.signature(getattr(front_end, name)).parameters
        found = {key: arguments[key].default for key in rule.names() if key in arguments}
        assert getattr(front_end, name).rule is rule
        assert found == {key: getattr(rule(), key) for key in found}
        assert set(rule.names()) - set(found) <= {"decoupled_weight_decay"}


def test_every_rule_knows_its_hyperparameters():
    assert RULES["NAdam"].names()[-1] == "momentum_decay"
    assert "momentum_decay" not in RULES["AdamW"].names()
    assert set(RULES["AdamW"].names()) == set(RULES["Adam"].names())
    assert {"amsgrad", "momentum_decay", "lr"} <= HYPERPARAM_NAMES
    assert issubclass(RULES["RAdam"], Hyperparams)
    assert [name for name, rule in RULES.items() if "mu_product" in rule.count_keys] == ["NAdam"]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("Adam", {"amsgrad": True}, "amsgrad must be False; got True"),
        ("AdamW", {"amsgrad": True}, "amsgrad must be False; got True"),
        ("AdamW", {"decoupled_weight_decay": False}, "decoupled_weight_decay must be True"),
        ("RAdam", {"variant": "keras"}, "variant must be one of torch, optax, lucid; got 'keras'"),
        ("RAdam", {"betas": (0.9, 1.0)}, "betas.1. must lie in"),
        ("Adam", {"eps": -1}, "eps must be a finite number >= 0"),
    ],
)
def test_what_a_rule_does_not_have_is_refused_by_name(name, settings, told):
    with pytest.raises(HyperparamsError, match=rf"{told}.*\. .*\.$"):
        RULES[name](**settings)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("variant", RULES["RAdam"].variants)
def test_radam_leaves_out_what_it_does_not_know(beta2, variant):
    hyper = RULES["RAdam"](betas=(0.9, beta2), variant=variant)
    rows = [hyper.coefficients(StepCount(step), 1.0) for step in range(1, 9)]
    known = [row.v_scale != 0 for row in rows]
    assert known == sorted(known)  # once it knows, it goes on to know
    assert known[:3] == [False] * 3
    assert known[-1] == (beta2 >= 0.9)
    for row in rows:
        assert row.v_scale or row.eps == 1.0


@given(reals(0, 4), reals(-5, 5))
def test_grad_scale_scales_the_gradient(scale, grad):
    hyper, count = NAdam(), StepCount(1, 0.5)
    assert hyper.coefficients(count, scale).source_scale * grad == scale * grad
    maximize = NAdam(maximize=True)
    assert maximize.coefficients(count, scale).source_scale * grad == -scale * grad


@pytest.mark.parametrize("variant", NAdam.variants)
def test_mu_product_can_be_rebuilt(variant):
    hyper, count = NAdam(variant=variant, momentum_decay=0.1), StepCount()
    for step in range(1, 9000):  # into the smallest numbers, where it stays
        count = hyper.after_step(count)
        if step in (1, 2, 10, 8999):
            assert hyper.count_at(step) == count
    assert mu_product_at(0, hyper) == 1.0
    assert mu_product_at(10**12, hyper) == count.mu_product
