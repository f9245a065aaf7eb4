"""An optimizer whose whole content follows from a number, so that any checkpoint can be checked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint.format.directory import StepFolder, list_checkpoints
from shardopt.checkpoint.format.manifest import PARAM_KEY
from shardopt.checkpoint.format.reader import Reader, read_manifest
from tests.support.errors import params_of

SPECS = [("weight", (61, 17), "float32"), ("bias", (5,), "float32"), ("scale", (3,), "float64")]
STATE_KEYS = ("exp_avg", "exp_avg_sq")


class Origin(NamedTuple):
    """What everything in a checkpoint follows from; its ``extra`` says it."""

    step: int
    job: int = 0

    @property
    def extra(self) -> dict[str, int]:
        return self._asdict()


def expected(origin: Origin, index: int, key: str) -> Any:
    """A parameter or an array of its state."""
    _, shape, dtype = SPECS[index]
    which = (PARAM_KEY, *STATE_KEYS).index(key)
    generator = np.random.default_rng([*origin, index, which])
    return generator.random(shape, np.dtype(dtype))


def build(comm: MPI.Intracomm, specs: Any = SPECS, **settings: Any) -> NAdam:
    """An optimizer of zeros, in several buckets."""
    params = [Parameter(np.zeros(shape, dtype), name) for name, shape, dtype in specs]
    policy = ShardPolicy(**{"bucket_nbytes": 1500, "timeout_s": 20, **settings})
    return NAdam(params, comm=comm, policy=policy)


def fill(opt: NAdam, origin: Origin) -> None:
    """Make the content what follows from an origin. Collective."""
    opt.comm.Barrier()  # nobody still looks at what was there
    for index, param in enumerate(params_of(opt)):
        param.data[...] = expected(origin, index, PARAM_KEY)
    entries = {
        index: {"step": origin.step, "mu_product": 0.5}
        | {key: expected(origin, index, key) for key in STATE_KEYS}
        for index in range(len(SPECS))
    }
    groups = [{**group, "params": list(entries)} for group in opt.param_groups]
    opt.load_state_dict({"state": entries, "param_groups": groups})


def assert_filled(opt: NAdam, origin: Origin) -> None:
    """The content must be what follows from an origin. Collective."""
    for index, param in enumerate(params_of(opt)):
        np.testing.assert_array_equal(param.data, expected(origin, index, PARAM_KEY))
    state = opt.gather_state_dict()
    if state is not None:
        for index, entry in state["state"].items():
            assert entry["step"] == origin.step
            for key in STATE_KEYS:
                np.testing.assert_array_equal(entry[key], expected(origin, index, key))


def verify(path: Path) -> Origin:
    """Read all of a checkpoint, which must be what follows from the origin that it tells."""
    with Reader(path, read_manifest(path)) as reader:
        reader.require_files()
        reader.read(reader.whole_files())
        origin = Origin(**reader.extra())
        for index in range(len(SPECS)):
            assert reader.manifest.params[index].step == origin.step
            for key in (PARAM_KEY, *STATE_KEYS):
                np.testing.assert_array_equal(
                    reader.tensor(index, key), expected(origin, index, key)
                )
    return origin


def verify_all(directory: Path) -> Iterator[tuple[StepFolder, Origin]]:
    """Verify every checkpoint that is listed, oldest first."""
    for folder in list_checkpoints(directory):
        origin = verify(folder.path)
        assert origin.step == folder.step
        yield folder, origin


def hidden(directory: Path) -> list[str]:
    """What is there under names that no reader looks at."""
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))
