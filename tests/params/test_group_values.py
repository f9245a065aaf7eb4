"""Hyperparameters of odd types become plain values, and whatever else is in a group is saved."""

import enum
import pickle
from collections.abc import MutableSequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from shardopt.errors import HyperparamsError
from shardopt.params.group_values import make_plain, saved_values, update_groups
from shardopt.rule.nadam import NAdam


class ConfigList(MutableSequence):
    """A list of a configuration library, which cannot be copied or pickled alone."""

    def __init__(self, *items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __setitem__(self, index, value):
        self.items[index] = value

    def __delitem__(self, index):
        del self.items[index]

    def insert(self, index, value):
        self.items.insert(index, value)

    def __reduce__(self):
        raise TypeError


class ScalarFloat(float):
    """A number of a configuration library, which knows how it was written."""

    def __reduce__(self):
        raise TypeError


class Name(str):
    __slots__ = ()


class Kind(enum.Enum):
    LARGE = 3


def group_of(**values):
    usual = zip(NAdam.names(), NAdam().values(), strict=True)
    return {"params": [], **dict(usual), **values}


ODD = [
    ("lr", ScalarFloat(0.1), 0.1),
    ("lr", np.float32(0.5), 0.5),
    ("lr", np.float16(0.5), 0.5),
    ("lr", Decimal("0.1"), 0.1),
    ("lr", Fraction(1, 4), 0.25),
    ("weight_decay", np.int64(1), 1.0),
    ("betas", ConfigList(0.5, 0.9), (0.5, 0.9)),
    ("betas", ConfigList(ScalarFloat(0.5), Decimal("0.9")), (0.5, 0.9)),
    ("betas", np.array([0.5, 0.9]), (0.5, 0.9)),
    ("betas", (np.float64(0.5), 0.9), (0.5, 0.9)),
    ("betas", [Fraction(1, 2), 0.9], (0.5, 0.9)),
    ("maximize", np.True_, True),
    ("maximize", 1, 1),
    ("variant", Name("keras"), "keras"),
]


@pytest.mark.parametrize(("name", "value", "plain"), ODD, ids=range(len(ODD)))
def test_odd_values_become_plain_ones(name, value, plain):
    group = group_of(**{name: value})
    make_plain(group, NAdam)
    assert group[name] == plain
    assert type(group[name]) is type(plain)
    assert pickle.loads(pickle.dumps(group)) == group
    if type(plain) is tuple:
        assert {type(item) for item in group[name]} == {float}
    assert getattr(NAdam.from_group(group), name) == plain


@pytest.mark.parametrize("value", [np.array(0.1), np.array([0.1]), np.array(0.1, np.float32)])
def test_arrays_of_one_number_stay_the_same_object(value):
    group = group_of(lr=value)
    make_plain(group, NAdam)
    assert group["lr"] is value
    value.fill(0.5)
    assert NAdam.from_group(group).lr == 0.5
    saved, left_out = saved_values(group)
    assert (saved["lr"], type(saved["lr"]), left_out) == (0.5, float, {})


def test_lists_of_numbers_stay_the_same_object():
    betas = [0.5, 0.9]
    group = group_of(betas=betas)
    make_plain(group, NAdam)
    assert group["betas"] is betas


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lr", "0.1", "lr must be a real number; got '0.1'"),
        ("lr", np.zeros(2), "lr must be a real number"),
        ("lr", [0.1], "lr must be a real number"),
        ("lr", 1j, "lr must be a real number"),
        ("betas", 0.9, "betas must be two numbers; got 0.9"),
        ("betas", ConfigList(0.9, "x"), r"betas\[1\] must be a real number; got 'x'"),
        ("maximize", "false", "maximize must be True or False; got 'false'"),
        ("decoupled_weight_decay", np.zeros(2), "decoupled_weight_decay must be True or False"),
    ],
)
def test_wrong_values_are_refused(name, value, told):
    group = group_of(**{name: value})
    with pytest.raises(HyperparamsError, match=told):
        make_plain(group, NAdam) or NAdam.from_group(group)


# -- what is saved ---------------------------------------------------------------------------------


KEPT = [
    (None, None),
    ("text", "text"),
    (Name("text"), "text"),
    (True, True),
    (np.True_, True),
    (ScalarFloat(0.5), 0.5),
    (np.float32(0.5), 0.5),
    (np.array(0.5), 0.5),
    (Decimal("0.5"), 0.5),
    (Kind.LARGE, 3),
    (Path("a/b"), "a/b"),
    ({"a": [1, (2, np.int8(3))], 4: Kind.LARGE}, {"a": [1, (2, 3)], 4: 3}),
    (ConfigList(1, ConfigList(2)), [1, [2]]),
    (range(3), [0, 1, 2]),
]


@pytest.mark.parametrize(("value", "kept"), KEPT, ids=range(len(KEPT)))
def test_what_users_put_into_a_group_is_saved(value, kept):
    saved, left_out = saved_values(group_of(mine=value))
    assert not left_out
    assert repr(saved["mine"]) == repr(kept)
    assert "params" not in saved


def test_arrays_are_saved_as_arrays():
    saved, left_out = saved_values(group_of(mine=np.array([3])))
    assert not left_out
    assert saved["mine"].shape == (1,)


ENDLESS = []
ENDLESS.append(ENDLESS)


UNKNOWN = [
    *(object(), {1, 2}, b"bytes", 1j, len, [object()], {"a": {1}}),
    *(np.array([None]), ENDLESS, 1 << 9999, Decimal("sNaN")),
]


@pytest.mark.parametrize("value", UNKNOWN, ids=range(len(UNKNOWN)))
def test_what_cannot_be_saved_is_left_out_by_name(value):
    saved, left_out = saved_values(group_of(mine=value))
    assert left_out == {"mine": type(value).__name__}
    assert "mine" not in saved
    assert saved["lr"] == 2e-3


# -- what is restored ------------------------------------------------------------------------------


def test_numbers_are_filled_into_what_is_writable():
    lr, betas = np.array(0.1), (np.array(0.5), 0.9)
    group = group_of(lr=lr, betas=betas, mine=1)
    update_groups([group], [{"lr": 0.25, "betas": (0.75, 0.99), "mine": 2, "new": 3}])
    assert group["lr"] is lr
    assert lr == 0.25
    assert group["betas"][0] is betas[0]
    assert group["betas"] == (0.75, 0.99)
    assert (group["mine"], group["new"]) == (2, 3)


def test_an_object_that_groups_share_is_filled_once():
    lr = np.array(0.1)
    groups = [group_of(lr=lr), group_of(lr=lr), group_of(lr=lr)]
    update_groups(groups, [{"lr": 0.25}, {"lr": 0.5}, {"lr": 0.25}])
    assert [float(group["lr"]) for group in groups] == [0.25, 0.5, 0.25]
    assert groups[0]["lr"] is groups[2]["lr"] is lr
