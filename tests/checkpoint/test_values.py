"""What ``extra`` and param groups hold comes back as it was, or is refused when it is saved."""

import contextlib
import enum
import json
import math
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardopt.checkpoint.format.fields import parse_json
from shardopt.checkpoint.format.values import Encoder, decode
from shardopt.errors import CheckpointError, DamagedCheckpointError
from tests.checkpoint.test_golden import assert_alike

DTYPES = [
    *("bool", "int8", "<i2", ">i4", "<i8", "uint8", ">u2", "<u4", ">u8"),
    *("<f2", ">f4", "<f4", "<f8", ">f8", "bfloat16", "<c8", ">c16"),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 3300) + 1, (1 << 3300) - 1),
    st.floats(),
    st.text(),
    st.sampled_from(["$array", "$float", "$tuple", "$items", "$", ""]),
)
KEYS = st.one_of(SCALARS, st.tuples(SCALARS, st.tuples(SCALARS))).filter(lambda key: key == key)


@st.composite
def arrays(draw):
    """Arrays of every dtype: in C's and Fortran's order, reversed, strided, 0-d and empty."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    numel = math.prod(shape)
    raw = draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize))
    if dtype.kind == "b":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, dtype).reshape(shape)
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()) and array.ndim:
        array = array[::-1]
    return array.T if draw(st.booleans()) else array


VALUES = st.recursive(
    st.one_of(SCALARS, arrays()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(), inner, max_size=4),
        st.dictionaries(st.sampled_from(["$array", "$float", "$x", "a"]), inner, max_size=2),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=20,
)


def through_file(value):
    """What is read of a value that was saved."""
    encoder = Encoder(0)
    text = json.dumps(encoder.encode(value, "extra"), allow_nan=False).encode()
    found = [array for array, _ in encoder.arrays]
    assert all(array.flags.c_contiguous and array.dtype.isnative for array in found)
    kept = [np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for array in found]
    return decode(parse_json(text, "extra"), lambda file, index: kept[index])


def as_read(value):
    """A value as it is to come back: arrays in the machine's byte order."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("="), order="C")
    if isinstance(value, list | tuple):
        return type(value)(map(as_read, value))
    if isinstance(value, dict):
        return {key: as_read(item) for key, item in value.items()}
    return value


@given(VALUES)
def test_a_value_comes_back(value):
    assert_alike(through_file(value), as_read(value))


class Color(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    YES = "yes"


class Mixin:
    pass


class Odd(int, Mixin):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Color.RED, 3),
        (Word.YES, "yes"),
        (Odd(5), 5),
        ({Color.RED: Word.YES}, {3: "yes"}),
        (np.float32(0.1), 0.10000000149011612),
        (np.bool_(True), True),
        (np.int64(-7), -7),
        (np.dtype("bfloat16").type(1.5), 1.5),
        (np.str_("a"), "a"),
        (Point(1, [2]), (1, [2])),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({(1, ("x", None)): {}}, {(1, ("x", None)): {}}),
        (-0.0, -0.0),
        (5e-324, 5e-324),
    ],
)
def test_what_is_like_a_plain_value_comes_back_plain(value, expected):
    assert_alike(through_file(value), expected)


def nested(depth, wrap, value=0):
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS = {
    "list": lambda v: [v],
    "tuple": lambda v: (v,),
    "dict": lambda v: {"a": v},
    "dict of int": lambda v: {1: v},
    "dict of $": lambda v: {"$": v},
}


@pytest.mark.parametrize("kind", WRAPS)
def test_as_deep_as_is_saved_can_be_read(kind):
    value = nested(64, WRAPS[kind])
    assert_alike(through_file(value), value)
    with pytest.raises(CheckpointError, match="must be at most 64 deep"):
        Encoder(0).encode(nested(65, WRAPS[kind]), "extra")


def cyclic_list():
    value = []
    value += [value, value]
    return value


def cyclic_dict():
    value = {}
    value[1] = {"again": value}
    return value


class Opaque:
    __array__ = None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1, {"a": lambda: 0}], r"extra\[1\]\['a'\] must be .* got function"),
        ({1, 2}, "got set"),
        (frozenset(), "got frozenset"),
        (b"bytes", "got bytes"),
        (1j, "got complex"),
        (range(3), "got range"),
        (int, "got type"),
        (np.array([object()]), "got an array of object"),
        (np.array(["text"]), "got an array of <U4"),
        (np.zeros(1, "datetime64[s]"), "got an array of datetime64"),
        (np.zeros(1, [("a", "f4")]), "got an array of"),
        (np.zeros(1, np.longdouble), "got an array of"),
        (np.random.default_rng(0), "got Generator"),
        (Opaque(), "got Opaque"),
        (cyclic_list(), "at most 64 deep; got more. Check whether it refers to itself."),
        (cyclic_dict(), "at most 64 deep"),
        (1 << 3300, "^extra must have at most 3300 bits; got 3301"),
        ([-(10**5000)], "must have at most 3300 bits"),
        ({(1, (1 << 4000,)): 0}, "a key of extra.* must have at most 3300 bits"),
        ({b"key": 0}, "a key of extra must be .* got bytes"),
    ],
)
def test_what_cannot_be_saved_is_refused(value, told):
    with pytest.raises(CheckpointError, match=told) as caught:
        Encoder(0).encode(value, "extra")
    assert type(caught.value) is CheckpointError


def test_a_key_that_would_not_be_one_when_read_is_refused():
    torch = pytest.importorskip("torch")
    state = {torch.nn.Parameter(torch.ones(2)): {"step": 3}}  # as torch's opt.state
    told = "^a key of extra must be None, a number, text or a tuple of those; got Parameter"
    with pytest.raises(CheckpointError, match=told):
        Encoder(0).encode(state, "extra")


def test_a_tensor_that_nobody_knows_comes_back_as_an_array():
    torch = pytest.importorskip("torch")
    value = [torch.ones(2, 3).T, torch.tensor(2)]
    assert_alike(through_file(value), [np.ones((3, 2), np.float32), np.array(2)])
    with pytest.raises(CheckpointError, match="got Tensor"):
        Encoder(0).encode(torch.ones(2, dtype=torch.bfloat16), "extra")


def no_array(file, index):
    raise IndexError(index)


HOSTILE = [
    {"$float": "1e5"},
    {"$float": ["nan"]},
    {"$float": {"a": 1}},
    {"$tuple": {"a": 1}},
    {"$tuple": "abc"},
    {"$items": {"a": 1}},
    {"$items": [1, 2]},
    {"$items": [[1]]},
    {"$items": [[1, 2, 3]]},
    {"$items": ["ab", "cde"]},
    {"$items": [[[1], 2]]},
    {"$items": [[{"a": 1}, 2]]},
    {"$items": [[{"$tuple": [[]]}, 2]]},
    {"$items": [[{"$array": [0, 0]}, 2]]},
    {"$array": [0, 0]},
    {"$array": [0]},
    {"$array": []},
    {"$array": [0, 0, 0]},
    {"$array": [0, -1]},
    {"$array": [0, True]},
    {"$array": [0, 1.0]},
    {"$array": [0, 1 << 63]},
    {"$array": "01"},
    {"$array": None},
    {"$": 1},
    {"$eval": "1"},
    nested(200, lambda v: [v]),
    nested(200, lambda v: {"$tuple": [v]}),
    nested(200, lambda v: {"$items": [[1, v]]}),
    nested(200, lambda v: {"$items": [[{"$tuple": [v]}, 1]]}),
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_what_encode_does_not_write_is_refused(index):
    value = HOSTILE[index]
    for wrapped in (value, [value], {"a": value}, {"$items": [[1, value]]}):
        with pytest.raises(DamagedCheckpointError):
            decode(wrapped, no_array)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["$array", "$float", "$tuple", "$items", "$", "a"]), inner, max_size=2
        ),
    ),
    max_leaves=30,
)


@given(JSON)
def test_any_json_is_decoded_or_refused(value):
    with contextlib.suppress(DamagedCheckpointError):
        decode(value, no_array)
