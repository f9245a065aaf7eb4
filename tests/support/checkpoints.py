"""Checkpoints of any content, made without MPI, and the command line called from a test."""

import json
import re
from dataclasses import dataclass, replace

import numpy as np

from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.image import FileImage, FileLayout, Item
from shardopt.checkpoint.format.manifest import (
    MANIFEST_NAME,
    ArrayEntry,
    FileEntry,
    Manifest,
    ParamEntry,
    Slice,
    to_text,
)
from shardopt.checkpoint.format.names import file_name, tensor_name
from shardopt.checkpoint.format.parsing import from_text
from shardopt.checkpoint.format.values import Encoder
from shardopt.cli import main
from shardopt.layout.span import Span

FORM = re.compile(r"shardopt (?:ckpt|plan|trace): .+ must .+; got.+\. .+\.\n", re.DOTALL)


def zero_state(params):
    """State arrays of zeros, masters of the parameters' values, for ``make``."""
    state = {}
    for name, array in params.items():
        wide = np.float32 if array.dtype.itemsize == 2 else array.dtype
        state[name] = {key: np.zeros(array.size, wide) for key in ("exp_avg", "exp_avg_sq")}
        if array.dtype.itemsize == 2:
            state[name]["master"] = array.reshape(-1).astype(np.float32)
    return state


def make(path, params, state=None, step=7, num_files=2, extra=None, lr=0.1):
    """Write a checkpoint as ``num_files`` ranks would; ``params`` are arrays by name."""
    state = zero_state(params) if state is None else state
    encoder = Encoder(0)
    json_extra = encoder.encode(extra or {}, "extra")
    arrays = [array for array, _ in encoder.arrays]
    path.mkdir(parents=True)
    slices = [{key: [] for key in ("param", *state[name])} for name in params]
    files = []
    for rank in range(num_files):
        items, values_of, places = [], [], []
        for index, (name, array) in enumerate(params.items()):
            for key, values in {"param": array, **state[name]}.items():
                flat = values.reshape(-1)
                span = Span(0, flat.size).cut(rank, num_files)
                if span:
                    # A name with colons would look like a part of another.
                    part = Span(0, flat.size) if "::" in name else None
                    items.append(Item(tensor_name(name, key, part), values.dtype.name, span))
                    values_of.append(flat[span.slice])
                    places.append((index, key, span))
        held = arrays if rank == 0 else []
        items += [Item(f"extra/{i}", a.dtype.name, Span(0, a.size)) for i, a in enumerate(held)]
        layout = FileLayout(items)
        image = FileImage(layout, [*values_of, *(array.reshape(-1) for array in held)])
        digests = disk.write_file(path / file_name(rank, num_files), image)
        for (index, key, span), offset in zip(places, layout.offsets, strict=False):
            slices[index][key].append(Slice(span.start, span.stop, rank, offset))
        offsets = layout.offsets[len(places) :]
        entries = [ArrayEntry(a.dtype.name, a.shape, o) for a, o in zip(held, offsets, strict=True)]
        files.append(
            FileEntry(
                file_name(rank, num_files),
                image.nbytes,
                layout.header.size,
                digests,
                tuple(entries),
            )
        )
    manifest = Manifest(
        step=step,
        world_size=num_files,
        num_steps=step,
        loss_scale=1.0,
        params=tuple(
            ParamEntry(name, array.dtype.name, array.shape, 0, step, 0.5)
            for name, array in params.items()
        ),
        slices=tuple(slices),
        groups=[{"lr": lr, "betas": {"$tuple": [0.9, 0.999]}}],
        extra={"replicated": json_extra, "per_rank": None},
        files=tuple(files),
        created=f"2025-01-02T03:04:{step % 60:02d}+00:00",
        attempt="0",
        writer={"shardopt": "0"},
    )
    disk.write_manifest(path, to_text(manifest))
    return path


def alter_manifest(path, **changes):
    """Write the manifest anew with other fields, and a digest that fits."""
    file = path / MANIFEST_NAME
    manifest = replace(from_text(file.read_bytes()), **changes)
    file.write_bytes(to_text(manifest))
    return manifest


def manifest_of(path):
    return from_text((path / MANIFEST_NAME).read_bytes())


def flip(file, offset):
    """Change one bit of a file."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


@dataclass(frozen=True)
class Result:
    """What a call of the command line gave."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)


def call(capsys, *words, command="ckpt"):
    """Run ``shardopt ckpt``, or another command, with some words, in this process."""
    capsys.readouterr()
    try:
        code = main([command, *map(str, words)])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return Result(int(code), captured.out, captured.err)


def refused(result, *told):
    """The call must have been refused in one sentence that has each of ``told`` in it."""
    assert result.code == 2
    assert FORM.fullmatch(result.stderr), result.stderr
    assert not [words for words in told if words not in result.stderr], result.stderr
