"""Whether a checkpoint is what was written, and where it is not."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, FileEntry, Manifest
from shardopt.checkpoint.format.reader import Reader, Wanted, read_manifest
from shardopt.cli import text
from shardopt.cli.ckpt.contents import decode_extra, decode_groups
from shardopt.cli.ckpt.layout import Region, header_problem, layout, touched
from shardopt.cli.progress import progress
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.measure.cores import count_cores


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        problem: What.
        file: The file with the damage, if it is in one.
        start: First byte of the damage.
        stop: One past the last.
        chunks: [first, last) of the damaged chunks.
        tensors: What these bytes are of.
    """

    problem: str
    file: str | None = None
    start: int = 0
    stop: int = 0
    chunks: tuple[int, int] | None = None
    tensors: Sequence[str] = ()


def check(folder: Path, quick: bool = False) -> tuple[Manifest | None, list[Finding]]:
    """Find all that is wrong with a checkpoint.

    Args:
        folder: The checkpoint.
        quick: Look at the manifest and at sizes only; otherwise every byte is read.

    Returns:
        The manifest, if it can be read, and what is wrong.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return None, [Finding(str(error))]
    with Reader(folder, manifest) as reader:
        findings = [Finding(str(problem)) for problem in reader.file_problems()]
        try:
            decode_groups(manifest)
            decode_extra(manifest)
        except DamagedCheckpointError as error:
            findings.append(Finding(str(error)))
        if not quick:
            with progress(text.printable(folder.name), manifest.nbytes) as advance:
                findings.extend(_verify_files(reader, advance))
    return manifest, findings


def _verify_files(reader: Reader, advance: Callable[[int], None]) -> Iterator[Finding]:
    files, regions = reader.manifest.files, layout(reader.manifest)
    held = [_held_nbytes(reader.path / file.name, file) for file in files]
    bad: list[list[int]] = [[] for _ in files]

    def note(file: int, chunk: int, _: DamagedCheckpointError) -> None:
        bad[file].append(chunk)  # atomic

    wanted = [Wanted(i, 0, nbytes, None) for i, nbytes in enumerate(held) if nbytes]
    reader.read(wanted, count_cores(), advance, note)
    for index, file in enumerate(files):
        if held[index] < file.nbytes:
            lost = touched(regions[index], held[index], file.nbytes)
            place = f"bytes {held[index]} to {file.nbytes} of file {file.name}"
            yield Finding(f"{place} are missing", file.name, held[index], file.nbytes, None, lost)
        for first, last in _runs(sorted(bad[index])):
            yield _damage(file, regions[index], first, last)
        if held[index] and 0 not in bad[index]:
            path = reader.path / file.name
            problem = header_problem(path, file.header_nbytes, regions[index])
            if problem is not None:
                yield Finding(problem, file.name, 0, file.header_nbytes)


def _held_nbytes(path: Path, file: FileEntry) -> int:
    """Bytes that can be verified: all, or the whole chunks that a truncated file still has."""
    try:
        nbytes = path.stat().st_size if os.access(path, os.R_OK) else 0
    except OSError:
        return 0
    return file.nbytes if nbytes >= file.nbytes else nbytes // CHUNK_NBYTES * CHUNK_NBYTES


def _damage(file: FileEntry, regions: Sequence[Region], first: int, last: int) -> Finding:
    start, stop = first * CHUNK_NBYTES, min(last * CHUNK_NBYTES, file.nbytes)
    chunks = f"chunk {first}" if last == first + 1 else f"chunks {first} to {last - 1}"
    verb = "is" if last == first + 1 else "are"
    problem = f"{chunks} of file {file.name}, bytes {start} to {stop}, {verb} not what was written"
    tensors = touched(regions, start, stop)
    return Finding(problem, file.name, start, stop, (first, last), tensors)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Put numbers that follow one another together, [first, last)."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield found[0], found[-1] + 1
