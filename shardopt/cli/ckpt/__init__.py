"""``shardopt ckpt``: looks into checkpoints, and after them. Needs no MPI."""

from shardopt.cli.base import Group
from shardopt.cli.ckpt import diff, ls, merge, prune, show, verify

GROUP = Group(
    "ckpt",
    "look into checkpoints, check, compare, merge and remove them",
    [command.COMMAND for command in (ls, show, verify, diff, merge, prune)],
)
