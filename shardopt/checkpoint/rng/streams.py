"""A rank's random streams as plain values, for a checkpoint to keep and a resumed run to continue.

[Note: nothing but values]
A state is made of JSON values and NumPy arrays. None of it is unpickled, and none of it is taken
for the name of something to import. But generators trust what they are given: NumPy's would draw
from beyond the end of their arrays. So all of a state is compared with the forms in
``rng_form.py``, which know every key, range, dtype and shape, before any generator sees it.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from mpi4py import MPI
from numpy.random.mtrand import get_bit_generator

from shardopt.checkpoint.rng.form import UNDAMAGED, brief, read_state, require, require_kind
from shardopt.comm.consensus import attempt, digest_of, first_difference, raise_first
from shardopt.comm.waiting import deadline
from shardopt.errors import RandomStreamWarning, RankMismatchError
from shardopt.policy import ShardPolicy
from shardopt.report import tell

_Setter: TypeAlias = Callable[[], object]

_PYTHON_VERSION = 3  # of what random.getstate() gives, since Python 3.2
_NUMPY = "NumPy's own functions"


def capture_rng(**generators: np.random.Generator) -> dict[str, Any]:
    """Copy this rank's random state: what Python, NumPy, torch and CuPy draw from, and generators.

    Meant for the part of a checkpoint that every rank has its own of::

        extra={"per_rank": capture_rng(order=generator)}

    The streams are those of Python's ``random``; of NumPy's functions, such as ``np.random.rand``;
    of torch on the CPU and, where CUDA is initialised, on every device; and of CuPy on the current
    device. torch and CuPy are left out where nobody has imported them. JAX has no such state: its
    keys are values, and go into the checkpoint as they are. What ``Generator.spawn`` would give is
    not part of a generator's state, and not restored.

    CuPy does not tell its state. Its stream is therefore begun anew with a number drawn from it,
    now and again by ``restore_rng``. So a resumed run draws what this one goes on to draw, but that
    is something else than if nothing had been captured.

    Args:
        **generators: NumPy generators, each under the name that ``restore_rng`` will know it by.

    Returns:
        JSON values and NumPy arrays, a few kilobytes.

    Raises:
        CheckpointError: One is no generator of NumPy's; nothing has changed then.
    """
    for name in ("states", "comm"):
        rule, got = "have names other than restore_rng's arguments", repr(name)
        require(name not in generators, "generators", rule, got, "Choose another name")
    _require_supported(generators)
    return {
        "python": _capture_python(),
        "numpy": dict(np.random.get_state(legacy=False)),
        "generators": {name: dict(given.bit_generator.state) for name, given in generators.items()},
        "torch": _capture_torch(),
        "cupy": _capture_cupy(),  # the last, as it alone changes something
    }


@deadline(ShardPolicy().timeout_s, "restore_rng()")
def restore_rng(
    states: Sequence[Mapping[str, Any]],
    comm: MPI.Intracomm | None = None,
    **generators: np.random.Generator,
) -> None:
    """Continue the random streams that ``capture_rng`` copied.

    On as many ranks as saved them every rank goes on where its predecessor was: all draws are
    equal. On any other number there is nothing to continue. Then every stream of this rank is
    seeded anew, from all that was saved, the number of ranks and this one: differently on every
    rank, and alike whenever it is repeated.

    A stream of torch or CuPy that was saved is ignored where the framework has not been imported
    or the device is not there; import what is to be continued. One that was not saved stays as it
    is, unless all are seeded anew.

    Collective: every rank, within ``ShardPolicy``'s usual ``timeout_s``, or the job ends. What one
    rank finds wrong, all raise, and nothing has changed then; only a device that fails while it is
    being seeded leaves some streams changed.

    Args:
        states: What ``capture_rng`` gave on every rank of the job that saved, in rank order; the
            same list on every rank.
        comm: The ranks; None is all of them.
        **generators: Those given to ``capture_rng``, by the same names; changed in place.

    Raises:
        CheckpointError: A state is damaged, or generators are not those that were saved.
        RankMismatchError: Ranks have different numbers of states.

    Warns:
        RandomStreamWarning: All streams are seeded anew; seen on rank 0.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    setters, error = attempt(partial(_plan, states, comm.rank, comm.size, generators))
    raise_first(comm.allgather(error), error)
    assert setters is not None
    mismatch = first_difference(comm.allgather({"the number of states": len(states)}))
    if mismatch is not None:
        raise RankMismatchError(mismatch)
    if len(states) != comm.size:
        text = (
            f"random streams must be continued on as many ranks as saved them, {len(states)}; got "
            f"{comm.size}. They are seeded anew, differently on every rank."
        )
        tell(RandomStreamWarning(text), aloud=comm.rank == 0)
    _, error = attempt(lambda: [setter() for setter in setters])  # a device may fail even now
    raise_first(comm.allgather(error), error)


def _capture_python() -> dict[str, Any]:
    _, (*key, pos), gauss_next = random.getstate()
    return {"key": np.array(key, np.uint32), "pos": pos, "gauss_next": gauss_next}


def _capture_torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    by_device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "cpu": torch.get_rng_state().numpy().copy(),
        "cuda": [state.numpy().copy() for state in by_device],
    }


def _capture_cupy() -> dict[str, int] | None:
    cupy = _usable_cupy()
    if cupy is None:
        return None
    seed = int(cupy.random.randint(0, 1 << 63, dtype=np.int64))
    _seed_cupy(cupy, seed)
    return {"seed": seed}


def _usable_cupy() -> Any:
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and cupy.is_available() else None


def _seed_cupy(cupy: Any, seed: int) -> None:
    cupy.random.seed(np.uint64(seed))  # NumPy 2 lets it take no int: that would be an int64


def _plan(
    states: Any, rank: int, size: int, generators: Mapping[str, np.random.Generator]
) -> list[_Setter]:
    """Check everything, and give what changes the streams once it is called."""
    is_list = isinstance(states, Sequence) and len(states) > 0
    rule = "be a list with an entry for every rank that saved"
    require(is_list, "states", rule, brief(states), "Pass what the checkpoint gave for per_rank")
    _require_supported(generators)
    if len(states) == size:
        name = f"states[{rank}]"
        state = read_state(name, states[rank])
        _require_names(state["generators"], generators)
        return [*_continue_streams(state, generators), *_continue_torch(name, state["torch"])]
    read = [read_state(f"states[{index}]", state) for index, state in enumerate(states)]
    _require_names({name for state in read for name in state["generators"]}, generators)
    return list(_begin_streams((digest_of(_printable(read)), size, rank), generators))


def _require_supported(generators: Mapping[str, Any]) -> None:
    require_kind(_NUMPY, get_bit_generator())
    for name, generator in generators.items():
        holds = isinstance(generator, np.random.Generator)
        rule, remedy = "be an np.random.Generator", "Use np.random.default_rng"
        require(holds, f"generator {name!r}", rule, brief(generator), remedy)
        require_kind(f"generator {name!r}", generator.bit_generator)


def _require_names(saved: Iterable[str], generators: Mapping[str, Any]) -> None:
    rule, got = f"be those given to capture_rng, {sorted(saved)}", sorted(generators)
    require(
        sorted(saved) == got, "generators", rule, got, "Pass each by the name it was saved with"
    )


def _continue_streams(
    state: Mapping[str, Any], generators: Mapping[str, np.random.Generator]
) -> Iterator[_Setter]:
    python, numpy, cupy = state["python"], state["numpy"], _usable_cupy()
    key = (*python["key"].tolist(), python["pos"])
    yield partial(random.setstate, (_PYTHON_VERSION, key, python["gauss_next"]))
    require_kind(_NUMPY, get_bit_generator(), numpy)
    yield partial(np.random.set_state, numpy)
    for name, generator in generators.items():
        saved = state["generators"][name]
        require_kind(f"generator {name!r}", generator.bit_generator, saved)
        yield partial(setattr, generator.bit_generator, "state", saved)
    if state["cupy"] is not None and cupy is not None:
        yield partial(_seed_cupy, cupy, state["cupy"]["seed"])


def _continue_torch(name: str, state: Mapping[str, Any] | None) -> Iterator[_Setter]:
    torch = sys.modules.get("torch")
    if torch is None or state is None:
        return
    setters = {"cpu": (state["cpu"], torch.set_rng_state)}
    num_devices = torch.cuda.device_count() if state["cuda"] else 0
    for index, array in enumerate(state["cuda"][:num_devices]):
        setters[f"cuda:{index}"] = array, partial(torch.cuda.set_rng_state, device=index)
    for device, (array, setter) in setters.items():
        saved = torch.from_numpy(array.copy())  # as torch warns of arrays that are read-only
        try:
            torch.Generator(device).set_state(saved)
        except RuntimeError as error:
            rule = f"be a state of torch {torch.__version__} on {device}"
            require(False, f"{name}['torch']", rule, error, UNDAMAGED)
        yield partial(setter, saved)


def _begin_streams(
    entropy: Sequence[int], generators: Mapping[str, np.random.Generator]
) -> Iterator[_Setter]:
    """Seed every stream that is here now, whether it was saved or not."""

    def sequence(stream: str) -> np.random.SeedSequence:
        return np.random.SeedSequence([*entropy, *stream.encode()])

    def seed(stream: str) -> int:
        return int(sequence(stream).generate_state(1, np.uint64)[0])

    yield partial(random.seed, seed("python"))
    fresh = type(get_bit_generator())(sequence("numpy")).state
    yield partial(np.random.set_state, {**fresh, "has_gauss": 0, "gauss": 0.0})
    for name, generator in generators.items():
        bit_generator = generator.bit_generator
        fresh = type(bit_generator)(sequence(f"generator {name}")).state
        yield partial(setattr, bit_generator, "state", fresh)
    torch, cupy = sys.modules.get("torch"), _usable_cupy()
    if torch is not None:
        yield partial(torch.manual_seed, seed("torch"))  # on all its devices
    if cupy is not None:
        yield partial(_seed_cupy, cupy, seed("cupy"))


def _printable(value: Any) -> object:
    """Make equal values print alike, and others not: NumPy abridges long arrays."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return [(key, _printable(value[key])) for key in sorted(value)]
    return list(map(_printable, value)) if isinstance(value, list) else value
