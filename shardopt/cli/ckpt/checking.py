"""Verification of a checkpoint against its digests."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, FileEntry, Manifest
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.checkpoint.format.requests import Wanted
from shardopt.cli import text
from shardopt.cli.ckpt.contents import decode_extra, decode_groups, decode_model
from shardopt.cli.ckpt.layout import FileSpan, header_problem, layout, touched
from shardopt.cli.progress import progress
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.layout.span import Span
from shardopt.measure.cores import count_cores


@dataclass(frozen=True)
class Defect:
    """Something that is wrong with a checkpoint.

    Attributes:
        problem: A description.
        file: The damaged file, if the defect is in one.
        start: First damaged byte of the file.
        stop: One past the last damaged byte.
        chunks: [first, last) of the damaged chunks.
        tensors: Names of the tensors that the damaged bytes belong to.
    """

    problem: str
    file: str | None = None
    start: int = 0
    stop: int = 0
    chunks: tuple[int, int] | None = None
    tensors: Sequence[str] = ()


def check(folder: Path, quick: bool = False) -> tuple[Manifest | None, list[Defect]]:
    """Find everything that is wrong with a checkpoint.

    Args:
        folder: The checkpoint.
        quick: Check only the manifest and file sizes, instead of reading every byte.

    Returns:
        The manifest, or None if it cannot be read, and the defects.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return None, [Defect(str(error))]
    with Reader(folder, manifest) as reader:
        defects = [Defect(str(problem)) for problem in reader.file_problems()]
        try:
            decode_groups(manifest)
            decode_extra(manifest)
            decode_model(manifest)
        except DamagedCheckpointError as error:
            defects.append(Defect(str(error)))
        if not quick:
            with progress(text.printable(folder.name), manifest.nbytes) as advance:
                defects.extend(_verify_files(reader, advance))
    return manifest, defects


def _verify_files(reader: Reader, advance: Callable[[int], None]) -> Iterator[Defect]:
    files, arrays = reader.manifest.files, layout(reader.manifest)
    held = [_held_nbytes(reader.path / file.name, file) for file in files]
    bad: list[list[int]] = [[] for _ in files]

    def note(file: int, chunk: int, _: DamagedCheckpointError) -> None:
        bad[file].append(chunk)  # atomic

    wanted = [Wanted(0, nbytes, i) for i, nbytes in enumerate(held) if nbytes]
    reader.read(wanted, count_cores(), advance, note)
    for index, file in enumerate(files):
        if held[index] < file.nbytes:
            lost = Span(held[index], file.nbytes)
            problem = f"bytes {lost.start} to {lost.stop} of file {file.name} are missing"
            tensors = touched(arrays[index], lost)
            yield Defect(problem, file.name, lost.start, lost.stop, None, tensors)
        for chunks in _runs(sorted(bad[index])):
            yield _damage(file, arrays[index], chunks)
        if held[index] and 0 not in bad[index]:
            path = reader.path / file.name
            contradiction = header_problem(path, file.header_nbytes, arrays[index])
            if contradiction is not None:
                yield Defect(contradiction, file.name, 0, file.header_nbytes)


def _held_nbytes(path: Path, file: FileEntry) -> int:
    """Return the number of bytes that can be verified: all, or the whole chunks that remain."""
    try:
        nbytes = path.stat().st_size if os.access(path, os.R_OK) else 0
    except OSError:
        return 0
    return file.nbytes if nbytes >= file.nbytes else nbytes // CHUNK_NBYTES * CHUNK_NBYTES


def _damage(file: FileEntry, arrays: Sequence[FileSpan], chunks: Span) -> Defect:
    first, last = chunks.start, chunks.stop - 1
    start, stop = first * CHUNK_NBYTES, min(chunks.stop * CHUNK_NBYTES, file.nbytes)
    numbers = f"chunk {first}" if first == last else f"chunks {first} to {last}"
    verb = "is" if first == last else "are"
    problem = f"{numbers} of file {file.name}, bytes {start} to {stop}, {verb} not what was written"
    tensors = touched(arrays, Span(start, stop))
    return Defect(problem, file.name, start, stop, (chunks.start, chunks.stop), tensors)


def _runs(numbers: Sequence[int]) -> Iterator[Span]:
    """Join consecutive numbers into spans."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        yield Span(found[0], found[-1] + 1)
