"""An optimizer on devices beside one on CPUs, of the same ranks, that must have the same bits."""

import warnings
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import shardopt.numpy
from shardopt import ShardPolicy
from shardopt.backends.base import address_of
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import (
    DeviceArray,
    arena_devices,
    change,
    fill,
    on_device,
    values_of,
)
from tests.support.device_queue import QUEUE

WAYS = ("direct", "staged", "offload")
SHAPES = [(9000,), (), (3, 5), (70, 70), (0,), (5000,)]
BFLOAT16 = ml_dtypes.bfloat16

up_to_two_ranks = pytest.mark.skipif(MPI.COMM_WORLD.size > 2, reason="two ranks show it")
up_to_three_ranks = pytest.mark.skipif(MPI.COMM_WORLD.size > 3, reason="three ranks show it")


def draw(rng, dtype=np.float32, shapes=SHAPES):
    """Return random arrays."""
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in shapes]


class CountingAdapter(shardopt.numpy._NumpyAdapter):
    """The adapter of a framework that counts writes to arrays, as torch does."""

    def __init__(self):
        self._versions = {}

    def note_value(self, param):
        self._versions[param] = _version(param.data)

    def was_written(self, param):
        return _version(param.data) != self._versions.get(param, _version(param.data))


def _version(array):
    return QUEUE.versions.get(address_of(array), 0) if isinstance(array, DeviceArray) else 0


@contextmanager
def devices_of(monkeypatch, way, *, counts_writes=False, **device):
    """Make optimizers take devices, in one of the three ways.

    Yields:
        The devices.
    """
    with (
        arena_devices(monkeypatch, has_peers=way != "staged", **device) as devices,
        monkeypatch.context() as patched,
    ):
        if counts_writes:
            patched.setattr(shardopt.numpy, "_NumpyAdapter", CountingAdapter)
        yield devices


def policy_of(way, **options):
    """Return a policy for one of the three ways."""
    return ShardPolicy(timeout_s=60, offload="cpu" if way == "offload" else None, **options)


class Pair:
    """Parameters on the device, and the same on the host, with an optimizer each.

    Args:
        comm: All ranks.
        monkeypatch: The fixture.
        way: One of ``WAYS``.
        start: The parameters' values.
        device: Options of ``devices_of``.
        policy: Options of the policies.
        **options: Of the optimizers.

    Attributes:
        params: Parameters on the device.
        others: The same on the host.
        opt: The optimizer of the former.
        reference: That of the latter.
        device: The device.
        differences: What differs, if that is to be found later on all ranks; else None.
    """

    differences = None

    def __init__(self, comm, monkeypatch, way, start, *, device=None, policy=None, **options):
        self.comm, self.way = comm, way
        self.params = [Parameter(on_device(value)) for value in start]
        self.others = [Parameter(np.array(value)) for value in start]
        options = {"lr": 0.1, "weight_decay": 0.1} | options
        with devices_of(monkeypatch, way, **device or {}) as devices:
            policies = policy_of(way, **policy or {}), ShardPolicy(timeout_s=60, **policy or {})
            self.opt = NAdam(self.params, comm=comm, policy=policies[0], **options)
        self.reference = NAdam(self.others, comm=comm, policy=policies[1], **options)
        (self.device,) = devices
        self.rng = np.random.default_rng(comm.rank + 1)  # of this rank's gradients
        self.same = np.random.default_rng(0)  # of what all ranks write alike

    def grads(self, *, zero=True, without=()):
        """Write new gradients, different ones on each rank; those of some parameters are None."""
        if zero:
            self.both(lambda opt: opt.zero_grad())
        for index, (param, other) in enumerate(zip(self.params, self.others, strict=True)):
            grad = self.draw(other)
            if index in without:
                param.grad = other.grad = None
            elif other.grad is not None:
                fill(param.grad, grad)
                other.grad[...] = grad

    def draw(self, like, rng=None):
        """Return random values like those of a parameter, or of an array."""
        array = like.data if isinstance(like, Parameter) else like
        return np.asarray((rng or self.rng).standard_normal(array.shape)).astype(array.dtype)

    def write(self, function, which=None):
        """Write what a function makes of parameters into them."""
        for index, (param, other) in enumerate(zip(self.params, self.others, strict=True)):
            if which is None or index in which:
                change(param.data, function)
                other.data[...] = function(other.data)

    def both(self, call):
        """Make a call of both optimizers; both must return or raise the same."""
        results = []
        for opt in (self.opt, self.reference):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                try:
                    result = call(opt)
                except Exception as error:
                    result = type(error), str(error)
            results.append((result, [str(each.message) for each in found]))
        self._require(results[0] == results[1], f"calls: {results}")
        return results[0]

    def step(self, **options):
        """Take a step with both, and compare everything."""
        result, told = self.both(lambda opt: opt.step(**options))
        self._require(result is None, result)
        self.compare()
        return told

    def compare(self):
        """Compare the parameters bit for bit, and the reports."""
        for index, (param, other) in enumerate(zip(self.params, self.others, strict=True)):
            is_same = values_of(param.data).tobytes() == other.data.tobytes()
            self._require(is_same, f"values of parameter {index}")
        ours, theirs = self.opt.last_step, self.reference.last_step
        for name in (
            *("step", "grad_norm", "clip_factor", "skipped"),
            *("num_updated", "loss_scale", "poisoned_param"),
        ):
            values = getattr(ours, name), getattr(theirs, name)
            self._require(repr(values[0]) == repr(values[1]), f"{name}: {values}")

    def _require(self, is_met, what):
        if self.differences is None:
            assert is_met, what
        elif not is_met:
            self.differences.append(f"must be the same; got another {what}")

    def close(self):
        """Close both."""
        self.opt.close()
        self.reference.close()
