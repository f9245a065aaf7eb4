"""A rank's random streams as plain values, for a checkpoint to keep and a resumed run to continue.

[Note: nothing but values]
A state consists of JSON values and NumPy arrays. None of it is unpickled, and none of it names
something to import. But generators trust the states they are given: NumPy's would read beyond the
end of their arrays. So before any generator sees a state, all of it is checked against the forms in
``form.py``, which know every key, range, dtype and shape.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from mpi4py import MPI
from numpy.random.mtrand import get_bit_generator

from shardopt.checkpoint.format.messages import require
from shardopt.checkpoint.rng.form import UNDAMAGED, brief, read_state, require_kind
from shardopt.comm.consensus import attempt, digest_of, first_difference, portable, raise_first
from shardopt.comm.failure import Abort
from shardopt.comm.waiting import deadline
from shardopt.errors import RandomStreamWarning, RankMismatchError
from shardopt.policy import ShardPolicy
from shardopt.report import tell

_Setter: TypeAlias = Callable[[], object]

_PYTHON_VERSION = 3  # the version of states of random.getstate(), since Python 3.2
_NUMPY = "NumPy's own functions"


def capture_rng(**generators: np.random.Generator) -> dict[str, Any]:
    """Copy this rank's random state: that of Python, NumPy, torch and CuPy, and of generators.

    Save it in the part of a checkpoint that each rank has for itself::

        extra={"per_rank": capture_rng(order=generator)}

    The streams are those of Python's ``random``; of NumPy's functions, such as ``np.random.rand``;
    of torch on the CPU and, if CUDA is initialised, on every device, with the number of the current
    one; and of CuPy on the current device. torch and CuPy are left out if nobody has imported them.
    JAX has no such state: its keys are values, which you can save as they are. The number of calls
    of ``Generator.spawn`` is not part of a generator's state, and is not restored.

    CuPy does not reveal its state. Its stream is therefore seeded with a number drawn from it, now
    and again by ``restore_rng``. So a resumed run draws the same numbers as this one goes on to
    draw, but not those that would have been drawn if nothing had been captured.

    Args:
        **generators: NumPy generators, under the names that ``restore_rng`` will use for them.

    Returns:
        JSON values and NumPy arrays, a few kilobytes.

    Raises:
        CheckpointError: A generator is not one of NumPy's; nothing has changed then.
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
        "cupy": _capture_cupy(),  # last, as it changes something
    }


@deadline(ShardPolicy().timeout_s, "restore_rng()", Abort())
def restore_rng(
    states: Sequence[Mapping[str, Any]],
    comm: MPI.Intracomm | None = None,
    **generators: np.random.Generator,
) -> None:
    """Continue the random streams that ``capture_rng`` copied.

    On as many ranks as saved them, each rank goes on where its predecessor was: all draws are
    equal. On any other number of ranks nothing can be continued. Then every stream is seeded from
    all saved states, the number of ranks and this rank: differently on every rank, and in the same
    way whenever that is repeated.

    A saved stream of torch or CuPy is ignored if the framework has not been imported or there is no
    device, so import what you want to continue. The streams of torch's CUDA devices go on by
    number, but that of the device that a rank used goes on where the rank is now: its number may be
    another one. If a rank has another number of devices, a warning says so. A stream that was not
    saved stays as it is, unless all are seeded.

    Collective: every rank, within the default ``timeout_s`` of ``ShardPolicy``; otherwise the job
    ends. If one rank finds an error, all raise it, and nothing has changed; only a device that
    fails while it is being seeded leaves some streams changed.

    Args:
        states: What ``capture_rng`` returned on every rank of the job that saved, in rank order;
            the same list on every rank.
        comm: The ranks; None means all of them.
        **generators: Those given to ``capture_rng``, by the same names; changed in place.

    Raises:
        CheckpointError: A state is damaged, or generators are not those that were saved.
        RankMismatchError: Ranks have different numbers of states.

    Warns:
        RandomStreamWarning: All streams have been seeded, or there is another number of devices;
            shown on rank 0.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    setters, error = attempt(_plan, states, comm.rank, comm.size, generators)
    raise_first(comm.allgather(portable(error)), error)
    assert setters is not None
    mismatch = first_difference(comm.allgather({"the number of states": len(states)}))
    if mismatch is not None:
        raise RankMismatchError(mismatch)
    if len(states) != comm.size:
        _warn_of_new_seeds(len(states), comm)
    _, error = attempt(lambda: [setter() for setter in setters])  # a device may fail even now
    raise_first(comm.allgather(portable(error)), error)


def _warn_of_new_seeds(num_states: int, comm: MPI.Intracomm) -> None:
    text = (
        f"random streams cannot be continued: {num_states} ranks have saved them, but this job has "
        f"{comm.size}. They are seeded, differently on every rank."
    )
    tell(RandomStreamWarning(text), aloud=comm.rank == 0)


def _capture_python() -> dict[str, Any]:
    _, (*key, pos), gauss_next = random.getstate()
    return {"key": np.array(key, np.uint32), "pos": pos, "gauss_next": gauss_next}


def _capture_torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    cpu, cuda = torch.get_rng_state().numpy().copy(), list[Any]()
    if torch.cuda.is_initialized():
        cuda = [state.numpy().copy() for state in torch.cuda.get_rng_state_all()]
    in_use = {"device": int(torch.cuda.current_device())} if cuda else {}
    return {"cpu": cpu, "cuda": cuda, **in_use}


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
    """Check everything, and return functions that will change the streams."""
    is_list = isinstance(states, Sequence) and len(states) > 0
    rule = "be a list with an entry for every rank that saved"
    require(is_list, "states", rule, brief(states), "Pass the per_rank of the checkpoint")
    _require_supported(generators)
    if len(states) == size:
        name = f"states[{rank}]"
        state = read_state(name, states[rank])
        _require_names(state["generators"], generators)
        of_torch = _continue_torch(name, state["torch"], aloud=rank == 0)
        return [*_continue_streams(state, generators), *of_torch]
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


def _continue_torch(
    name: str, state: Mapping[str, Any] | None, *, aloud: bool
) -> Iterator[_Setter]:
    torch = sys.modules.get("torch")
    if torch is None or state is None:
        return
    setters = {"cpu": (state["cpu"], torch.set_rng_state)}
    num_devices = torch.cuda.device_count() if state["cuda"] else 0
    sources = {index: index for index in range(min(num_devices, len(state["cuda"])))}
    if num_devices and "device" in state:  # a rank's device may have another number by now
        sources[torch.cuda.current_device()] = state["device"]
    for index, source in sources.items():
        setter = partial(torch.cuda.set_rng_state, device=index)
        setters[f"cuda:{index}"] = state["cuda"][source], setter
    for device, (array, setter) in setters.items():
        saved = torch.from_numpy(array.copy())  # torch warns of arrays that are read-only
        try:
            torch.Generator(device).set_state(saved)
        except RuntimeError as error:
            rule = f"be a state of torch {torch.__version__} on {device}"
            require(False, f"{name}['torch']", rule, error, UNDAMAGED)
        yield partial(setter, saved)
    if state["cuda"] and num_devices != len(state["cuda"]):
        yield partial(tell, _devices_warning(len(state["cuda"]), num_devices), aloud=aloud)


def _devices_warning(num_saved: int, num_here: int) -> RandomStreamWarning:
    goes_on = "that of the device in use goes on, and others by number, as far as they are here"
    return RandomStreamWarning(
        f"torch's random streams of {num_saved} CUDA devices were saved, but a rank of this job "
        f"has {num_here}: {goes_on if num_here else 'none of them goes on'}."
    )


def _begin_streams(
    entropy: Sequence[int], generators: Mapping[str, np.random.Generator]
) -> Iterator[_Setter]:
    """Seed every stream of this process, whether it was saved or not."""

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
    """Return something that prints alike for equal values only: NumPy abridges long arrays."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return [(key, _printable(value[key])) for key in sorted(value)]
    return list(map(_printable, value)) if isinstance(value, list) else value
