"""The contenders of a checkpoint: shardopt, and what its users would save and load with otherwise.

[Note: equal checkpoints]
All save the same arrays: what the optimizer of this rank owns, 12 bytes a parameter, in the pieces
that shardopt has them in. Torch sees them as tensors, without a copy, in a dict whose keys are this
rank's own. That is where DCP is cheapest: it need neither find out whose slice belongs where, as
with DTensor, nor look for what two ranks have in common. It cannot load such a checkpoint on
another number of ranks; shardopt can.
"""

import importlib
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import xxhash
from mpi4py import MPI

from benchmarks.contenders.internals import (
    num_cores,
    owned_arrays,
    places_in_checkpoint,
    saves_in_flight,
    sync_folder,
)
from benchmarks.contenders.names import DCP, DCP_KEPT, SHARDOPT, SYNCHRONOUS, TORCH_SAVE
from benchmarks.harness.placing import Bytes
from benchmarks.harness.scratch import PIECE_NBYTES
from shardopt.checkpoint import Checkpointer, load
from shardopt.numpy import NAdam


class Background(Protocol):
    """A writer that works while training goes on."""

    def begin(self, number: int) -> None:
        """Save; return when training may go on. Collective, like all methods: every rank."""
        ...

    def in_flight(self) -> bool:
        """Return whether, as far as this rank knows, something is being written."""
        ...

    def wait(self) -> None:
        """Wait until what was saved would survive a loss of power."""
        ...

    def discard(self) -> None:
        """Remove what was saved last."""
        ...


class Saver(Background, Protocol):
    """A way to save and load."""

    def load(self, opt: NAdam) -> None:
        """Load what was saved last into another optimizer."""
        ...

    def close(self) -> None:
        """Free the memory, and leave what was saved last."""
        ...


def digest(opt: NAdam) -> str:
    """Return a digest of all that this rank owns: equal states have equal ones."""
    hasher = xxhash.xxh3_128()
    for array in owned_arrays(opt):
        hasher.update(array.data)
    return hasher.hexdigest()


class ShardoptSaver:
    """This project."""

    def __init__(self, folder: Path, opt: NAdam, asynchronous: bool = True) -> None:
        self._folder, self._opt = folder, opt
        self._checkpointer = Checkpointer(folder, keep_last=None, asynchronous=asynchronous)

    @property
    def path(self) -> Path:
        """The checkpoint that was saved last."""
        return max(self._folder.glob("step-*"))

    def begin(self, number: int) -> None:
        """See ``Saver``."""
        self._checkpointer.save(number, self._opt)

    def in_flight(self) -> bool:
        """See ``Saver``."""
        return saves_in_flight(self._opt)

    def wait(self) -> None:
        """See ``Saver``."""
        self._checkpointer.wait()

    def discard(self) -> None:
        """See ``Saver``."""
        if self._opt.comm.rank == 0:
            shutil.rmtree(self.path)

    def load(self, opt: NAdam) -> None:
        """See ``Saver``."""
        load(self.path, opt)

    def close(self) -> None:
        """See ``Saver``."""
        self._checkpointer.close()


class TorchSaver:
    """``torch.save`` of a file a rank, then fsync; ``torch.load``, then copies into place."""

    def __init__(self, folder: Path, opt: NAdam) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._rank = opt.comm.rank
        self._path = folder / f"{TORCH_SAVE}, rank {self._rank}"
        self._state = self.state(opt)

    def state(self, opt: NAdam) -> dict[str, Any]:
        """Return what is saved; see [Note: equal checkpoints]."""
        return {
            f"rank{self._rank}.tensor{index}": self._torch.from_numpy(array)
            for index, array in enumerate(owned_arrays(opt))
        }

    def begin(self, number: int) -> None:
        """See ``Saver``."""
        with self._path.open("xb") as file:
            self._torch.save(self._state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._path.parent)

    def in_flight(self) -> bool:
        """See ``Saver``."""
        return False

    def wait(self) -> None:
        """See ``Saver``."""

    def discard(self) -> None:
        """See ``Saver``."""
        self._path.unlink()

    def load(self, opt: NAdam) -> None:
        """See ``Saver``."""
        loaded = self._torch.load(self._path)
        for name, tensor in self.state(opt).items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        """See ``Saver``."""
        self._state = {}


class DcpSaver(TorchSaver):
    """``torch.distributed.checkpoint.async_save``, as it is by default: on a thread, with fsync.

    Args:
        folder: Where its folders go.
        opt: What is saved.
        keep_stager: Whether it keeps the memory that it copies to for the next save, as shardopt
            does.
    """

    def __init__(self, folder: Path, opt: NAdam, keep_stager: bool = False) -> None:
        super().__init__(folder, opt)
        self._dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        self._stager: Any = None
        if keep_stager:
            staging: Any = importlib.import_module("torch.distributed.checkpoint.staging")
            self._stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
        self._folder, self._future = folder, None
        self._path = folder

    def begin(self, number: int) -> None:
        """See ``Saver``."""
        self._path = self._folder / f"{DCP}, {number}"
        with _no_warnings():
            self._future = self._dcp.async_save(
                self._state,
                storage_writer=self._dcp.FileSystemWriter(self._path),
                async_stager=self._stager,
            )

    def in_flight(self) -> bool:
        """See ``Saver``."""
        return self._future is not None and not self._future.done()

    def wait(self) -> None:
        """See ``Saver``."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def discard(self) -> None:
        """See ``Saver``."""
        if self._rank == 0:
            shutil.rmtree(self._path)

    def load(self, opt: NAdam) -> None:
        """See ``Saver``."""
        with _no_warnings():
            self._dcp.load(self.state(opt), checkpoint_id=self._path)

    def close(self) -> None:
        """See ``Saver``."""
        super().close()
        if self._stager is not None:
            self._stager.close()


def make_savers(folder: Path, opt: NAdam, has_torch: bool) -> dict[str, Saver]:
    """Make all contenders whose software is installed. Collective: every rank."""
    savers: dict[str, Saver] = {
        SHARDOPT: ShardoptSaver(folder / "asynchronous", opt),
        SYNCHRONOUS: ShardoptSaver(folder / "synchronous", opt, asynchronous=False),
    }
    if has_torch:
        savers |= {
            DCP: DcpSaver(folder, opt),
            DCP_KEPT: DcpSaver(folder, opt, keep_stager=True),
            TORCH_SAVE: TorchSaver(folder, opt),
        }
    return savers


def read_bare(path: Path, opt: NAdam) -> None:
    """Read a checkpoint of shardopt into place, on as many threads, without verifying a byte.

    Into memory that has been written to before. A load into a new optimizer is the first to touch
    its moments, at the cost of a page fault for each 4 KiB: half of its CPU time on a virtual
    machine (4.4 us each), which the first step would pay otherwise.
    """
    requests = [
        (place.path, place.offset + start, place.target[start : start + PIECE_NBYTES])
        for place in places_in_checkpoint(path, opt)
        for start in range(0, place.target.nbytes, PIECE_NBYTES)
    ]
    fds = {file: os.open(file, os.O_RDONLY) for file in {file for file, _, _ in requests}}

    def read(request: tuple[Path, int, Bytes]) -> None:
        file, offset, target = request
        if os.preadv(fds[file], [target.data], offset) != target.size:
            raise RuntimeError(f"{file} must be read at once; got a part. Repeat it.")

    try:
        with ThreadPoolExecutor(num_cores(opt)) as pool:
            list(pool.map(read, requests))
    finally:
        for fd in fds.values():
            os.close(fd)


def require_equal(comm: MPI.Intracomm, name: str, saved: str, loaded: str) -> None:
    """Make sure that a contender has loaded what was saved. Collective: every rank.

    Raises:
        RuntimeError: It has not.
    """
    if not comm.allreduce(saved == loaded, MPI.MIN):
        raise RuntimeError(
            f"{name} must load what was saved; got another state on some rank. Fix the contender."
        )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence torch, which warns of what its next versions will do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
