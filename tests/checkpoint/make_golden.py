"""Makes the checkpoints in ``golden/``, which every later version must load.

Run once for each number of ranks, when a new version of the format is there; those of older
versions stay as they are::

    for n in 1 2 3; do mpirun -n $n python -m tests.checkpoint.make_golden; done
"""

import math
from pathlib import Path

import numpy as np
from mpi4py import MPI

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import save
from shardopt.checkpoint.format.manifest import VERSION

FOLDER = Path(__file__).with_name("golden")
NUM_STEPS = 3
LOSS_SCALE = 8.0
BUCKET_NBYTES = 8192 * 4
BIG_NUMEL = {1: 400, 2: 264, 3: 8232}
"""By ranks. With 2 and 3, rank 0 owns nothing; with 3, buckets and files divide the parameter."""

GROUPS = (
    {"lr": 0.05, "weight_decay": 0.01, "initial_lr": 0.1, "note": ("first", None)},
    {"lr": 0.01, "betas": (0.8, 0.99), "momentum_decay": 0.02, "decoupled_weight_decay": True},
)


def pattern(shape, dtype, shift):
    """Numbers that every element's place can be told from, without a random generator."""
    index = np.arange(math.prod(shape), dtype=np.float64) + shift
    values = (index * 37 % 61 - 30) / 16 + index // 427 / 8
    return values.reshape(shape).astype(np.dtype(dtype))


def make_groups(num_savers, start=1.0):
    """The param groups of the golden model, its initial values times ``start``."""
    shapes = [
        [
            ("embed.weight", (BIG_NUMEL[num_savers] // 8, 8), "float32"),
            ("embed.bias", (5,), "float32"),
            ("empty", (0, 3), "float32"),
            ("scale", (), "float64"),
        ],
        [("half", (7, 11), "float16"), ("brain", (9, 13), "bfloat16")],
    ]
    return [
        {
            "params": [
                Parameter(pattern(s, d, 3) * np.dtype(d).type(start), n) for n, s, d in members
            ],
            **settings,
        }
        for members, settings in zip(shapes, GROUPS, strict=True)
    ]


def make_extra(rank):
    """A bit of everything that ``extra`` can hold."""
    return {
        "epoch": 7,
        "ratio": 0.1,
        "limits": [math.inf, -math.inf, None, True],
        "pair": ("a", (1 << 127, -2)),
        "by_step": {3: "three", ("x", 1.5): {}},
        "$dollar": {"$array": [0, 0]},
        "ünï": "\0\n\U0001f600",
        "order": np.arange(12, dtype=np.int64).reshape(3, 4),
        "mask": np.array([True, False, True]),
        "wave": np.array([1 + 2j, -3.5j], np.complex64),
        "brain": np.array(-1.5, np.dtype("bfloat16")),
        "nothing": np.empty((2, 0), np.uint16),
        "per_rank": {"rank": rank, "draws": np.arange(rank + 2, dtype=np.uint32) * 1000},
    }


def params_of(opt):
    return [param for group in opt.param_groups for param in group["params"]]


def train(opt):
    """Take the steps that came before the save; ``half`` misses one of them."""
    for step in range(NUM_STEPS):
        opt.zero_grad()
        for index, param in enumerate(params_of(opt)):
            if param.name == "half" and step == 1:
                param.grad = None
                continue
            param.grad = pattern(param.data.shape, param.data.dtype, step + index) * 8
        opt.step(loss_scale=LOSS_SCALE)


def bits(array):
    """The elements as unsigned integers, which any NumPy can save."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"uint{8 * flat.itemsize}")


def content(opt):
    """All values by name, on rank 0; None elsewhere. Collective."""
    state = opt.gather_state_dict()
    if state is None:
        return None
    values = {}
    for index, param in enumerate(params_of(opt)):
        entry = state["state"][index]
        values[f"{param.name}/param"] = bits(param.data)
        for key, value in entry.items():
            is_array = isinstance(value, np.ndarray)
            values[f"{param.name}/{key}"] = bits(value) if is_array else np.array(value)
    return values


def main():
    comm = MPI.COMM_WORLD
    policy = ShardPolicy(bucket_nbytes=BUCKET_NBYTES, threads=1)
    name = f"v{VERSION}-{comm.size}"
    with NAdam(make_groups(comm.size), comm=comm, policy=policy) as opt:
        train(opt)
        save(FOLDER / name, opt, extra=make_extra(comm.rank))
        values = content(opt)
        if values is not None:
            np.savez_compressed(FOLDER / f"{name}.npz", **values)


if __name__ == "__main__":
    main()
