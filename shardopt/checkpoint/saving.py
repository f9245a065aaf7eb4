"""Saving one checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardopt.checkpoint.operation import SaveOperation, SavePlan
from shardopt.core.sharded import HasCore, sharded_of


def save(path: str | Path, opt: HasCore, *, extra: Mapping[str, Any] | None = None) -> None:
    """Save everything that training needs to go on, on any number of ranks.

    Parameters, masters, moments, steps and hyperparameters are saved; gradients are not. Each rank
    writes what it owns into a file of its own. The checkpoint gets its name only when all of it is
    on the disk: after a crash at any moment there is either nothing of that name or all of it.

    Returns when the checkpoint would survive a loss of power; ``Checkpointer`` does not wait for
    that.

    Collective: every rank.

    Args:
        path: The folder to make, on a file system that all ranks see. It must not exist: nothing is
            ever overwritten.
        opt: A NAdam of any framework.
        extra: Anything else that the run needs: a dict of None, bool, int, float, str, list, tuple,
            dict and arrays (NumPy's, or what NumPy can read). ``extra["per_rank"]`` is saved for
            each rank; all other entries are saved as rank 0 has them.

    Raises:
        CheckpointError: The checkpoint could not be saved; on every rank. Nothing has changed then.
    """
    path, sharded = Path(path).absolute(), sharded_of(opt)
    plan = SavePlan("save()", sharded.scalars().num_steps, path.parent, [path.name])
    SaveOperation(plan, sharded, extra).finish()
