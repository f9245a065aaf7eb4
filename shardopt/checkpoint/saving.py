"""Saving one checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardopt.checkpoint.operation import SaveOperation, SavePlan
from shardopt.core.sharded_optimizer import HasCore, sharded_of


def save(
    path: str | Path,
    opt: HasCore,
    *,
    model: Any = None,
    extra: Mapping[str, Any] | None = None,
    per_rank_buffers: bool = False,
) -> None:
    """Save everything that training needs to go on, on any number of ranks.

    Parameters, masters, moments, steps and hyperparameters are saved; gradients are not. With
    ``model`` the rest of the model is saved, too, and names are those of the model, whatever the
    optimizer was given: without any names, parameters will be matched by order, and a warning says
    so. Each rank writes what it owns into a file of its own. The checkpoint gets its name only when
    all of it is on the disk: after a crash at any moment there is either nothing of that name or
    all of it.

    Returns when the checkpoint would survive a loss of power; ``Checkpointer`` does not wait for
    that.

    Collective: every rank.

    Args:
        path: The folder to make, on a file system that all ranks see. It must not exist: nothing is
            ever overwritten.
        opt: An optimizer of any framework.
        model: The model: a module of torch or lucid, or a pytree of JAX. Buffers, parameters that
            the optimizer does not hold, and what torch's ``get_extra_state`` returns are saved as
            rank 0 has them.
        extra: Anything else that the run needs: a dict of None, bool, int, float, str, list, tuple,
            dict, and arrays or tensors of NumPy, torch, JAX and lucid, which come back as what
            they were. ``extra["per_rank"]`` is saved for each rank; all other entries are saved as
            rank 0 has them.
        per_rank_buffers: Save the buffers and extra state of each rank, for the rank of the same
            number. Ranks that a larger job has more get those of rank 0.

    Raises:
        CheckpointError: The checkpoint could not be saved; on every rank. Nothing has changed then.
    """
    path, sharded = Path(path).absolute(), sharded_of(opt)
    plan = SavePlan("save()", sharded.scalars().num_steps, path.parent, [path.name])
    operation = SaveOperation(plan, sharded, extra, model, per_rank_buffers=per_rank_buffers)
    operation.finish()
