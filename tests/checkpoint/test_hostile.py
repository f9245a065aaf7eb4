"""Checkpoints made to harm are refused: quickly, in little memory, and with our own errors alone.

All of these manifests have the right SHA-256, as anybody can compute it.
"""

import ast
import copy
import hashlib
import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardopt.checkpoint
from shardopt import NAdam
from shardopt.checkpoint import load
from shardopt.checkpoint.format.manifest import (
    CHUNK_NBYTES,
    DTYPES,
    MANIFEST_NAME,
    MAX_MANIFEST_NBYTES,
    ArrayEntry,
    FileEntry,
    Manifest,
    ModelEntry,
    ParamEntry,
    Slice,
    to_text,
)
from shardopt.checkpoint.format.names import file_name
from shardopt.checkpoint.format.parsing import from_text
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.checkpoint.matching import read_saved
from shardopt.errors import CheckpointError, DamagedCheckpointError
from shardopt.layout.state_spec import BLOCK_NUMEL, StateForm
from tests.checkpoint.make_golden import FOLDER, make_groups
from tests.support.damage import standing
from tests.support.errors import FORM, POLICY

GOLDEN = FOLDER / "v1-3"
CONTENT = json.loads((GOLDEN / MANIFEST_NAME).read_bytes().partition(b"\n")[2])


def seal(body):
    """A manifest of these bytes, with the SHA-256 that belongs to them."""
    return b'{"sha256": "%s"}\n%s' % (hashlib.sha256(body).hexdigest().encode(), body)


def seal_json(content):
    """A manifest of such content, which may hold NaN."""
    return seal(json.dumps(content).encode())


MODEL = {"values": [], "per_rank": None, "aliases": [], "versions": None}


def refusal_of(text):
    """What a manifest is refused with; it must be refused, and with words in our form."""
    with pytest.raises(DamagedCheckpointError) as caught:
        from_text(text)
    assert FORM.fullmatch(str(caught.value)), str(caught.value)
    return str(caught.value)


def assert_readable_or_refused(text):
    """Nothing but our own errors may come of a manifest, also when it is read from."""
    with suppress_ours():
        manifest = from_text(text)
        with Reader(GOLDEN, manifest) as reader:
            list(reader.file_problems())
            reader.extra()
            for source in read_saved(manifest, None, 0).values.values():
                reader.decode(source.value)
            for group in manifest.groups:
                reader.decode(group)


@contextmanager
def suppress_ours():
    try:
        yield
    except CheckpointError as error:
        told = str(error)
    else:
        return
    assert FORM.fullmatch(told), told


def nodes(value, path=()):
    """The path of every node of a JSON tree."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def edited(path, edit):
    """The golden manifest, one of its nodes edited in its container."""
    content = copy.deepcopy(CONTENT)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    edit(parent, path[-1])
    return content


def put(value):
    def edit(parent, key):
        parent[key] = value

    return edit


def drop(parent, key):
    del parent[key]


def double(parent, key):
    if isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[f"{key}."] = parent[key]


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


NASTY = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        4096,
        1 << 31,
        1 << 62,
        (1 << 62) + 1,
        10**18,
        -(10**18),
    ),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1e308, -1e308, 5e-324),
    *("", "0", "a", "\0", "..", "../x", "/etc/passwd", "\ud800", "\U0001f600", "x" * 5000, "torch"),
    *("float32", "float128", "object", "rank-00000-of-00003.safetensors", "manifest.json"),
    *([], [0], [[]], [0, 1, 0, 4096], ["a"] * 4, [1 << 62] * 4, [-1] * 4, [True] * 4, deep(100)),
    *({}, {"a": 1}, {"": None}, {"$array": [0, 0]}, {"$array": [2, 1 << 62]}, {"$float": "nan"}),
    *({"$float": []}, {"$tuple": [[]]}, {"$items": [[[], 0]]}, {"$items": [[1, 2], [1, 3]]}),
]
PATHS = [path for path in nodes(CONTENT) if path]
COMPARED = ("format", "chunk_nbytes", "world_size", "params", "files")
"""Where any other value at all must be refused."""


def shape_of(path):
    """A path with all indices alike: a table's rows are read alike."""
    return tuple("*" if isinstance(key, int) else key for key in path)


FIRST_OF_SHAPE = list({shape_of(path): path for path in reversed(PATHS)}.values())


def test_nodes_may_be_anything():
    assert len(FIRST_OF_SHAPE) > 60
    assert_nodes_may_be(FIRST_OF_SHAPE, every=5)


@pytest.mark.long
@pytest.mark.parametrize("part", range(25))
def test_every_node_may_be_anything(part):
    assert_nodes_may_be(PATHS[part::25], every=1)


def assert_nodes_may_be(paths, every):
    for index, path in enumerate(paths):
        for value in NASTY[index % every :: every]:
            assert_readable_or_refused(seal_json(edited(path, put(value))))
        assert_readable_or_refused(seal_json(edited(path, drop)))
        assert_readable_or_refused(seal_json(edited(path, double)))


def test_no_node_of_the_layout_may_be_another():
    """Where data lies is said in full: nothing in it can be changed unnoticed."""
    for path in PATHS:
        free = {"name", "group", "step", "mu_product", "digests"} & set(path)
        if path[0] not in COMPARED or free:
            continue
        parents, old = [], CONTENT
        for key in path:
            parents.append(old)
            old = old[key]
        if any(0 in node.get("shape", ()) for node in parents if isinstance(node, dict)):
            continue  # nothing lies anywhere
        for value in (old + 1 if type(old) is int else None, "x", [[]], {"a": 0}, True):
            refusal_of(seal_json(edited(path, put(value))))
        if type(old) in (int, str, list, dict) and isinstance(path[-1], str):
            refusal_of(seal_json(edited(path, drop)))


@st.composite
def mutations(draw):
    """Edits of several nodes at once, one after another."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 5))):
        path = draw(st.sampled_from([path for path in nodes(content) if path]))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        value = draw(st.one_of(st.sampled_from(NASTY), st.floats(), st.integers(), st.text()))
        draw(st.sampled_from([put(copy.deepcopy(value)), drop, double]))(parent, path[-1])
        if not content:
            break
    return content


@given(mutations())
def test_any_nodes_may_be_anything(content):
    assert_readable_or_refused(seal_json(content))


@given(st.binary(max_size=200), st.integers(0, 4000), st.integers(0, 100))
def test_any_bytes_may_stand_anywhere(content, start, length):
    body = json.dumps(CONTENT).encode()
    assert_readable_or_refused(seal(body[:start] + content + body[start + length :]))
    assert_readable_or_refused(seal(content))
    assert_readable_or_refused(content)


# -- one by one ------------------------------------------------------------------------------------

NAMES = [
    *("../rank-00000-of-00003.safetensors", "/rank-00000-of-00003.safetensors", "..", ".", ""),
    *("rank-00000-of-00003.safetensors\0", "rank-00000-of-00003.safetensors\n", "\0"),
    *("a/rank-00000-of-00003.safetensors", "rank-00000-of-00003.safetensors/..", MANIFEST_NAME),
    *("rank-0000\u0661-of-00003.safetensors", "rank-00000-of-00003.safetensors\u202e"),
    *("rank-00000-of-00003.SAFETENSORS", "rank-0-of-3.safetensors", "\ud800", "\x1b[2J"),
]


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_a_file_has_one_of_our_names(index):
    told = refusal_of(seal_json(edited(("files", 0, "name"), put(NAMES[index]))))
    assert "have a name like rank-00000-of-00004.safetensors" in told
    assert told.isprintable()


def param_with(**changes):
    return edited(("params", 0), lambda params, i: params[i].update(changes))


def with_slices(*slices):
    return edited(("params", 0, "slices", "param"), put([list(part) for part in slices]))


def with_form(**changes):
    return param_with(**{"optim_bits": 8, "has_masters": True, "chance": "0f", **changes})


def with_cut_codes():
    content = with_form()
    content["params"][0]["slices"]["exp_avg"].insert(0, [0, 100, 0, 4096])
    content["params"][0]["slices"]["exp_avg"][1][0] = 100
    return content


FIRST, SECOND, THIRD = CONTENT["params"][0]["slices"]["param"]
WORDS = {
    "overlap": (with_slices(FIRST, [4000, 8192, *SECOND[2:]], THIRD), "go on at element 4096"),
    "gap": (with_slices(FIRST, THIRD), "go on at element 4096"),
    "short": (with_slices(FIRST, SECOND), "reach element 8232; got 8192"),
    "long": (with_slices(FIRST, SECOND, [8192, 8233, *THIRD[2:]]), "reach element 8232; got 8233"),
    "empty slice": (with_slices([0, 0, 0, 4096], FIRST, SECOND, THIRD), "go on at element 0"),
    "no file": (with_slices(FIRST, SECOND, [8192, 8232, 3, 4096]), "lie in one of 3 files"),
    "twice": (with_slices(FIRST, [4096, 8192, *FIRST[2:]], THIRD), "must have data "),
    "in the header": (with_slices([0, 4096, 1, 0], SECOND, THIRD), "have data from byte 4096 on"),
    "behind the end": (with_slices([0, 4096, 1, 10**18], SECOND, THIRD), "must have data"),
    "three numbers": (with_slices(FIRST[:3], SECOND, THIRD), "be [start, stop, file, offset]"),
    "elements of no memory": (param_with(shape=[1 << 31, 1 << 31]), "reach element"),
    "more elements": (param_with(shape=[1 << 32, 1 << 31]), "fewer dimensions or elements"),
    "dimensions": (param_with(shape=[1] * 65), "fewer dimensions or elements"),
    "negative": (param_with(shape=[-8232]), "be whole numbers from 0"),
    "a dtype": (param_with(dtype="int32"), "be one of float16, bfloat16, float32, float64"),
    "mu_product": (param_with(mu_product=1.5), "lie in [0, 1]; got 1.5"),
    "a group": (param_with(group=2), "be below 2; got 2"),
    "a name twice": (param_with(name="empty"), "have different names"),
    "header beyond": (edited(("files", 0, "header_nbytes"), put(4222)), "have a header within it"),
    "no header": (edited(("files", 0, "header_nbytes"), put(0)), "have data from byte 0 on"),
    "a size": (edited(("files", 0, "nbytes"), put(1 << 62)), "digests of 32 hexadecimal digits"),
    "digits": (edited(("files", 0, "digests"), put("g" * 32)), "hexadecimal digits"),
    "capitals": (edited(("files", 0, "digests"), put("A" * 32)), "hexadecimal digits"),
    "a file twice": (edited(("files", 0), double), "have different names"),
    "a file less": (edited(("files", 0), drop), "lie in one of 2 files"),
    "ranks": (edited(("world_size",), put(4)), "be 4, one for each rank; got 3"),
    "chunks": (edited(("chunk_nbytes",), put(4096)), "chunk_nbytes must be 1048576"),
    "per_rank": (edited(("extra", "per_rank"), put([1])), "be null or 3 entries"),
    "form": (edited(("files", 1, "arrays", 0, "form"), put(3)), "be a string; got int"),
    "model": (edited(("model",), put([])), "model of manifest.json must be an object; got list"),
    "model values": (edited(("model",), put({**MODEL, "values": {"a": 1}})), "be a list of [text"),
    "model names": (edited(("model",), put({**MODEL, "values": [["a", 1]] * 2})), "each text once"),
    "model aliases": (edited(("model",), put({**MODEL, "aliases": [["a", 1]]})), "must be names"),
    "model ranks": (edited(("model",), put({**MODEL, "per_rank": [[]]})), "be null or 3 entries"),
    "model rank": (
        edited(("model",), put({**MODEL, "per_rank": [[], [], [1]]})),
        "of [text, value]",
    ),
    "a field less": (edited(("optimizer", "loss_scale"), drop), "have the field 'loss_scale'"),
    "bits": (with_form(optim_bits=4), "optim_bits of params[0] of manifest.json must be 8 or 32"),
    "bits of float64": (with_form(dtype="float64"), "be 32 for float64; got 8"),
    "no masters": (with_form(has_masters=0), "be true or false; got 0"),
    "masters of float16": (with_form(dtype="float16", has_masters=False), "except for bfloat16"),
    "chance": (with_form(chance=7), "be a string; got int"),
    "codes of floats": (with_form(), "must have data from byte"),
    "codes that are cut": (with_cut_codes(), "must begin at multiples of 256; got 100"),
    "format": (edited(("format",), put("zip")), "be of format 'shardopt'; got zip"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_is_wrong_is_said(name):
    content, told = WORDS[name]
    assert told in refusal_of(seal_json(content))


BODY = json.dumps(CONTENT).encode()
TEXTS = {
    "nothing": b"",
    "a key twice": BODY[:-1] + b',"step": 3}',
    "a key twice inside": BODY.replace(b'"name": "NAdam"', b'"name": "NAdam", "name": "NAdam"'),
    "NaN": BODY.replace(b'"loss_scale": 8.0', b'"loss_scale": NaN'),
    "Infinity": BODY.replace(b'"loss_scale": 8.0', b'"loss_scale": -Infinity'),
    "a float too large": BODY.replace(b'"loss_scale": 8.0', b'"loss_scale": 1e999'),
    "a long float": BODY.replace(b'"loss_scale": 8.0', b'"loss_scale": ' + b"9" * 5000 + b".5"),
    "400 digits": BODY.replace(b'"loss_scale": 8.0', b'"loss_scale": ' + b"9" * 400),
    "a million digits": BODY.replace(b'"step": 3', b'"step": ' + b"1" * 1_000_000),
    "no object": b"[]",
    "a comma": BODY[:-1] + b",}",
    "no UTF-8": BODY.replace(b"NAdam", b"NAd\xffm"),
    "UTF-16": BODY.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + BODY,
    "two documents": BODY + BODY,
    "deep lists": BODY[:-1] + b',"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep lists without end": b"[" * 100_000,
    "deep objects": BODY[:-1] + b',"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_json_of_a_checkpoint_is_refused(name):
    assert TEXTS[name] != BODY
    refusal_of(seal(TEXTS[name]))


@pytest.mark.parametrize("levels", [*range(10, 130, 20), *range(850, 1000, 3), 5000])
def test_depth_near_the_interpreters_limit(levels):
    """Deep enough to be parsed, and too deep for whatever looks at it then."""
    for path in [("step",), ("params", 0, "shape"), ("extra", "replicated"), ("files", 0, "name")]:
        text = json.dumps(edited(path, put("HERE"))).encode()
        body = text.replace(b'"HERE"', b"[" * levels + b"]" * levels)
        assert_readable_or_refused(seal(body))


FIRST_LINES = {
    "nothing": b"",
    "a digest too many": b'{"sha256": "0", "sha256": "%s"}',
    "a list": b'["%s"]',
    "a number": b'{"sha256": 1}',
    "another name": b'{"sha512": "%s"}',
    "capitals": None,
    "other white space": b'{"sha256":\t"%s"}',
    "a field more": b'{"sha256": "%s", "more": 1}',
}


@pytest.mark.parametrize("name", FIRST_LINES)
def test_a_first_line_that_is_none_of_ours_is_refused(name):
    digest = hashlib.sha256(BODY).hexdigest().encode()
    line = FIRST_LINES[name]
    if line is None:
        line = b'{"sha256": "%s"}' % digest.upper()
    refusal_of(line.replace(b"%s", digest) + b"\n" + BODY)
    refusal_of(line.replace(b"%s", digest))


def test_a_newer_version_is_named_with_its_remedy():
    content = CONTENT | {"version": 4, "min_reader_version": 4, "files": "of another form"}
    with pytest.raises(CheckpointError) as caught:
        from_text(seal_json(content))
    assert type(caught.value) is CheckpointError
    assert str(caught.value) == (
        "manifest.json must be of format version 3 or older; got 4. Install a newer shardopt."
    )


def test_fields_of_later_versions_are_ignored():
    content = copy.deepcopy(CONTENT) | {"version": 7, "later": {"deep": [deep(50), {"$x": 1}]}}
    for entry in (*content["params"], *content["files"], content["optimizer"]):
        entry["later"] = [1, None]
    assert from_text(seal_json(content)) == read_manifest(GOLDEN)


# -- what is loaded into an optimizer --------------------------------------------------------------


@pytest.fixture
def opt():
    with NAdam(make_groups(3, start=0.5), policy=POLICY) as opt:
        yield opt


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint, to be given other manifests."""
    path = tmp_path / "golden"
    path.mkdir()
    for file in GOLDEN.iterdir():
        (path / file.name).hardlink_to(file) if file.suffix != ".json" else None
    return path


GROUPS = [
    *({"lr": "x"}, {"lr": -1.0}, {"lr": None}, {"lr": {"$float": "nan"}}, {"lr": 10**400}),
    *({"lr": {"$array": [0, 0]}}, {"lr": [1.0]}, {"betas": 3}, {"betas": "ab"}, {"betas": [1, 2]}),
    *({"betas": {"$tuple": [0.9]}}, {"betas": [10**400, 0]}, {"eps": {"a": 1}}, {"variant": 3}),
    *({"variant": []}, {"variant": {"$array": [0, 0]}}, {"variant": "lucid2"}, {"variant": None}),
    *({"momentum_decay": True, "weight_decay": "0.1"}, {"weight_decay": {"$float": "inf"}}),
    *({"variant": "lucid", "decoupled_weight_decay": {"$array": [0, 0]}},),
    *({"decoupled_weight_decay": {"$array": [0, 0]}}, {"maximize": {"$array": [0, 1]}}),
]


@pytest.mark.parametrize("index", range(len(GROUPS)))
def test_hyperparameters_that_are_none_are_refused(opt, folder, index):
    before = standing(opt)
    content = edited(("optimizer", "groups", 0), lambda groups, i: groups[i].update(GROUPS[index]))
    (folder / MANIFEST_NAME).write_bytes(seal_json(content))
    with pytest.raises(DamagedCheckpointError, match=r"^param_groups\[0\] must be valid; got "):
        load(folder, opt)
    assert standing(opt) == before


@pytest.mark.parametrize(
    "group", [[], None, 3, {"$items": [[[], 1]]}, {"$tuple": []}, {"$array": [0, 0]}], ids=repr
)
def test_a_group_that_is_none_is_refused(opt, folder, group):
    before = standing(opt)
    content = edited(("optimizer", "groups", 1), put(group))
    (folder / MANIFEST_NAME).write_bytes(seal_json(content))
    with pytest.raises(DamagedCheckpointError):
        load(folder, opt)
    assert standing(opt) == before


def test_a_group_cannot_bring_parameters(opt, folder):
    mine = [group["params"] for group in opt.param_groups]
    changes = {"params": [1, 2], "param_names": ["a"], "of mine": 1}
    content = edited(("optimizer", "groups", 0), lambda groups, i: groups[i].update(changes))
    content["optimizer"]["groups"][1] = {"$items": [[1, 2], [None, "x"]]}
    (folder / MANIFEST_NAME).write_bytes(seal_json(content))
    load(folder, opt)
    assert [group["params"] for group in opt.param_groups] == mine
    assert all(
        now is then for now, then in zip(opt.param_groups[0]["params"], mine[0], strict=True)
    )
    assert "param_names" not in opt.param_groups[0]
    assert opt.param_groups[0]["of mine"] == 1
    assert opt.param_groups[1][None] == "x"
    assert opt.param_groups[1]["lr"] == 0.01  # as it was


EXTRA = [
    *({"$array": [0, 6]}, {"$array": [3, 0]}, {"$array": [0, -1]}, {"$array": [0]}, {"$array": 0}),
    *({"$items": [[{"$array": [0, 0]}, 1]]}, {"$items": [[[1], 2]]}, {"$items": 3}, {"$x": 1}),
    *({"$float": {}}, {"$tuple": 1}, deep(200), [{"$array": [0, 0]}, {"$array": [0, 0]}]),
]


@pytest.mark.parametrize("index", range(len(EXTRA)))
def test_extra_that_nobody_saved_is_refused(opt, folder, index):
    before = standing(opt)
    for path in (("extra", "replicated"), ("extra", "per_rank", 1)):
        content = edited(path, put({"deep": [EXTRA[index]]}))
        (folder / MANIFEST_NAME).write_bytes(seal_json(content))
        with pytest.raises(DamagedCheckpointError):
            load(folder, opt)
    assert standing(opt) == before


# -- manifests and files without end ---------------------------------------------------------------

LIMITED = """
import resource, sys, time
from pathlib import Path
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.errors import CheckpointError

used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
try:
    with Reader(Path(sys.argv[1]), read_manifest(Path(sys.argv[1]))) as reader:
        reader.require_files()
        reader.read(reader.whole_files())
        reader.extra()
except CheckpointError as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    print(type(error).__name__, grown, f"{time.monotonic() - start:.1f}", error, sep="|")
"""


def read_alone(path, timeout_s=20):
    """Read a checkpoint in a process of its own; gives the error, KiB and seconds it took."""
    job = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
    )
    kind, grown, seconds, text = job.stdout.strip().split("|", 3)
    return kind, int(grown), float(seconds), text


def test_a_manifest_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.write(seal(BODY))
        file.truncate(300_000_000)
    kind, grown, _, text = read_alone(tmp_path)
    assert (kind, text) == (
        "DamagedCheckpointError",
        f"manifest.json must have at most {MAX_MANIFEST_NBYTES} bytes; got 300000000. "
        "Use another checkpoint.",
    )
    assert grown < 20_000


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "loop", "socket"])
def test_a_manifest_that_is_no_file_is_refused(tmp_path, kind):
    place = tmp_path / MANIFEST_NAME
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to({"zero": "/dev/zero", "loop": place, "socket": "/proc/self/ns/net"}[kind])
    with pytest.raises(DamagedCheckpointError, match=rf"{MANIFEST_NAME} must be (a file|readable)"):
        read_manifest(tmp_path)


def sparse(path, nbytes, digests, shape):
    """A checkpoint of one array of ``extra`` in a file that takes no space."""
    array = {"dtype": "uint8", "shape": shape, "offset": 0}
    file = {"name": file_name(0, 1), "nbytes": nbytes, "header_nbytes": 0, "arrays": [array]}
    extra = {"replicated": {"a": {"$array": [0, 0]}}, "per_rank": None}
    content = CONTENT | {"world_size": 1, "params": [], "extra": extra}
    content["files"] = [file | {"digests": digests}]
    (path / MANIFEST_NAME).write_bytes(seal_json(content))
    with (path / file_name(0, 1)).open("wb") as data:
        data.truncate(nbytes)


def test_a_sparse_file_is_read_no_further_than_its_first_wrong_chunk(tmp_path):
    nbytes = 1 << 38
    try:
        sparse(tmp_path, nbytes, "0" * (32 * nbytes // CHUNK_NBYTES), [nbytes])
    except OSError:
        pytest.skip("no such large files here")
    kind, grown, seconds, text = read_alone(tmp_path)
    assert kind == "DamagedCheckpointError"
    assert text.startswith(f"chunk 0 of file {file_name(0, 1)} must have the digest 000")
    assert grown < 400_000
    assert seconds < 15


@pytest.mark.parametrize("shape", [[0, 1 << 62], [1 << 62, 0], [0] * 64, [0] * 65])
def test_an_array_of_no_elements_and_many_dimensions(tmp_path, shape):
    sparse(tmp_path, 0, "", shape)
    try:
        with Reader(tmp_path, read_manifest(tmp_path)) as reader:
            assert reader.extra()["a"].size == 0
    except DamagedCheckpointError:
        pass


# -- there and back --------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=9), st.floats(-9, 9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


def models(num_files):
    """Entries of a model, with values of every rank or without."""
    values = st.dictionaries(st.text(max_size=9), PLAIN, max_size=3)
    return st.builds(
        ModelEntry,
        values,
        st.none() | st.lists(values, min_size=num_files, max_size=num_files),
        st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=2),
        PLAIN,
    )


FORMS = {dtype: [StateForm(), StateForm(8)] for dtype in DTYPES}
FORMS["float64"] = [StateForm()]
FORMS["bfloat16"] += [StateForm(bits, has_masters=False) for bits in (8, 32)]


@st.composite
def manifests(draw):
    """Manifests of any number of files and parameters, cut and placed as they like."""
    num_files = draw(st.integers(1, 4))
    runs = [[] for _ in range(num_files)]  # (nbytes, put) of what lies in each file
    params, slices, arrays = [], [], [[] for _ in range(num_files)]
    groups = draw(st.lists(PLAIN, min_size=1, max_size=3))
    for index in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        form = draw(st.sampled_from(FORMS[dtype]))
        param = ParamEntry(
            name=f"{draw(st.text(max_size=9))}{index}",
            dtype=dtype,
            shape=tuple(draw(st.lists(st.integers(0, 5), max_size=4))),
            group=draw(st.integers(0, len(groups) - 1)),
            step=draw(st.integers(0, 1 << 62)),
            mu_product=draw(st.floats(0, 1)),
            form=form,
            chance=draw(st.text(max_size=9)) if form.rounds_by_chance else "",
        )
        tensors = {}
        for key in param.tensors:
            cuts = draw(st.sets(st.integers(1, max(1, param.numel - 1)), max_size=4))
            if param.spec_of(key).codec is not None:
                cuts = {-(-cut // BLOCK_NUMEL) * BLOCK_NUMEL for cut in cuts}
            edges = sorted({0, *(cut for cut in cuts if cut < param.numel), param.numel})
            tensors[key] = parts = []
            for start, stop in itertools.pairwise(edges):
                file = draw(st.integers(0, num_files - 1))
                nbytes = param.spec_of(key).nbytes(stop - start)
                runs[file].append(
                    (nbytes, lambda o, p=parts, c=(start, stop, file): p.append(Slice(*c, o)))
                )
        params.append(param)
        slices.append(tensors)
    for file in range(num_files):
        for _ in range(draw(st.integers(0, 2))):
            entry = ArrayEntry(
                draw(st.sampled_from(["bool", "int64", "bfloat16", "complex128"])),
                tuple(draw(st.lists(st.integers(0, 3), max_size=3))),
                0,
                draw(st.sampled_from(["", "torch.bfloat16", "nobody's"])),
            )
            put_array = lambda o, f=file, e=entry: arrays[f].append(replace(e, offset=o))  # noqa: E731
            runs[file].append((entry.nbytes, put_array))
    files = []
    for file in range(num_files):
        position = header_nbytes = draw(st.sampled_from([0, 8, 4096, CHUNK_NBYTES + 4096]))
        for nbytes, place in draw(st.permutations(runs[file])):
            place(position)
            position += nbytes
        digests = "0123456789abcdef" * 2 * -(-position // CHUNK_NBYTES)
        name = file_name(file, num_files)
        files.append(FileEntry(name, position, header_nbytes, digests, tuple(arrays[file])))
    for tensors in slices:
        for parts in tensors.values():
            parts.sort()
    per_rank = draw(st.none() | st.lists(PLAIN, min_size=num_files, max_size=num_files))
    return Manifest(
        step=draw(st.integers(0, 1 << 62)),
        world_size=num_files,
        num_steps=draw(st.integers(0, 1 << 62)),
        loss_scale=draw(st.floats(1e-9, 1e30)),
        params=tuple(params),
        slices=tuple(slices),
        groups=groups,
        extra={"replicated": draw(PLAIN), "per_rank": per_rank},
        files=tuple(files),
        created=draw(st.text(max_size=9)),
        attempt=draw(st.text(max_size=9)),
        writer=draw(st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=2)),
        model=draw(st.none() | models(num_files)),
    )


@hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
@given(manifests())
def test_a_manifest_comes_back(manifest):
    text = to_text(manifest)
    assert from_text(text) == manifest
    assert to_text(from_text(text)) == text


@hypothesis.settings(suppress_health_check=list(hypothesis.HealthCheck))
@given(manifests(), st.data())
def test_no_byte_of_a_manifest_can_change(manifest, data):
    text = to_text(manifest)
    place = data.draw(st.integers(0, len(text) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[place]))
    refusal_of(text[:place] + bytes([byte]) + text[place + 1 :])
    refusal_of(text[:place])
    refusal_of(text + bytes([byte]))


# -- the code --------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
    "copyreg",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "getattr", "setattr"}
ALLOWED = {  # with names out of tables of the code
    ("__init__.py", "import_module"),
    ("__init__.py", "getattr"),
    ("matching.py", "getattr"),
    ("tensors.py", "import_module"),
    ("form.py", "getattr"),
}


def test_nothing_that_is_read_can_be_run():
    folder = Path(shardopt.checkpoint.__file__).parent
    found = set()
    for path in sorted(folder.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0], *(a.name for a in node.names)]
            found |= {(path.name, name) for name in names if name in FORBIDDEN_MODULES}
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
                constant = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
                if name == "compile" and isinstance(node.func, ast.Attribute):
                    continue  # of re
                if name in FORBIDDEN_CALLS and not (name in ("getattr", "setattr") and constant):
                    found.add((path.name, name))
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                if name in ("load", "fromfile", "loads") and "allow_pickle" in keywords:
                    found.add((path.name, "allow_pickle"))
    assert found <= ALLOWED
