"""The record of a run: ``train.jsonl``, one JSON object a line, whole after any interruption."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "train.jsonl"

Record = dict[str, Any]


class RunLog:
    """Writes records into a new file; each is on its way to the disk before the next step.

    Raises:
        ValueError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / FILE_NAME).open("w", buffering=1, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--out must be a folder that can be written; got {str(folder)!r}: "
                f"{error.strerror}. Choose another folder."
            ) from None

    def write(self, kind: str, **fields: object) -> None:
        """Append one record: ``kind`` is start, step, eval or end."""
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(folder: Path) -> list[Record]:
    """Read the records of a run; a last line cut short by a kill is left out.

    Raises:
        FileNotFoundError: The folder holds no log.
    """
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
