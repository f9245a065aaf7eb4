"""The command ``shardopt``: tools for training jobs and their checkpoints."""

import io
import os
import sys
from collections.abc import Sequence

from shardopt._version import __version__
from shardopt.cli import ckpt, doctor, plan, trace
from shardopt.cli.base import Exit, Parser, add_command, add_group
from shardopt.cli.text import printable
from shardopt.errors import DamagedCheckpointError, ShardoptError

GROUPS = (ckpt.GROUP, trace.GROUP)
COMMANDS = (doctor.COMMAND, plan.COMMAND)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; those of ``sys.argv`` if None.

    Returns:
        The exit code; see ``Exit``.
    """
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is handled
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more when it exits, and must not meet the closed pipe then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE
    return code


def _run(arguments: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may be in any script
    parser = Parser(prog="shardopt", description="Tools for training under MPI.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in GROUPS:
        add_group(names, group)
    for command in COMMANDS:
        add_command(names, command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = options.run(options)
    except ShardoptError as error:
        print(f"{options.prog}: {printable(str(error))}", file=sys.stderr)
        return Exit.PROBLEMS if isinstance(error, DamagedCheckpointError) else Exit.USAGE
    except BrokenPipeError:
        raise
    except OSError as error:
        place, got = error.filename or "the file system", error.strerror or error
        text = f"{place} must be accessible; got {got}. Check its permissions and the disk."
        print(f"{options.prog}: {printable(text)}", file=sys.stderr)
        return Exit.USAGE
    return code
