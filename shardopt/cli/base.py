"""Commands and groups of commands.

A command is a file or folder that defines ``COMMAND``. The ``__init__`` of its group lists it, and
``GROUPS`` in ``shardopt.cli`` lists the group; ``COMMANDS`` there lists commands without a group.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn


class Exit(IntEnum):
    """Exit codes."""

    FINE = 0
    PROBLEMS = 1
    USAGE = 2
    INTERRUPTED = 130  # as shells report SIGINT
    BROKEN_PIPE = 141  # and SIGPIPE


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: The word that users type.
        summary: One line for the list of commands.
        details: The rest of the description in ``--help``.
        example: A typical command line.
        exit_codes: The meanings of exit codes 0 and 1.
        add_arguments: Adds its arguments to a parser.
        run: Runs it and returns the exit code. A ``ShardoptError`` or ``OSError`` that it raises is
            printed on stderr as one sentence.
    """

    name: str
    summary: str
    details: str
    example: str
    exit_codes: tuple[str, str]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Group:
    """A group of commands, ``shardopt NAME COMMAND``."""

    name: str
    summary: str
    commands: Sequence[Command]


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments in one sentence."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit."""
        name = " ".join(self.prog.split()[:2])
        text = f"arguments must match --help; got: {message}. Try: {self.prog} --help."
        self.exit(Exit.USAGE, f"{name}: {text}\n")


def add_group(parsers: Any, group: Group) -> None:
    """Add a group of commands to ``add_subparsers()`` of a parser."""
    parser = parsers.add_parser(
        group.name, help=group.summary, description=_sentence(group.summary)
    )
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in group.commands:
        add_command(names, command, parser.prog)


def add_command(parsers: Any, command: Command, prog: str | None = None) -> None:
    """Add a command to ``add_subparsers()`` of a parser.

    Args:
        parsers: The return value of ``add_subparsers()``.
        command: The command.
        prog: The name that begins its error messages; the parser's own if None.
    """
    fine, problems = command.exit_codes
    parser = parsers.add_parser(
        command.name,
        help=command.summary,
        description=f"{_sentence(command.summary)}\n\n{command.details}",
        epilog=f"example:\n  {command.example}\n\n"
        f"exit code:\n  0  {fine}\n  1  {problems}\n"
        "  2  wrong arguments, nothing found, or no access",
    )
    command.add_arguments(parser)
    parser.set_defaults(run=command.run, parser=parser, prog=prog or parser.prog)


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."
