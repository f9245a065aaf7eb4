"""Models and settings that cannot be trained are refused on all ranks, and leave no trace."""

from functools import partial

import numpy as np
import pytest

from shardopt.errors import HyperparamsError, KernelError, PartitionError, RankMismatchError
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy
from tests.support.errors import (
    BOTH_WAYS,
    Sparse,
    assert_steps,
    differing,
    errs,
    is_last,
    make_optimizer,
    make_params,
    params_of,
    refused,
    take_step,
)

pytestmark = pytest.mark.mpi


# -- what differs between ranks --------------------------------------------------------------------


def model(shape=(2, 3), dtype="float32", name="w", sizes=(1, 2)):
    """Parameters in groups of some sizes, of which the first is as described."""
    first = Parameter(np.ones(shape, dtype), name)
    others = [Parameter(np.ones(5, np.float32), f"p{i}") for i in range(1, sum(sizes))]
    rest = iter([first, *others])
    return [{"params": [next(rest) for _ in range(size)]} for size in sizes]


DIFFERENT_MODELS = [
    ({"shape": (3, 2)}, "the shape of parameter 'w'", "(2, 3)", "(3, 2)"),
    ({"shape": (6,)}, "the shape of parameter 'w'", "(2, 3)", "(6,)"),
    ({"dtype": "float64"}, "the dtype of parameter 'w'", "'float32'", "'float64'"),
    ({"name": "v"}, "the name of parameter 0", "'w'", "'v'"),
    ({"sizes": (1, 1)}, "the number of parameters", "3", "2"),
    ({"sizes": (1, 1, 1)}, "the number of param groups", "2", "3"),
    ({"sizes": (2, 1)}, "the group of parameter 'p1'", "1", "0"),
]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("change", "name", "usual", "odd"), DIFFERENT_MODELS)
def test_a_different_model_on_one_rank_is_refused(comm, change, name, usual, odd):
    groups = model(**change) if is_last(comm) else model()
    with refused(comm, RankMismatchError, differing(comm, name, usual, odd)):
        make_optimizer(comm, groups)


DIFFERENT_SETTINGS = [
    ({"lr": 0.5}, "lr of param group 0", "0.002", "0.5"),
    ({"betas": (0.8, 0.99)}, "betas of param group 0", "(0.9, 0.999)", "(0.8, 0.99)"),
    ({"eps": 1e-7}, "eps of param group 0", "1e-08", "1e-07"),
    ({"weight_decay": 0.1}, "weight_decay of param group 0", "0.0", "0.1"),
    ({"momentum_decay": 0.1}, "momentum_decay of param group 0", "0.004", "0.1"),
    ({"decoupled_weight_decay": True}, "decoupled_weight_decay of param group 0", "False", "True"),
    ({"maximize": True}, "maximize of param group 0", "False", "True"),
    ({"variant": "keras"}, "variant of param group 0", "'torch'", "'keras'"),
    ({"max_grad_norm": 2.0}, "max_grad_norm", "None", "2.0"),
]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("change", "name", "usual", "odd"), DIFFERENT_SETTINGS)
def test_a_different_setting_on_one_rank_is_refused(comm, change, name, usual, odd):
    settings = change if is_last(comm) else {}
    with refused(comm, RankMismatchError, differing(comm, name, usual, odd)):
        make_optimizer(comm, **settings)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bucket_nbytes", 4096),
        ("check_finite", True),
        ("threads", 1),
        ("share_node", False),
        ("overlap", False),
        ("wire_dtype", "bfloat16"),
    ],
)
def test_a_different_policy_on_one_rank_is_refused(comm, name, value):
    usual, odd = ShardPolicy(timeout_s=20), ShardPolicy(timeout_s=20, **{name: value})
    told = differing(comm, f"policy.{name}", repr(getattr(usual, name)), repr(value))
    with refused(comm, RankMismatchError, told):
        make_optimizer(comm, policy=odd if is_last(comm) else usual)


# -- what is wrong in itself, on all ranks or on the last one --------------------------------------


WRONG_SETTINGS = [
    ({"lr": -1.0}, "lr must be a finite number >= 0; got -1.0"),
    ({"lr": float("nan")}, "lr must be a finite number >= 0; got nan"),
    ({"lr": float("inf")}, "lr must be a finite number >= 0; got inf"),
    ({"lr": "0.1"}, "lr must be a real number; got '0.1'"),
    ({"lr": None}, "lr must be a real number; got None"),
    ({"betas": (1.0, 0.999)}, "betas[0] must lie in [0, 1); got 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] must lie in [0, 1); got -0.1"),
    ({"betas": (0.9, "x")}, "betas[1] must be a real number; got 'x'"),
    ({"betas": 0.9}, "betas must be two numbers; got 0.9"),
    ({"betas": (0.9,)}, "betas must be two numbers; got (0.9,)"),
    ({"eps": -1e-8}, "eps must be a finite number >= 0; got -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0; got -0.1"),
    ({"momentum_decay": -0.1}, "momentum_decay must be a finite number >= 0; got -0.1"),
    ({"variant": "adam"}, "variant must be one of torch, keras, optax, lucid; got 'adam'"),
    (
        {"variant": "lucid", "decoupled_weight_decay": True},
        "decoupled_weight_decay must be False with variant='lucid'; got True",
    ),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or None; got 0.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm must be > 0 or None; got nan"),
    ({"max_grad_norm": "1"}, "max_grad_norm must be a real number; got '1'"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("settings", "told"), WRONG_SETTINGS)
def test_a_wrong_setting_is_refused(comm, alone, settings, told):
    with refused(comm, HyperparamsError, told, alone=alone):
        make_optimizer(comm, **settings if errs(comm, alone) else {})


@BOTH_WAYS
def test_a_wrong_setting_of_a_group_is_refused(comm, alone):
    first, *others = make_params()
    group = {"params": others, "lr": -2 if errs(comm, alone) else 2}
    with refused(comm, HyperparamsError, "lr must be", "got -2", alone=alone):
        make_optimizer(comm, [{"params": [first]}, group])


WRONG_POLICIES = [
    ({"bucket_nbytes": 0}, "policy.bucket_nbytes must be a whole number >= 1 or None; got 0"),
    (
        {"bucket_nbytes": 1e6},
        "policy.bucket_nbytes must be a whole number >= 1 or None; got 1000000.0",
    ),
    (
        {"bucket_nbytes": "32MB"},
        "policy.bucket_nbytes must be a whole number >= 1 or None; got '32MB'",
    ),
    (
        {"share_node": 0},
        "policy.share_node must be True, False or a whole number >= 1; got 0",
    ),
    ({"overlap": None}, "policy.overlap must be True or False; got None"),
    ({"check_finite": "no"}, "policy.check_finite must be True, False or None; got 'no'"),
    (
        {"wire_dtype": "float32"},
        "policy.wire_dtype must be bfloat16, float16 or None; got 'float32'",
    ),
    ({"master_weights": 0}, "policy.master_weights must be True, False or None; got 0"),
    ({"threads": 0}, "policy.threads must be a whole number >= 1 or None; got 0"),
    ({"timeout_s": 0}, "policy.timeout_s must be a number > 0; got 0"),
    ({"timeout_s": float("nan")}, "policy.timeout_s must be a number > 0; got nan"),
]


@pytest.mark.parametrize(("settings", "told"), WRONG_POLICIES)
def test_a_wrong_policy_is_refused(comm, settings, told):
    with refused(comm, HyperparamsError, told):
        ShardPolicy(**settings)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"policy": {"threads": 1}}, "policy must be of type ShardPolicy; got {'threads': 1}"),
        ({"comm": 3}, "comm must be of type Intracomm; got 3"),
    ],
)
def test_policy_and_comm_are_no_other_things(comm, setting, told):
    with refused(comm, HyperparamsError, told):
        NAdam(make_params(), **{"comm": comm, **setting})


def named(*arrays):
    """Parameters called a, b, c ..."""
    return [Parameter(array, name) for array, name in zip(arrays, "abcdef", strict=False)]


def listed_twice():
    param = Parameter(np.ones(3), "a")
    return [param, *make_params(), param]


def in_two_groups():
    param = Parameter(np.ones(3), "a")
    return [{"params": [param]}, {"params": [param]}]


def same_name():
    return [Parameter(np.ones(3), "a"), Parameter(np.ones(3), "a")]


def overlapping(cut):
    base = np.zeros((4, 4), np.float32)
    return named(np.ones(2, np.float32), base, cut(base))


def between_interleaved():
    base = np.zeros((4, 6), np.float32)
    return base[:, ::2], base[1:3, 1::2], base[1:2, 1:2]


UNUSABLE = {
    "named array": (lambda: [("a", np.ones(3))], "params must hold shardopt.numpy.Parameter"),
    "too few names": (
        lambda: [{"params": make_params(), "param_names": ["a"]}],
        "param_names must have one name for each",
    ),
    "empty list": (list, "params must hold at least one parameter; got an empty list"),
    "empty iterator": (partial(iter, ()), "params must hold at least one parameter"),
    "single parameter": (
        lambda: Parameter(np.ones(3)),
        "params must be an iterable of parameters or dicts; got Parameter. Put a single",
    ),
    "number": (lambda: 3, "params must be an iterable of parameters or dicts; got int"),
    "bare array": (lambda: np.ones((2, 3)), "shardopt.numpy.Parameter; got ndarray. Wrap"),
    "array in list": (lambda: [np.ones(3)], "shardopt.numpy.Parameter; got ndarray. Wrap"),
    "dict of parameters": (lambda: {"a": Parameter(np.ones(3))}, "Parameter; got str. Wrap"),
    "group without params": (lambda: [{"lr": 0.1}], "a param group must be a dict with 'params'"),
    "group and parameter": (
        lambda: [{"params": named(np.ones(3))}, *named(np.ones(3))],
        "a param group must be a dict with 'params'; got Parameter('a', shape=(3,))",
    ),
    "partly named": (
        lambda: [("a", Parameter(np.ones(3))), Parameter(np.ones(3))],
        "params must be named all or not at all; got both",
    ),
    "set": (lambda: set(named(np.ones(3))), "params must be in order; got set"),
    "set in group": (
        lambda: [{"params": set(named(np.ones(3)))}],
        "params must be in order; got set",
    ),
    "listed twice": (listed_twice, "each parameter must be listed once; got 'a' again as 'a'"),
    "in two groups": (in_two_groups, "each parameter must be listed once; got 'a' again as 'a'"),
    "same name": (same_name, "names must be unique; got 'a' for parameters 0 and 1"),
    "same array": (
        partial(overlapping, lambda base: base),
        "parameters must not share memory; got 'b' and 'c' overlapping",
    ),
    "overlapping rows": (
        partial(overlapping, lambda base: base[1:3]),
        "parameters must not share memory; got 'b' and 'c' overlapping",
    ),
    "transposed view": (
        partial(overlapping, lambda base: base.T),
        "parameters must not share memory; got 'b' and 'c' overlapping",
    ),
    "between interleaved": (
        lambda: named(*between_interleaved()),
        "parameters must not share memory; got 'b' and 'c' overlapping",
    ),
    "view of other dtype": (
        partial(overlapping, lambda base: base.view(np.float64)[:, :1]),
        "parameters must not share memory; got 'b' and 'c' overlapping",
    ),
    "int": (
        lambda: named(np.ones(3), np.arange(3)),
        "data of parameter 'b' must be floating point; got dtype int64. Convert it with",
    ),
    "bool": (
        lambda: named(np.ones(3) > 0),
        "data of parameter 'a' must be floating point; got dtype bool",
    ),
    "complex": (lambda: named(np.ones(3) * 1j), "floating point; got dtype complex128"),
    "object": (lambda: named(np.array([None, 1.0])), "floating point; got dtype object"),
    "text": (lambda: named("text"), "floating point; got dtype <U4"),
    "no array": (lambda: named(None), "floating point; got dtype object"),
    "ragged list": (
        lambda: named([[1.0], [1.0, 2.0]]),
        "data of parameter 'a' must be an array; got a list. Make it a NumPy array.",
    ),
    "sparse": (
        lambda: named(Sparse()),
        "data of parameter 'a' must be dense; got Sparse. Call .toarray() on it.",
    ),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_parameters_are_refused(comm, alone, case):
    make, told = UNUSABLE[case]
    with refused(comm, PartitionError, told, alone=alone):
        make_optimizer(comm, make() if errs(comm, alone) else make_params())


@BOTH_WAYS
def test_a_float_type_without_kernel_is_refused(comm, alone):
    params = named(np.ones(3, np.longdouble if errs(comm, alone) else np.float32))
    with refused(comm, KernelError, np.dtype(np.longdouble).name, alone=alone):
        make_optimizer(comm, params)


@BOTH_WAYS
def test_parameters_of_a_refused_optimizer_are_as_before(comm, alone):
    params = make_params()
    arrays = [param.data for param in params]
    values = [array.copy() for array in arrays]
    with pytest.raises(HyperparamsError):
        make_optimizer(comm, params, lr=-1 if errs(comm, alone) else 1)
    for param, array, value in zip(params, arrays, values, strict=True):
        assert param.data is array
        assert param.grad is None
        assert (array == value).all()
    with make_optimizer(comm, params) as opt:
        assert_steps(opt)


# -- what is unusual but fine ----------------------------------------------------------------------


def read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def every_second(array):
    spaced = np.zeros((array.shape[0], 2 * array.shape[1]), array.dtype)
    spaced[:, ::2] = array
    return spaced[:, ::2]


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = {
    "Fortran order": np.asfortranarray,
    "negative strides": lambda array: array[::-1, ::-1].copy()[::-1, ::-1],
    "every second": every_second,
    "read-only": read_only,
    "unaligned": unaligned,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "subclass": lambda array: array.view(np.matrix),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_layout_is_adopted_with_equal_results(comm, dtype):
    rng = np.random.default_rng(0)
    value = rng.standard_normal((3, 4)).astype(dtype)
    grads = rng.standard_normal((3, 3, 4)).astype(dtype)
    plain = Parameter(value.copy(), "plain")
    others = [Parameter(layout(value), name) for name, layout in LAYOUTS.items()]
    with make_optimizer(comm, [plain, *others]) as opt:
        for grad in grads:
            opt.zero_grad()
            for param in params_of(opt):
                param.grad += grad
            opt.step()
        for param in others:
            assert param.data.tobytes() == plain.data.tobytes(), param.name
        assert not (plain.data == value).any()
    for param in others:
        assert param.data.flags.c_contiguous


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "big-endian"])
def test_any_layout_of_a_gradient_is_copied_in(comm, layout):
    grad = np.arange(12, dtype=np.float32).reshape(3, 4)
    plain, other = named(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    with make_optimizer(comm, [plain, other]) as opt:
        plain.grad[...] = grad
        other.grad = LAYOUTS[layout](grad)
        opt.step()
        assert other.data.tobytes() == plain.data.tobytes()


def test_interleaved_views_of_one_array_are_adopted(comm):
    base = np.zeros((4, 6), np.float32)
    with make_optimizer(comm, named(base[:, ::2], base[:, 1::2])) as opt:
        assert_steps(opt)
    assert not base.any()


def test_empty_parameters_are_adopted(comm):
    for params in ([{"params": []}], named(np.zeros((0, 3), np.float32))):
        with make_optimizer(comm, params, max_grad_norm=1.0) as opt:
            take_step(opt)
            assert opt.last_step.grad_norm == 0.0


class OddError(Exception):
    """It wants two arguments and cannot travel."""

    def __init__(self, name, size):
        super().__init__(f"no layer {name} of size {size}")
        self.handler = lambda: name


@BOTH_WAYS
def test_an_error_that_cannot_travel_is_told_in_its_words(comm, alone):
    def parameters():
        yield from make_params()
        if errs(comm, alone):
            raise OddError("h", 3)

    with pytest.raises(RuntimeError, match="OddError: no layer h of size 3") as caught:
        make_optimizer(comm, parameters())
    assert str(caught.value).startswith(f"rank {comm.size - 1}: ") == (alone and comm.size > 1)
