"""The record of a run: ``train.jsonl``, one JSON object a line, whole after any interruption."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "train.jsonl"

Record = dict[str, Any]


class RunLog:
    """Writes records; each is on its way to the disk before the next step. ``begin`` comes first.

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
        """Of what is there already, keep the records of this run up to ``step``, and no others.

        The file that begins so is put in place whole: a kill leaves the old one or the new one.
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
        """Append one record: ``kind`` is start, step, eval or end."""
        self._file.write(as_line({"kind": kind, **fields}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> TextIO:
        return (self._folder / FILE_NAME).open("a", buffering=1, encoding="utf-8")


def as_line(record: Record) -> str:
    """Write a record as a line."""
    return json.dumps(record) + "\n"


def read_run(folder: Path, run: str) -> list[Record]:
    """Read the records of the run of this name; none if the log is of another, or is no log."""
    try:
        records = read_log(folder)
    except ValueError:
        return []
    return records if records and records[0].get("run") == run else []


def read_log(folder: Path) -> list[Record]:
    """Read the records of a run; a last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: The folder holds no log.
    """
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
