"""``shardopt ckpt``: inspect and maintain checkpoints, without MPI."""

from shardopt.cli.base import Group
from shardopt.cli.ckpt import diff, ls, merge, prune, show, verify

GROUP = Group(
    "ckpt",
    "inspect, verify, compare, merge and remove checkpoints",
    [command.COMMAND for command in (ls, show, verify, diff, merge, prune)],
)
