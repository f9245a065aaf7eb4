"""What the tests of random streams share: streams of every kind, and how files keep them."""

import json
import random
import sys

import numpy as np

from shardopt.checkpoint.rng.streams import capture_rng

KINDS = ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


def encode(value):
    """Make JSON of JSON values and arrays; anything else fails the test."""
    if type(value) is np.ndarray:
        return {"dtype": value.dtype.str, "shape": value.shape, "bytes": value.tobytes().hex()}
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        return {key: encode(item) for key, item in value.items()}
    if type(value) is list:
        return list(map(encode, value))
    assert value is None or type(value) in (bool, int, float, str), type(value)
    return value


def decode(entry):
    """Make an array again of what was one; it is read-only."""
    if "bytes" not in entry:
        return entry
    array = np.frombuffer(bytes.fromhex(entry["bytes"]), entry["dtype"])
    return array.reshape(entry["shape"])


def through_json(state):
    """What a checkpoint gives back of a state."""
    return json.loads(json.dumps(encode(state)), object_hook=decode)


def make_generator(kind, seed):
    """A generator by the name of its bit generator."""
    return np.random.Generator(getattr(np.random, kind)(seed))


def seed_all(seed):
    """Seed the global streams and a generator of every kind; nothing is at its beginning then."""
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    generators = {kind: make_generator(kind, seed) for kind in KINDS}
    draw(generators)
    return generators


def draw(generators):
    """Draw from all streams, an odd number wherever the other half of a pair is held back."""
    drawn = [random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal()]
    for name in sorted(generators):
        thirds = generators[name].random(3, np.float32).tolist()
        drawn += [*thirds, generators[name].standard_normal()]
    if torch := sys.modules.get("torch"):
        drawn += [*torch.rand(3).tolist(), float(torch.randn(()))]
    return drawn


def standing(generators):
    """Where all streams are, to be compared."""
    return json.dumps(encode(capture_rng(**generators)), sort_keys=True)
