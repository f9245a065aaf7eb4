"""Offloaded updates are a pipeline with the bits of the CPU: [Note: copies beside updates].

Nothing here depends on time: a device makes its copies as late as it is allowed to, or in threads
that a test holds until the kernel has come to a certain bucket.
"""

import threading

import ml_dtypes
import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import arena_devices, fill, memory_of, on_device
from tests.support.queued_device import PATIENCE_S, QueuedDevice

pytestmark = pytest.mark.mpi

SHAPES = [(9000,), (), (3, 5), (70, 70), (0,), (30_000,)]
PACES = [("threads", None), ("lazy", 0.5), ("last rank lazy", None), ("last rank lazy", 0.5)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@pytest.fixture
def make_opt(monkeypatch, comm):
    """Return a function that makes an optimizer whose parameters are on a device of its own."""

    def make(values, *, device=None, **options):
        policy = {"offload": "cpu", "timeout_s": PATIENCE_S} | options.pop("policy", {})
        params = [Parameter(on_device(value)) for value in values]
        with arena_devices(monkeypatch, QueuedDevice, **(device or {})):
            opt = NAdam(params, comm=comm, policy=ShardPolicy(**policy), **options)
        return params, opt, device_of(opt)

    return make


@pytest.fixture
def make_reference(comm):
    """Return a function that makes the same on CPUs."""

    def make(values, **options):
        params = [Parameter(value.copy()) for value in values]
        return params, NAdam(params, comm=comm, policy=ShardPolicy(timeout_s=60), **options)

    return make


def device_of(opt):
    return opt.core.parts.residence.holder


def draw(rng, dtype, shapes=SHAPES):
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def set_grads(params, others, grads, *, absent=()):
    """Give two models the same gradients, or none."""
    for index, grad in enumerate(grads):
        if index in absent:
            params[index].grad = others[index].grad = None
        else:
            fill(params[index].grad, grad)
            others[index].grad[...] = grad


def assert_same(params, others):
    for param, other in zip(params, others, strict=True):
        assert memory_of(param.data).tobytes() == other.data.tobytes()


def is_lazy(comm, pace):
    """Whether the device of this rank makes its copies as late as possible."""
    return pace == "lazy" or (pace == "last rank lazy" and comm.rank == comm.size - 1)


def one_bucket(comm, num_chunks=1):
    """The bytes of a bucket in which each rank has so many chunks of a float32 parameter."""
    return CHUNK_NUMEL * comm.size * num_chunks * 4


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pace", "max_grad_norm"), PACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_have_the_bits_of_the_cpu(comm, make_opt, make_reference, dtype, max_grad_norm, pace):
    start = draw(np.random.default_rng(0), dtype)
    options = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "lr": 0.1}
    policy = {"bucket_nbytes": 1}  # a chunk: many buckets, of which not all ranks have a shard
    params, opt, _ = make_opt(
        start, device={"is_lazy": is_lazy(comm, pace)}, policy=policy, **options
    )
    others, reference = make_reference(start, **options)
    rng = np.random.default_rng(comm.rank + 1)
    for step in range(4):
        opt.zero_grad()
        reference.zero_grad()
        absent = {3} if step in (1, 3) else {0} if comm.rank and step == 2 else set()
        set_grads(params, others, draw(rng, dtype), absent=absent)
        opt.step()
        reference.step()
        assert_same(params, others)
        assert opt.last_step.grad_norm == reference.last_step.grad_norm
    reference.close()
    opt.close()


@pytest.mark.parametrize("pace", ["lazy", "last rank lazy"])
def test_averages_have_the_bits_of_the_cpu(comm, make_opt, make_reference, pace):
    start = draw(np.random.default_rng(0), np.float32)
    policy = {"bucket_nbytes": one_bucket(comm)}
    params, opt, _ = make_opt(start, device={"is_lazy": is_lazy(comm, pace)}, policy=policy)
    others, reference = make_reference(start)
    rng = np.random.default_rng(comm.rank + 1)
    for step in range(3):
        opt.zero_grad()
        reference.zero_grad()
        absent = {3} if step == 1 else {0} if comm.rank and step == 2 else set()
        set_grads(params, others, draw(rng, np.float32), absent=absent)
        if step != 1:
            opt.average_grads()
            reference.average_grads()
            for param, other in zip(params, others, strict=True):
                assert memory_of(param.grad).tobytes() == other.grad.tobytes()
                fill(param.grad, 2 * other.grad)  # the step takes what is there now
                other.grad *= 2
        opt.step()
        reference.step()
        assert_same(params, others)
    reference.close()
    opt.close()


def test_loss_scales_of_ranks_may_differ(comm, make_opt, make_reference):
    start = draw(np.random.default_rng(0), np.float32)
    params, opt, _ = make_opt(start, policy={"bucket_nbytes": one_bucket(comm)})
    others, reference = make_reference(start)
    set_grads(params, others, draw(np.random.default_rng(comm.rank), np.float32))
    for each in (opt, reference):  # some ranks send their gradients once more
        each.step(loss_scale=2.0**comm.rank)
    assert_same(params, others)
    reference.close()
    opt.close()


def test_parameters_may_be_added_and_a_step_refused(comm, make_opt, make_reference):
    start = draw(np.random.default_rng(0), np.float32)
    params, opt, _ = make_opt(start, policy={"bucket_nbytes": one_bucket(comm)})
    others, reference = make_reference(start)
    rng = np.random.default_rng(comm.rank)
    for step in range(3):
        set_grads(params, others, draw(rng, np.float32))
        if step == 1:
            before = memory_of(params[0].data).copy()
            right = comm.rank < comm.size - 1
            with pytest.raises(ValueError, match="loss"):  # gradients are on their way by then
                opt.step(loss_scale=1.0 if right else float("nan"))
            assert memory_of(params[0].data).tobytes() == before.tobytes()
            more = np.arange(5000, dtype=np.float32)
            params.append(Parameter(on_device(more)))
            others.append(Parameter(more.copy()))
            opt.add_param_group({"params": params[-1:]})
            reference.add_param_group({"params": others[-1:]})
            continue
        opt.step()
        reference.step()
        assert_same(params, others)
    reference.close()
    opt.close()


# -- at the same time ------------------------------------------------------------------------------


class Kernel:
    """Counts the buckets that the kernel has begun to update, and lets others wait for that."""

    def __init__(self, opt, before=None):
        self._kernel = opt.core.parts.backend.kernel
        self._update = self._kernel.update
        self._before = before
        self._condition = threading.Condition()
        self._num_begun = 0
        self._kernel.update = self

    def __call__(self, *args):
        with self._condition:
            number = self._num_begun
            self._num_begun += 1
            self._condition.notify_all()
        if self._before is not None:
            self._before(number)
        self._update(*args)

    def wait_for(self, number):
        """Wait until the update of a bucket has begun."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._num_begun > number, PATIENCE_S)


def model(comm, num_buckets):
    return [np.ones(CHUNK_NUMEL * comm.size * num_buckets, np.float32)]


def test_gradients_come_down_while_the_kernel_updates_the_bucket_before(comm, make_opt):
    done = [threading.Event() for _ in range(6)]
    begun = {}

    def gate(name, number):
        if name == "down" and number > 0:
            begun["kernel"].wait_for(number - 1)  # else not before it
        if name == "down" and number > 1:
            done[number - 1].set()

    def before(number):
        if 0 < number < 4:  # and not after it
            assert done[number].wait(PATIENCE_S)

    policy = {"bucket_nbytes": one_bucket(comm), "timeout_s": 20}
    params, opt, device = make_opt(model(comm, 6), device={"gate": gate}, policy=policy)
    begun["kernel"] = Kernel(opt, before)
    fill(params[0].grad, 1.0)
    opt.step()
    assert [name for name, _ in device.log].count("down") == 6
    opt.close()


def test_parameters_go_up_while_the_kernel_updates_the_next_bucket(make_opt, comm):
    """On a rank of its own, as nobody knows when the others have updated theirs."""
    if comm.size > 1:
        pytest.skip("one rank")
    done = [threading.Event() for _ in range(6)]
    begun = {}

    def gate(name, number):
        if name == "up" and number < 5:
            begun["kernel"].wait_for(number + 1)
            done[number].set()

    def before(number):
        if number > 0:
            assert done[number - 1].wait(PATIENCE_S)

    policy = {"bucket_nbytes": one_bucket(comm)}
    params, opt, device = make_opt(model(comm, 6), device={"gate": gate}, policy=policy)
    begun["kernel"] = Kernel(opt, before)
    fill(params[0].grad, 1.0)
    opt.step()
    assert [name for name, _ in device.log].count("up") == 6
    opt.close()


# -- bytes -----------------------------------------------------------------------------------------


def test_what_is_not_trained_does_not_travel(comm, make_opt):
    """Neither do gradients that nobody has, once those of earlier steps are overwritten."""
    numel = 2 * CHUNK_NUMEL * comm.size
    params, opt, device = make_opt([np.ones(numel, np.float32) for _ in range(3)])
    frozen, sparse, dense = params
    for index, expected in enumerate([2, 2, 1, 1, 2]):
        frozen.grad = None
        fill(dense.grad, 1.0)
        if index in (0, 4):
            sparse.grad = on_device(np.ones(numel, np.float32))
        else:
            sparse.grad = None
        before = device.nbytes("down"), device.nbytes("up")
        opt.step()
        down, up = device.nbytes("down") - before[0], device.nbytes("up") - before[1]
        if index > 0:  # at first nobody knows what is at home
            assert down == expected * 4 * numel
        assert up == (2 if index in (0, 4) else 1) * 4 * numel
    opt.close()


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
def test_a_skipped_step_takes_nothing_up(comm, make_opt):
    start = draw(np.random.default_rng(0), np.float32)
    policy = {"check_finite": True, "bucket_nbytes": one_bucket(comm)}
    params, opt, device = make_opt(start, policy=policy)
    before = device.nbytes("up")
    fill(params[0].grad, np.inf if comm.rank == comm.size - 1 else 1.0)
    opt.step()
    assert opt.last_step.skipped
    opt.step(overflowed=comm.rank == 0)
    assert opt.last_step.skipped
    assert device.nbytes("up") == before
    fill(params[0].grad, 1.0)
    opt.step()
    assert device.nbytes("up") > before
    opt.close()


@pytest.mark.parametrize("is_skipped", [False, True])
def test_what_users_have_written_goes_up_without_a_gradient(comm, make_opt, is_skipped):
    start = draw(np.random.default_rng(0), ml_dtypes.bfloat16)
    params, opt, _ = make_opt(start)
    opt.zero_grad()
    params[0].grad = params[3].grad = None
    opt.step()
    opt.state[params[0]]["master"][...] = 0.75
    value = np.asarray(0.5, ml_dtypes.bfloat16)
    params[3].data = on_device(np.full(SHAPES[3], value))
    opt.step(overflowed=is_skipped)
    assert opt.last_step.skipped is is_skipped
    assert (memory_of(params[0].data) == np.asarray(0.75, ml_dtypes.bfloat16)).all()
    assert (memory_of(params[3].data) == value).all()
    opt.close()
