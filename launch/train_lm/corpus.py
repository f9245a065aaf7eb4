"""The text to learn from, its held-out part, and the losses that mere counting reaches."""

from __future__ import annotations

import os
import platform
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

Bytes = NDArray[np.uint8]
File = tuple[str, bytes]
"""A file's path within its folder, with forward slashes, and its content."""

NUM_BYTES = 256
MIN_TEXT_NBYTES = 64 * 1024
CHUNK_NBYTES = 4 * 1024
"""A text with too few files is split by chunks of this size."""
HELD_OUT_ONE_IN = 10
BINARY_PROBE_NBYTES = 8 * 1024
COUNT_BLOCK_NBYTES = 1024 * 1024
WHOLE = slice(None)
NOT_LIBRARY_CODE = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """A text, split once and for all into a training part and a held-out part."""

    name: str
    train: Bytes
    held_out: Bytes

    @property
    def fingerprint(self) -> str:
        """A description that is the same for the same bytes, wherever they were read."""
        checksum = zlib.crc32(self.held_out.data, zlib.crc32(self.train.data))
        return f"{len(self.train) + len(self.held_out):,} bytes with checksum {checksum:08x}"

    def draw_batch(
        self, generator: np.random.Generator, batch: int, context: int, part: slice = WHOLE
    ) -> tuple[Bytes, Bytes]:
        """Draw random training sequences and, as targets, the byte after each of their bytes.

        Args:
            generator: The source of randomness.
            batch: Number of sequences to draw.
            context: Length of a sequence.
            part: The sequences to return; the others are drawn all the same.

        Returns:
            Inputs and targets, each [part of batch, context].
        """
        starts = generator.integers(len(self.train) - context, size=batch)[part]
        return split_windows(cut_windows(self.train, starts, context))

    def held_out_windows(self, count: int, context: int) -> tuple[Bytes, Bytes]:
        """Return at most ``count`` held-out sequences, evenly spread, the same at every call.

        Returns:
            Inputs and targets, each [count, context].
        """
        last = len(self.held_out) - context - 1
        count = min(count, last // context + 1)
        starts = np.linspace(0, last, count).astype(np.int64)
        return split_windows(cut_windows(self.held_out, starts, context))


def load_corpus(text: Path | None, context: int) -> Corpus:
    """Read and split a text.

    A hash of its path decides the side of a file, so that it is the same on every machine and in
    every run. Where this leaves a side too short, as it does with one file or a few, the text is
    cut into chunks, and a hash of its position decides the side of a chunk.

    Args:
        text: A file, a folder, or None for the source of Python's standard library.
        context: The model's context; each side must be longer.

    Raises:
        ValueError: The text is missing, unreadable or too short.
    """
    name, files = read_standard_library() if text is None else read_text(text)
    text_nbytes = sum(len(content) for _, content in files)
    if text_nbytes < MIN_TEXT_NBYTES:
        raise ValueError(
            f"--text must hold at least {MIN_TEXT_NBYTES:,} bytes of text; "
            f"got {text_nbytes:,} in {name}. Choose a longer file or a folder with more files."
        )
    train, held_out = split_files(files)
    if len(held_out) < text_nbytes // (4 * HELD_OUT_ONE_IN) or len(train) < text_nbytes // 2:
        train, held_out = split_files(cut_chunks(files))
    if len(held_out) <= context:
        raise ValueError(
            f"--context must be shorter than the held-out text of {len(held_out):,} bytes; "
            f"got {context:,}. Choose a shorter context or a longer text."
        )
    return Corpus(name, train, held_out)


def read_standard_library() -> tuple[str, list[File]]:
    """Read the source of this Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if is_library_code(path.relative_to(root))]
    return f"Python {platform.python_version()}'s standard library", read_files(root, paths)


def is_library_code(path: Path) -> bool:
    """Whether a path within the library is neither a test nor an installed package."""
    return NOT_LIBRARY_CODE.isdisjoint(path.parts)


def read_text(text: Path) -> tuple[str, list[File]]:
    """Read the user's own file, or all text files below a folder except hidden ones.

    Raises:
        ValueError: There is no such file or folder, or it cannot be read.
    """
    try:
        if text.is_dir():
            paths = [path for path in text.rglob("*") if not is_hidden(path.relative_to(text))]
            return str(text), read_files(text, [path for path in paths if path.is_file()])
        return str(text), [(text.name, text.read_bytes())]
    except FileNotFoundError:
        raise ValueError(
            f"--text must be a file or a folder; got {str(text)!r}, which does not exist. "
            "Check the path, or leave --text out to learn from Python's standard library."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--text must be readable; got {str(error.filename or text)!r}: {error.strerror}. "
            "Change its permissions or choose another text."
        ) from None


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it is hidden, as .git and .venv are."""
    return any(part.startswith(".") for part in path.parts)


def read_files(root: Path, paths: list[Path]) -> list[File]:
    """Read the text files among ``paths``, sorted, as file systems list them in any order."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    files = [(name, path.read_bytes()) for name, path in named]
    return [(name, content) for name, content in files if is_text(content)]


def is_text(content: bytes) -> bool:
    """Whether a file is text, judged by the absence of zero bytes."""
    return b"\0" not in content[:BINARY_PROBE_NBYTES]


def cut_chunks(files: list[File]) -> list[File]:
    """Join the files and cut the text into chunks, named by their position."""
    joined = b"".join(content for _, content in files)
    starts = range(0, len(joined), CHUNK_NBYTES)
    return [(str(i), joined[start : start + CHUNK_NBYTES]) for i, start in enumerate(starts)]


def split_files(files: list[File]) -> tuple[Bytes, Bytes]:
    """Join the files of each side; returns the training and the held-out text."""
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for name, content in files:
        sides[is_held_out(name)].append(content)
    train, held_out = (np.frombuffer(b"".join(side), np.uint8) for side in sides)
    return train, held_out


def is_held_out(name: str) -> bool:
    """Whether a file or chunk of this name is held out."""
    return zlib.crc32(os.fsencode(name)) % HELD_OUT_ONE_IN == 0


def cut_windows(text: Bytes, starts: NDArray[np.int64], context: int) -> Bytes:
    """Copy ``context + 1`` bytes from each start; returns [starts, context + 1]."""
    windows: Bytes = text[starts[:, None] + np.arange(context + 1)]
    return windows


def split_windows(windows: Bytes) -> tuple[Bytes, Bytes]:
    """Split windows into inputs and the bytes that follow them."""
    return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Baselines:
    """The losses that counting reaches, in bits per byte: a model should do better."""

    unigram: float
    bigram: float


def count_baselines(train: Bytes, inputs: Bytes, targets: Bytes) -> Baselines:
    """Predict ``targets`` from counts of single bytes and of pairs in the training text.

    Every byte counts as seen once more than it was. Counts of pairs are smoothed with the
    probabilities of single bytes, as if each byte had been followed once more by an average text.

    Args:
        train: The text to count.
        inputs: The byte before each of ``targets``, in the same shape.
        targets: The bytes to predict, the same as the model's.
    """
    pairs = count_pairs(train)
    singles = np.bincount(train[:1], minlength=NUM_BYTES) + pairs.sum(axis=0)
    unigram = (singles + 1) / (singles + 1).sum()
    bigram = (pairs + unigram) / (pairs.sum(axis=1, keepdims=True) + 1)
    return Baselines(
        unigram=float(-np.log2(unigram[targets]).mean()),
        bigram=float(-np.log2(bigram[inputs, targets]).mean()),
    )


def count_pairs(text: Bytes) -> NDArray[Any]:
    """Count how often each byte is followed by each; returns integers [byte, next byte]."""
    counts = np.zeros(NUM_BYTES * NUM_BYTES, np.int64)
    for block in overlapping_blocks(text):
        pairs = block[:-1].astype(np.int64) * NUM_BYTES + block[1:]
        counts += np.bincount(pairs, minlength=counts.size)
    return counts.reshape(NUM_BYTES, NUM_BYTES)


def overlapping_blocks(text: Bytes) -> Iterator[Bytes]:
    """Yield the blocks of a text; each starts with the last byte of the one before."""
    for start in range(0, len(text) - 1, COUNT_BLOCK_NBYTES):
        yield text[start : start + COUNT_BLOCK_NBYTES + 1]
