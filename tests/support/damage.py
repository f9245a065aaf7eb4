"""What the tests of damage share: ways to harm a checkpoint, and what an optimizer stands at."""

import os
import shutil
from contextlib import contextmanager

import pytest
import xxhash

from shardopt.checkpoint import load
from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, MANIFEST_NAME
from shardopt.core.sharded_optimizer import sharded_of
from shardopt.errors import DamagedCheckpointError
from tests.support.errors import FORM


def params_of(opt):
    return [param for group in opt.param_groups for param in group["params"]]


def standing(opt):
    """All that a load may change, on this rank, to be compared bit by bit."""
    sharded = sharded_of(opt)
    arrays = [*sharded.arrays(sharded.tensors()), *(param.data for param in params_of(opt))]
    digests = [xxhash.xxh3_128_hexdigest(array.tobytes()) for array in arrays]
    step_counts = [(count.step, count.mu_product) for count in sharded.scalars().step_counts]
    values = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    params = [(id(param), id(param.data), id(param.grad)) for param in params_of(opt)]
    return digests, step_counts, repr(values), params, repr(opt.last_step)


@contextmanager
def refused_alike(comm, error=DamagedCheckpointError, *told):
    """Every rank must raise exactly ``error``, in the same words, ``told`` among them."""
    with pytest.raises(error) as caught:
        yield caught
    text = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert comm.allgather(text) == [text] * comm.size
    assert FORM.fullmatch(text), text
    assert not [words for words in told if words not in text], text


@contextmanager
def harmed(comm, path, harm):
    """Do ``harm`` to a checkpoint on rank 0, and undo it in the end."""
    comm.Barrier()
    undo = harm(path) if comm.rank == 0 else None
    comm.Barrier()
    yield
    comm.Barrier()
    if undo is not None:
        undo()
    comm.Barrier()


def assert_refused(comm, path, opt, harm, *told):
    """The harmed checkpoint must be refused by all ranks, and nothing may have changed."""
    before = standing(opt)
    with harmed(comm, path, harm), refused_alike(comm, DamagedCheckpointError, *told):
        load(path, opt)
    assert standing(opt) == before


def flip(name, bit):
    """Flip one bit of a file."""

    def harm(path):
        def toggle():
            with (path / name).open("r+b", buffering=0) as file:
                byte = os.pread(file.fileno(), 1, bit // 8)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit % 8]), bit // 8)

        toggle()
        return toggle

    return harm


def rewrite(name, change):
    """Put other bytes in the place of a file's; ``change`` makes them of the old ones."""

    def harm(path):
        old = (path / name).read_bytes()
        (path / name).write_bytes(change(old))
        return lambda: (path / name).write_bytes(old)

    return harm


def truncate(name, nbytes):
    """Leave the first bytes of a file."""
    return rewrite(name, lambda old: old[:nbytes])


def extend(name, more):
    """Put bytes behind the end of a file."""
    return rewrite(name, lambda old: old + more)


def remove(name):
    """Take a file away."""

    def harm(path):
        aside = path.with_name(f"{path.name}-aside")
        (path / name).rename(aside)
        return lambda: aside.rename(path / name)

    return harm


def exchange(name, other):
    """Let two files have each other's names."""

    def harm(path):
        def turn():
            (path / name).rename(path / ".turn")
            (path / other).rename(path / name)
            (path / ".turn").rename(path / other)

        turn()
        return turn

    return harm


def borrow(name, source):
    """Put a file of another checkpoint in the place of one."""
    return rewrite(name, lambda _: (source / name).read_bytes())


def add(name, content=b""):
    """Put a file there that nobody saved."""

    def harm(path):
        (path / name).write_bytes(content)
        return (path / name).unlink

    return harm


def add_folder(name):
    """Put a folder there."""

    def harm(path):
        (path / name).mkdir()
        return lambda: shutil.rmtree(path / name)

    return harm


def words_for_flip(name, bit):
    """What the message must say of a flipped bit."""
    if name == MANIFEST_NAME:
        return (MANIFEST_NAME,)
    return (f"chunk {bit // 8 // CHUNK_NBYTES} of file {name}", "have the digest")
