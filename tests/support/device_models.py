"""Optimizers on a device beside their like on CPUs, which must have the same bits."""

import contextlib

import numpy as np

from shardopt import NAdam, Parameter, ShardPolicy
from tests.support.arena_device import ArenaDevice, arena_devices, fill, memory_of, on_device
from tests.support.models import SPECS, make_params, params_of

WAYS = ["direct", "staged", "offload"]


class CountingDevice(ArenaDevice):
    """Counts the bytes that it copies, and the buffers that it has been asked for."""

    def __init__(self, arena, **options):
        super().__init__(arena, **options)
        self.copied_nbytes = self.num_buffers = 0

    def copy(self, target, source):
        self.copied_nbytes += target.nbytes
        super().copy(target, source)

    def host_zeros(self, numel, dtype):
        self.num_buffers += 1
        return super().host_zeros(numel, dtype)


def build_on(monkeypatch, comm, way, seed=0, specs=SPECS, bucket_nbytes=30_000, **settings):
    """An optimizer of ``models.build``, on a device unless the way is ``cpu``."""
    params = make_params(seed, specs)
    policy = {"bucket_nbytes": bucket_nbytes, "timeout_s": 30, **settings.pop("policy", {})}
    if way == "offload":
        policy["offload"] = "cpu"
    if way != "cpu":
        params = [Parameter(on_device(param.data), param.name) for param in params]
    with contextlib.ExitStack() as stack:
        if way != "cpu":
            has_peers = way != "staged"
            stack.enter_context(arena_devices(monkeypatch, CountingDevice, has_peers=has_peers))
        return NAdam(params, comm=comm, policy=ShardPolicy(**policy), **settings)


def train(opt, steps, rank=0, skipped=()):
    """Steps whose gradients depend on the step and the rank; some parameters have none."""
    for step in steps:
        opt.zero_grad()
        for index, param in enumerate(params_of(opt)):
            seed = [step, rank, *param.name.encode()]
            grad = np.random.default_rng(seed).standard_normal(param.data.shape)
            if index in skipped:
                param.grad = None
            else:
                fill(param.grad, grad.astype(param.data.dtype))
        opt.step()


def values_of(opt):
    """The bits of all parameters, as this rank's framework has them."""
    return {param.name: memory_of(param.data).tobytes() for param in params_of(opt)}


def entries_of(opt):
    """The bits of the whole state, on every rank."""
    state = opt.comm.bcast(opt.gather_state_dict())
    return _bits(state["state"]), repr(state["param_groups"])


def shown_by(opt):
    """The bits of the state as this rank's user sees it."""
    return _bits(dict(enumerate(opt.state.values())))


def _bits(entries):
    return {
        (index, key): np.asarray(value).astype(np.asarray(value).dtype).tobytes()
        for index, entry in entries.items()
        for key, value in entry.items()
    }


class Twins:
    """An optimizer on a device and its like on CPUs.

    Args:
        make: Makes an optimizer for a way, such as ``cpu``.
        way: That of the device.
    """

    def __init__(self, make, way):
        self.device, self.cpu = make(way), make("cpu")
        self.rank = self.device.comm.rank

    def both(self, do):
        """Do something to both, each on all ranks."""
        for opt in (self.device, self.cpu):
            do(opt)

    def train(self, steps, **options):
        self.both(lambda opt: train(opt, steps, self.rank, **options))
        self.assert_alike()

    def assert_alike(self):
        assert values_of(self.device) == values_of(self.cpu)
        assert entries_of(self.device) == entries_of(self.cpu)

    def close(self):
        self.both(lambda opt: opt.close())
