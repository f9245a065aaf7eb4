"""The log of a run: ``train.jsonl``, one JSON object per line, intact after any interruption."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "train.jsonl"

Record = dict[str, Any]


class RunLog:
    """Appends records to a log; each is handed to the system before the next step.

    ``begin`` must be called before the first ``write``.

    Args:
        folder: Where the log is; made if it does not exist.

    Raises:
        ValueError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise ValueError(
                f"--out must be a folder that can be written; got {str(folder)!r}: "
                f"{error.strerror}. Choose another folder."
            ) from None

    def begin(self, run: str, step: int) -> None:
        """Drop all records but those of this run up to ``step``.

        The shortened file replaces the old one in one rename: a kill leaves either one whole.

        Args:
            run: The name that identifies the run.
            step: The last step taken before; 0 at the beginning of the run.
        """
        kept = [
            record
            for record in (read_run(self._folder, run) if step else [])
            if record["kind"] != "end" and record["step"] <= step
        ]
        partial = self._folder / f".{FILE_NAME}.partial"
        partial.write_text("".join(map(as_line, kept)), encoding="utf-8")
        self._file.close()
        os.replace(partial, self._folder / FILE_NAME)
        self._file = self._open()

    def write(self, kind: str, **fields: object) -> None:
        """Append a record.

        Args:
            kind: start, step, eval or end.
            **fields: The values to log.
        """
        self._file.write(as_line({"kind": kind, **fields}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> TextIO:
        return (self._folder / FILE_NAME).open("a", buffering=1, encoding="utf-8")


def as_line(record: Record) -> str:
    """Format a record as a line."""
    return json.dumps(record) + "\n"


def read_run(folder: Path, run: str) -> list[Record]:
    """Read the records of a run; none if the file is no log, or that of another run."""
    try:
        records = read_log(folder)
    except ValueError:
        return []
    return records if records and records[0].get("run") == run else []


def read_log(folder: Path) -> list[Record]:
    """Read all records of a log; a last line that a kill cut short is ignored.

    Raises:
        FileNotFoundError: The folder holds no log.
    """
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
