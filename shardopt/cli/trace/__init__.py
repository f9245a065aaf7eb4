"""The group ``shardopt trace``: traces, read and explained."""

from shardopt.cli.base import Group
from shardopt.cli.trace import merge, picture, summary

GROUP = Group(
    "trace", "look at traces of training runs", (summary.COMMAND, merge.COMMAND, picture.COMMAND)
)
