"""A fence, an event or a wait that is missing is found in every run, for each that there is."""

import __future__

import inspect
import textwrap

import numpy as np
import pytest

from shardopt.core.optimizer import Optimizer
from shardopt.core.parts import Parts
from shardopt.core.shared_params import SharedParams
from shardopt.core.step import Step
from shardopt.store import staging
from shardopt.store.device import OnDevice
from shardopt.transport.averaging import AveragedGrads
from shardopt.transport.copies import CopiesBeside
from shardopt.transport.reduction import InPlaceReduction
from tests.support.arena_device import fill, on_device, values_of
from tests.support.device_queue import QUEUE, note
from tests.support.device_training import Pair, up_to_three_ranks, up_to_two_ranks

pytestmark = pytest.mark.mpi(min_size=2)

PUBLISH, ACQUIRE = "parts.memory.publish()", "parts.memory.acquire()"
LEFT = 'parts.meet(step, "adopt")'
SHOWN = "self._shown.wait()"
LANDING = "while self._landing and self._landing[0].is_done():"
HOME = "self._num_home = min(self._announced(_LANDED))"
SHOWING = "self._show(min(self._announced(_UPDATED)))"
DIRECT, STAGED, OFFLOAD = {"direct"}, {"staged"}, {"offload"}
ALL = DIRECT | STAGED | OFFLOAD


def train(pair):
    """Take steps with everything that has others read or write what a rank holds."""
    for step in range(3):
        pair.grads(without=[1])
        if step == 1:
            pair.both(lambda opt: opt.average_grads())
        pair.write(lambda values: values * values.dtype.type(0.5), [0, 1])
        if step == 2:
            for index in (0, 1):
                value = pair.draw(pair.others[index])
                pair.params[index].data, pair.others[index].data = on_device(value), value
        pair.step(loss_scale=1.0 if step == 1 else 2.0**pair.comm.rank)


def train_apart(pair):
    """Average gradients, and take a step, on nodes of one rank."""
    pair.grads()
    pair.both(lambda opt: opt.average_grads())
    pair.step()


def skip(pair):
    """Take a step that updates nothing, as a gradient is NaN, between others."""
    for step in range(3):
        pair.grads()
        if step == 1 and pair.comm.rank == 0:
            fill(pair.params[0].grad, np.nan)
            pair.others[0].grad[...] = np.nan
        pair.step()


def load(pair):
    """Load values, and take those of one rank."""
    pair.grads()
    pair.both(lambda opt: opt.step())  # and no look at what is still being copied
    values = [pair.draw(other, pair.same) for other in pair.others]
    named = {f"param{index}": value for index, value in enumerate(values)}
    pair.both(lambda opt: opt.load_params(named))
    pair.compare()
    pair.grads()
    pair.step()
    pair.both(lambda opt: opt.adopt(rank=pair.comm.size - 1))
    pair.compare()


def clamp(pair):
    """Take steps with writes that the framework counts."""
    for _ in range(2):
        pair.grads()
        pair.write(lambda values: np.clip(values, -0.5, 0.5))
        pair.step()


def save(pair):
    """Have owners bring home what users have written, as a save does."""
    core = pair.opt.core
    for _ in range(2):
        pair.write(lambda values: values * values.dtype.type(0.5))
        changes = core.params.find_changes()
        core.enter_call("save()", {})
        core.settle(changes)
        core.parts.residence.bring_home(params=True, state=False)
        core.parts.meet(0, "save()")
        for binding, other in zip(core.parts.registry.bindings, pair.others, strict=True):
            note("save", [binding.data], by_host=True)
            if binding.data.tobytes() != other.data.tobytes():
                pair.differences.append(binding.name)
        core.parts.meet(0, "save()")
    pair.reference.adopt(0)


def close(pair):
    """Take a step and close."""
    pair.grads()
    pair.both(lambda opt: opt.step())
    pair.close()
    others = [np.array(other.data) for other in pair.others]
    pair.comm.Barrier()
    for index, (param, other) in enumerate(zip(pair.params, others, strict=True)):
        if values_of(param.data).tobytes() != other.tobytes():
            pair.differences.append(f"parameter {index}")


PLANTED = [  # the work, function, line, its number among equal ones, the ways in which it matters
    (train, Step.run, PUBLISH, 0, ALL),
    (train, Step.run, ACQUIRE, 0, ALL),
    (train, Step.run, PUBLISH, 1, DIRECT | STAGED),
    (train, Step.run, ACQUIRE, 1, DIRECT | STAGED),
    (skip, Step.run, PUBLISH, 1, OFFLOAD),  # what flags order otherwise
    (skip, Step.run, ACQUIRE, 1, OFFLOAD),
    (train, Parts.meet, "self.memory.publish()", 0, ALL),
    (train, Parts.meet, "self.memory.acquire()", 0, ALL),
    (train, OnDevice.publish, "self._device.publish()", 0, ALL),
    (train, OnDevice.acquire, "self._device.acquire()", 0, ALL),
    (train_apart, OnDevice.send_grads, "self._device.wait()", 0, OFFLOAD),
    (train, OnDevice.adopt_unseen, "self._device.wait()", 0, OFFLOAD),
    (train, InPlaceReduction.square_sums, "self._backend.wait()", 0, DIRECT | STAGED),
    (train, AveragedGrads.square_sums, "self._backend.wait()", 1, DIRECT | STAGED),
    (load, OnDevice.publish, SHOWN, 0, STAGED | OFFLOAD),
    (train, CopiesBeside.keep_grads, "self._down.join()", 0, OFFLOAD),
    (load, CopiesBeside.show_params, "self._up.join()", 0, OFFLOAD),
    (load, CopiesBeside.show_params, "self._residence.note_shown()", 0, OFFLOAD),
    (clamp, OnDevice.bring_params_home, "self._device.wait()", 0, OFFLOAD),
    (save, staging._land, "event.wait()", 0, DIRECT | STAGED),
    (save, SharedParams.settle, LEFT, 0, DIRECT | STAGED),
    (load, Optimizer.enter_call, "self.parts.memory.publish()", 0, STAGED | OFFLOAD),
    (load, Optimizer.enter_call, "self.parts.memory.acquire()", 0, STAGED | OFFLOAD),
]


def _cases():
    for work, function, line, number, ways in PLANTED:
        for way in sorted(ways):
            name = f"{way}-{work.__name__}-{function.__qualname__}-{line}-{number}"
            yield pytest.param(work, function, line, number, way, id=name)


@pytest.fixture
def start():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(numel).astype(np.float32) for numel in (9000, 5000, 20000)]


@pytest.fixture
def run(comm, monkeypatch, start):
    """Return a function that does some work, and returns what was found on any rank."""

    load_as_it_is, land_as_it_does = SharedParams.load, staging._land

    def noting_load(self, arrays, step):  # the host itself writes what it owns
        for buffers in self._parts.memory.buffers:
            shards = [buffers.params[buffers.local(shard).slice] for shard in buffers.shards]
            note("load", shards, writes=True, by_host=True)
        load_as_it_is(self, arrays, step)

    def noting_land(event, target, buffer):  # and what it brings home
        event.wait()
        note("land", [target], writes=True, by_host=True)
        land_as_it_does(event, target, buffer)

    monkeypatch.setattr(SharedParams, "load", noting_load)
    monkeypatch.setattr(staging, "_land", noting_land)

    def run(work, way):
        QUEUE.order.take_errors()
        options = {
            "device": {"counts_writes": work in (train_apart, clamp, save)},
            "policy": {"share_node": work is not train_apart},
        }
        pair = Pair(comm, monkeypatch, way, start, max_grad_norm=0.5, **options)
        pair.differences = []  # no rank may leave the others alone
        work(pair)
        comm.Barrier()
        QUEUE.run()
        found = QUEUE.order.take_errors() + pair.differences
        return [each for of_rank in comm.allgather(found) for each in of_rank]

    return run


def replace_line(monkeypatch, function, line, number, other):
    """Have a function do something else in one of its lines."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    places = [i for i, each in enumerate(lines) if each.strip().partition("  #")[0] == line]
    lines[places[number]] = lines[places[number]].replace(line, other)
    cls, _, name = function.__qualname__.rpartition(".")
    owner = function.__globals__[cls] if cls else inspect.getmodule(function)
    namespace = {}
    flags = __future__.annotations.compiler_flag
    code = compile("\n".join(lines), "planted", "exec", flags)
    exec(code, function.__globals__, namespace)
    monkeypatch.setattr(owner, name, namespace[name])


@up_to_three_ranks
@pytest.mark.parametrize("way", sorted(ALL))
@pytest.mark.parametrize("work", [train, train_apart, skip, load, clamp, save, close])
def test_everything_is_in_order(run, work, way):
    assert run(work, way) == []


@up_to_two_ranks
@pytest.mark.parametrize(("work", "function", "line", "number", "way"), list(_cases()))
def test_what_is_missing_is_found(run, monkeypatch, work, function, line, number, way):
    replace_line(monkeypatch, function, line, number, "pass")
    assert run(work, way)


@up_to_two_ranks
@pytest.mark.parametrize(
    ("function", "line", "other"),
    [  # announced before it has landed, or shown before all have announced it
        (CopiesBeside.has_landed, LANDING, "while self._landing:"),
        (CopiesBeside.is_home, HOME, HOME.replace("min", "max")),
        (CopiesBeside.advance, SHOWING, SHOWING.replace("min", "max")),
        (CopiesBeside.advance, SHOWING, "self._show(len(self._rising))"),
    ],
)
def test_flags_that_are_raised_or_seen_too_early_are_found(run, monkeypatch, function, line, other):
    replace_line(monkeypatch, function, line, 0, other)
    assert run(train, "offload")
