"""A random state that is damaged or does not fit is refused on all ranks; no stream has moved."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.checkpoint.rng.streams import capture_rng, restore_rng
from shardopt.errors import CheckpointError, RankMismatchError
from tests.support.errors import BOTH_WAYS, differing, errs, is_last, refused
from tests.support.frameworks import require
from tests.support.models import UP_TO_THREE_RANKS
from tests.support.streams import draw, make_generator, seed_all, standing, through_json


@pytest.fixture
def generators(comm):
    return seed_all(comm.rank)


@pytest.fixture
def states(comm, generators):
    """What every rank saved; all streams have gone on since."""
    states = comm.allgather(through_json(capture_rng(**generators)))
    draw(generators)
    return states


def put(value, *path):
    """Put a value at the end of a path of keys, in a state."""

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def remove(*path):
    """Take out what is at the end of a path of keys."""

    def edit(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


def words(count, dtype):
    return np.ones(count, dtype)


PCG64, PHILOX, SFC64 = (("generators", kind) for kind in ("PCG64", "Philox", "SFC64"))
MT19937 = ("generators", "MT19937", "state")
WRONG = {
    "no key": (remove("python"), " must have the keys python, numpy, generators, torch, cupy; got"),
    "surplus key": (put(1, "jax"), " must have the keys python, numpy"),
    "a part is no dict": (put(7, "python"), "['python'] must have the keys key, pos, gauss_next; "),
    "key's dtype": (
        put(words(624, np.int64), "python", "key"),
        "['python']['key'] must be a flat array of uint32 with shape (624,); got an array of int64",
    ),
    "key's byte order": (put(words(624, ">u4"), "python", "key"), "['key'] must be a flat array"),
    "key's shape": (put(words(623, np.uint32), *MT19937, "key"), "got an array of uint32 with"),
    "key's dimensions": (put(words((624, 1), np.uint32), "numpy", "state", "key"), "['key'] must"),
    "key is a list": (put([1] * 624, "python", "key"), "got a list of 624."),
    "beyond the end": (
        put(625, "numpy", "state", "pos"),
        "['numpy']['state']['pos'] must be a whole number from 0 to 624; got 625.",
    ),
    "before the start": (put(-1, *MT19937, "pos"), "['pos'] must be a whole number from 0 to 624"),
    "position in float": (put(3.0, "python", "pos"), "['pos'] must be a whole number"),
    "position in bool": (put(True, "python", "pos"), "['pos'] must be a whole number"),
    "gauss_next": (put("1.5", "python", "gauss_next"), "['gauss_next'] must be a finite float; go"),
    "gauss": (put(float("nan"), "numpy", "gauss"), "['gauss'] must be a finite float; got nan."),
    "has_gauss": (put(2, "numpy", "has_gauss"), "['has_gauss'] must be a whole number from 0 to 1"),
    "generators": (put([], "generators"), "['generators'] must be a dict of names; got a list of"),
    "a name": (put({1: {}}, "generators"), "['generators'] must be a dict of names; got the keys"),
    "a bit generator's state": (put(None, *PCG64), " must be one of MT19937, PCG64, PCG64DXSM, "),
    "no bit generator": (remove(*PCG64, "bit_generator"), "must be one of MT19937, PCG64, PCG64DX"),
    "bit generator": (
        put("os.system", *PCG64, "bit_generator"),
        "; got 'os.system'. Load an und",
    ),
    "bit generator's type": (put(["PCG64"], *PCG64, "bit_generator"), "; got a list of 1."),
    "another's state": (put("SFC64", *PHILOX, "bit_generator"), "must have the keys bit_generator"),
    "too many bits": (
        put(1 << 128, *PCG64, "state", "state"),
        f"['state']['state'] must be a whole number from 0 to {(1 << 128) - 1}; got something else",
    ),
    "far too many bits": (put(1 << 99_999, *PCG64, "state", "inc"), "; got something else (int)."),
    "half a draw": (put(1 << 32, *SFC64, "uinteger"), "['uinteger'] must be a whole number from 0"),
    "Philox' buffer": (put(words(5, np.uint64), *PHILOX, "buffer"), "['buffer'] must be a flat"),
    "Philox' position": (put(5, *PHILOX, "buffer_pos"), "['buffer_pos'] must be a whole number"),
    "Philox' key": (put(words(2, np.int64), *PHILOX, "state", "key"), "['key'] must be a flat"),
    "SFC64": (put(words(3, np.uint64), *SFC64, "state", "state"), "['state'] must be a flat"),
    "torch": (put({}, "torch"), "['torch'] must have the keys cpu, cuda; got the keys ."),
    "torch's dtype": (
        put({"cpu": words(5056, np.int8), "cuda": []}, "torch"),
        "['torch']['cpu'] must be a flat array of uint8; got an array of int8",
    ),
    "torch's devices": (
        put({"cpu": words(5056, np.uint8), "cuda": {}}, "torch"),
        "['cuda'] must be a list",
    ),
    "torch's device": (
        put({"cpu": words(5056, np.uint8), "cuda": [b"x"]}, "torch"),
        "['cuda'][0] must be a flat array of uint8; got something else (bytes).",
    ),
    "CuPy's seed": (put({"seed": -1}, "cupy"), "['cupy']['seed'] must be a whole number from 0"),
    "a generator less": (
        remove(*SFC64),
        "generators must be those given to capture_rng, ['MT19937', 'PCG64', 'PCG64DXSM', 'Philox']"
        "; got ['MT19937', 'PCG64', 'PCG64DXSM', 'Philox', 'SFC64']. Pass each by the name",
    ),
    "generators exchanged": (
        lambda state: put(state["generators"]["PCG64"], *SFC64)(state),
        "the bit generator of generator 'SFC64' must be PCG64, as it was saved; got SFC64. Use the",
    ),
    "NumPy's bit generator": (
        lambda state: put({**state["generators"]["PCG64"], **GAUSS}, "numpy")(state),
        "the bit generator of NumPy's own functions must be PCG64, as it was saved; got MT19937.",
    ),
}
GAUSS = {"has_gauss": 0, "gauss": 0.0}


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_state_is_refused(comm, generators, states, alone, case):
    edit, told = WRONG[case]
    if errs(comm, alone):
        edit(states[comm.rank])
    before = standing(generators)
    with refused(comm, CheckpointError, told, alone=alone):
        restore_rng(states, comm, **generators)
    assert standing(generators) == before


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("state", [None, 5, "state", [], object(), {}])
def test_what_is_no_state_is_refused(comm, generators, states, alone, state):
    if errs(comm, alone):
        states[comm.rank] = state
    before = standing(generators)
    with refused(comm, CheckpointError, "] must have the keys python, numpy", alone=alone):
        restore_rng(states, comm, **generators)
    assert standing(generators) == before


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("states", [None, [], {}, 7])
def test_what_is_no_list_of_states_is_refused(comm, generators, alone, states):
    good = comm.allgather(capture_rng(**generators))
    with refused(comm, CheckpointError, "states must be a list with an entry", alone=alone):
        restore_rng(states if errs(comm, alone) else good, comm, **generators)


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
def test_torch_refuses_what_it_does_not_know(comm, generators, alone):
    torch = require("torch")
    states = comm.allgather(capture_rng(**generators))
    draw(generators)
    before = standing(generators)
    for array in (np.zeros(5056, np.uint8), np.zeros(12, np.uint8), np.zeros(0, np.uint8)):
        if errs(comm, alone):
            states[comm.rank]["torch"]["cpu"] = array
        told = f"['torch'] must be a state of torch {torch.__version__} on cpu; got "
        with refused(comm, CheckpointError, told, alone=alone):
            restore_rng(states, comm, **generators)
    assert standing(generators) == before


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
def test_a_damaged_state_is_refused_on_other_ranks_too(comm, generators, states, alone):
    states = states * 2
    if errs(comm, alone):
        states[0]["numpy"]["state"]["pos"] = 625
    before = standing(generators)
    told = "states[0]['numpy']['state']['pos'] must be a whole number"
    with refused(comm, CheckpointError, told, alone=alone):
        restore_rng(states, comm, **generators)
    assert standing(generators) == before


JUNK = [None, True, -1, 1 << 200, 0.5, float("inf"), "PCG64", [], {}, [None], b"", object()]
JUNK += [np.zeros(624), np.zeros((2, 312), np.uint32), np.zeros(4, object), np.float64(1.0)]
FITS = {
    ("python", "gauss_next"): (None, 0.5),
    ("numpy", "gauss"): (0.5,),
    ("generators",): ({},),
    ("generators", "PCG64", "bit_generator"): ("PCG64",),
    ("generators", "PCG64DXSM", "bit_generator"): ("PCG64",),  # where all are seeded anew
    ("torch",): (None,),
    ("torch", "cuda"): ([],),
    ("cupy",): (None,),
}


def paths_in(value, path=()):
    """The paths to everything within dicts."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from paths_in(value[key], (*path, key))


def test_junk_is_refused_wherever_it_stands():
    require("torch")
    generators = seed_all(0)
    state = {**capture_rng(**generators), "cupy": {"seed": 3}}
    before = standing(generators)
    for path in paths_in(state):
        for junk in JUNK:
            if any(type(junk) is type(fit) and junk == fit for fit in FITS.get(path, ())):
                continue
            damaged = through_json(state)
            put(junk, *path)(damaged)
            for states in ([damaged], [state, damaged]):
                with pytest.raises(CheckpointError, match=" must .*; got "):
                    restore_rng(states, MPI.COMM_SELF, **generators)
    assert standing(generators) == before


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("more", [1, 2])
def test_other_generators_are_refused(comm, generators, states, alone, more):
    others = {name: generators[name] for name in generators if name != "PCG64"}
    others["order"] = make_generator("PCG64", 0)
    before = standing(generators)
    with refused(comm, CheckpointError, "generators must be those given to", alone=alone):
        restore_rng(states * more, comm, **others if errs(comm, alone) else generators)
    assert standing(generators) == before


Namesake = type("PCG64", (np.random.PCG64,), {})
"""A bit generator that is not NumPy's, but called like one."""

UNSUITED = [
    (np.random.RandomState(0), "generator 'order' must be an np.random.Generator; got something"),
    (
        np.random.Generator(Namesake(0)),
        "the bit generator of generator 'order' must be one of MT19937",
    ),
]


@UP_TO_THREE_RANKS
@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize(("unsuited", "told"), UNSUITED)
def test_what_is_no_generator_is_refused(comm, alone, unsuited, told):
    order = make_generator("PCG64", 0)
    states = comm.allgather(capture_rng(order=order))
    with refused(comm, CheckpointError, told, alone=alone):
        restore_rng(states, comm, order=unsuited if errs(comm, alone) else order)


@pytest.mark.parametrize(("unsuited", "told"), UNSUITED)
def test_what_is_no_generator_is_not_saved(unsuited, told):
    with pytest.raises(CheckpointError) as caught:
        capture_rng(order=unsuited)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["states", "comm"])
def test_names_that_cannot_be_restored_are_not_saved(name):
    with pytest.raises(CheckpointError, match=f"generators must have .*; got '{name}'. Choose"):
        capture_rng(**{name: make_generator("PCG64", 0)})


@UP_TO_THREE_RANKS
@pytest.mark.mpi(min_size=2)
def test_different_numbers_of_states_are_refused(comm, generators, states):
    before = standing(generators)
    told = differing(comm, "the number of states", str(comm.size), str(2 * comm.size))
    with refused(comm, RankMismatchError, told):
        restore_rng(states * 2 if is_last(comm) else states, comm, **generators)
    assert standing(generators) == before
