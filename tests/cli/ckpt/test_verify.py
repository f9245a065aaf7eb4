"""Verification finds every damage, and names the tensors in it."""

import os
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from shardopt.checkpoint.format.manifest import CHUNK_NBYTES
from tests.support.checkpoints import alter_manifest, call, flip, make, manifest_of, refused

FILES = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
PARAMS = {
    "first": np.arange(500_000, dtype=np.float32),
    "second": np.ones((1000, 700), np.float32),
    "third": np.zeros(3, np.float64),
}


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "run" / "step-000000000007", PARAMS)


def findings_of(result):
    (entry,) = result.json
    assert result.code == (1 if entry["findings"] else 0)
    assert entry["intact"] == (not entry["findings"])
    return entry["findings"]


def tensors_at(path, file, start, stop):
    """Return the names of the arrays in a range of bytes, by the file's own header."""
    import json

    raw = (path / file).read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:base])
    header.pop("__metadata__")
    return {
        name
        for name, entry in header.items()
        if base + entry["data_offsets"][0] < stop and base + entry["data_offsets"][1] > start
    }


def test_what_is_intact(path, capsys):
    result = call(capsys, "verify", path)
    assert result.code == 0
    assert "intact" in result.stdout
    assert not findings_of(call(capsys, "verify", "--json", path.parent))


def test_every_damaged_chunk_is_named(path, capsys):
    assert manifest_of(path).files[1].num_chunks > 5
    for offset in (1 * CHUNK_NBYTES + 5, 3 * CHUNK_NBYTES, 4 * CHUNK_NBYTES - 1, 4 * CHUNK_NBYTES):
        flip(path / FILES[1], offset)
    flip(path / FILES[0], 0)
    found = findings_of(call(capsys, "verify", "--json", path))
    assert [(f["file"], f["chunks"]) for f in found] == [
        (FILES[0], [0, 1]),
        (FILES[1], [1, 2]),
        (FILES[1], [3, 5]),
    ]
    for finding in found[1:]:
        start, stop = (chunk * CHUNK_NBYTES for chunk in finding["chunks"])
        assert (finding["start"], finding["stop"]) == (start, stop)
        assert set(finding["tensors"]) == tensors_at(path, FILES[1], start, stop)
    assert "the header" in found[0]["tensors"]
    text = call(capsys, "verify", path).stdout
    assert f"chunks 3 to 4 of file {FILES[1]}, bytes 3145728 to 5242880" in text


def test_missing_truncated_and_surplus_files(path, capsys):
    (path / FILES[0]).unlink()
    os.truncate(path / FILES[1], 2 * CHUNK_NBYTES + 9)
    flip(path / FILES[1], CHUNK_NBYTES)
    (path / "more").touch()
    text = call(capsys, "verify", path).stdout
    nbytes = manifest_of(path).files[1].nbytes
    for told in (
        f"file {FILES[0]} must be there",
        f"file {FILES[1]} must have {nbytes} bytes",
        f"bytes {2 * CHUNK_NBYTES} to {nbytes} of file {FILES[1]} are missing: ",
        f"chunk 1 of file {FILES[1]}",
        "got more, too",
    ):
        assert told in text
    assert "second::exp_avg_sq" in text


def test_a_file_that_is_too_long(path, capsys):
    with (path / FILES[0]).open("ab") as file:
        file.write(b"x")
    (finding,) = findings_of(call(capsys, "verify", "--json", path))
    assert f"{FILES[0]} must have" in finding["problem"]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"F32"', b'"I32"'), (b'"second"', b'"secomd"'), (b"[24,", b"[28,"), (b"{", b" ")],
)
def test_a_header_that_contradicts_the_manifest(path, capsys, old, new):
    manifest = manifest_of(path)
    raw = bytearray((path / FILES[0]).read_bytes())
    end = manifest.files[0].header_nbytes
    raw[8:end] = bytes(raw[8:end]).replace(old, new, -1)
    (path / FILES[0]).write_bytes(raw)
    digest = xxhash.xxh3_128_hexdigest(raw[:CHUNK_NBYTES])
    entry = replace(manifest.files[0], digests=digest + manifest.files[0].digests[32:])
    alter_manifest(path, files=(entry, manifest.files[1]))
    (finding,) = findings_of(call(capsys, "verify", "--json", path))
    assert finding["problem"].startswith(f"header of file {FILES[0]}")


def test_quick_does_not_read(path, capsys):
    flip(path / FILES[1], 2 * CHUNK_NBYTES)
    assert call(capsys, "verify", "--quick", path).code == 0
    os.truncate(path / FILES[1], 9)
    assert call(capsys, "verify", "--quick", path).code == 1


def test_a_directory_is_all_of_its_checkpoints(path, capsys):
    run = path.parent
    small = {"w": np.ones(3, np.float32)}
    make(run / "step-000000000008", small, extra={"a": np.arange(3)})
    make(run / ".unfinished-step-000000000009-ab", small)
    flip(run / "step-000000000008" / FILES[0], 4096)
    result = call(capsys, "verify", "--json", run)
    assert result.code == 1
    assert [entry["intact"] for entry in result.json] == [True, False]
    only = run / "only"
    make(only / ".unfinished-step-000000000009-ab", small)
    refused(call(capsys, "verify", only), "without any")


def test_values_that_nobody_saved(path, capsys):
    alter_manifest(path, extra={"replicated": {"$array": [0, 5]}, "per_rank": None})
    (finding,) = findings_of(call(capsys, "verify", "--json", "--quick", path))
    assert "a value must be one that was saved" in finding["problem"]


def test_any_bit_that_flips_is_found(tmp_path, capsys):
    path = make(tmp_path / "a", {"w": np.arange(50, dtype=np.float32)}, num_files=1)
    generator = np.random.default_rng(0)
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for offset in [0, size - 1, *generator.integers(0, size, 12)]:
            flip(file, offset)
            for command in ("ls", "show"):
                assert call(capsys, command, path).code in (0, 1)
            assert call(capsys, "verify", path).code == 1
            flip(file, offset)
    assert call(capsys, "verify", path).code == 0
