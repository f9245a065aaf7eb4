"""Makes the checkpoint of a whole model in ``golden/``, which every later version must load.

Run once, when a new version of the format is there; those of older versions stay as they are::

    mpirun -n 2 python -m tests.checkpoint.make_golden_model
"""

import json

from mpi4py import MPI

from shardopt.checkpoint import save
from shardopt.checkpoint.format.manifest import VERSION
from tests.checkpoint.make_golden import FOLDER
from tests.support.whole_models import bits, build, train


def plain(model):
    """All that the model's state dict has, as JSON has it."""
    return json.loads(json.dumps({k: v for k, v in bits(model).items() if k != "scratch"}))


def main():
    comm = MPI.COMM_WORLD
    name = f"model-v{VERSION}-{comm.size}"
    model, opt = build(comm)
    with opt:
        train(model, opt)
        model.count.fill_(comm.rank)
        extra = {"average": [model.scale.clone(), model.count]}
        save(FOLDER / name, opt, model=model, extra=extra, per_rank_buffers=True)
        if comm.rank == 0:
            (FOLDER / f"{name}.json").write_text(json.dumps(plain(model), indent=1) + "\n")


if __name__ == "__main__":
    main()
