"""The power-loss model itself: small protocols whose weak points are known."""

import os
import pickle
import random
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.power_loss import (
    Operation,
    Recorder,
    crash_states,
    fsyncs,
    materialise,
    merge,
    read_tree,
    replay,
    without,
)

DATA = bytes(range(1, 101))
CREATE = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
CUT, TORN, HOLED = DATA[:50], DATA[:50] + bytes(50), bytes(50) + DATA[50:]


def sync_folder(rec, path):
    fd = rec.open(path, os.O_RDONLY)
    rec.fsync(fd)
    rec.close(fd)


def write_file(rec, path, data=DATA, *, sync=True):
    fd = rec.open(path, CREATE)
    rec.pwrite(fd, data, 0)
    if sync:
        rec.fsync(fd)
    rec.close(fd)


def save(rec, folder, data=DATA):
    write_file(rec, folder / "new", data)
    rec.rename(folder / "new", folder / "final")
    sync_folder(rec, folder)
    rec.mark("saved")


def states(log, root, mark=None, **options):
    """The states that may be left; those after the mark if there is one."""
    return [
        crash.state
        for crash in crash_states(log, root, **options)
        if mark is None or mark in crash.marks
    ]


def changing(kind, start, end, file=(1, 1), path="/r/f", **told):
    return Operation(kind, start, end, path, file, **told)


def test_a_rename_may_last_before_the_data_of_its_file_do(tmp_path):
    rec = Recorder()
    write_file(rec, tmp_path / "new", sync=False)
    rec.rename(tmp_path / "new", tmp_path / "final")
    sync_folder(rec, tmp_path)
    rec.mark("saved")
    left = {state["final"] for state in states(rec.log, tmp_path, "saved")}
    assert left == {b"", bytes(100), CUT, TORN, HOLED, DATA}


def test_a_synced_file_may_have_any_name_or_none_until_its_directory_is_synced(tmp_path):
    rec = Recorder()
    write_file(rec, tmp_path / "new")
    rec.rename(tmp_path / "new", tmp_path / "final")
    rec.mark("saved")
    left = states(rec.log, tmp_path, "saved")
    assert sorted(map(sorted, left)) == [[], ["final"], ["new"]]
    assert all(content == DATA for state in left for content in state.values())


def test_after_the_whole_protocol_nothing_is_lost(tmp_path):
    rec = Recorder()
    save(rec, tmp_path)
    assert states(rec.log, tmp_path, "saved") == [{"final": DATA}]
    before = [crash for crash in crash_states(rec.log, tmp_path) if not crash.marks]
    assert {} in [crash.state for crash in before]
    assert {"new": TORN} in [crash.state for crash in before]
    assert all(crash.state.get("final", DATA) == DATA for crash in before)


@pytest.mark.parametrize("role", ["new", "."])
def test_the_whole_protocol_needs_each_of_its_fsyncs(tmp_path, role):
    rec = Recorder()
    save(rec, tmp_path)
    groups = dict(fsyncs(rec.log, tmp_path))
    assert [(name, len(ops)) for name, ops in groups.items()] == [("new", 1), (".", 1)]
    log = without(rec.log, groups[role].__contains__)
    assert len(log) == len(rec.log) - 1
    assert any(state != {"final": DATA} for state in states(log, tmp_path, "saved"))


def test_a_replacement_leaves_the_old_file_or_the_new_one(tmp_path):
    (tmp_path / "final").write_bytes(b"old")
    initial = read_tree(tmp_path)
    rec = Recorder()
    save(rec, tmp_path)
    assert states(rec.log, tmp_path, "saved", initial=initial) == [{"final": DATA}]
    left = states(rec.log, tmp_path, initial=initial)
    assert {state["final"] for state in left} == {b"old", DATA}
    assert left[0] == initial


def test_a_directory_takes_its_files_along_but_not_their_names_unless_it_is_synced(tmp_path):
    rec = Recorder()
    rec.makedirs(tmp_path / "outer" / "new")
    write_file(rec, tmp_path / "outer" / "new" / "file")
    sync_folder(rec, tmp_path / "outer" / "new")
    rec.rename(tmp_path / "outer" / "new", tmp_path / "final")
    sync_folder(rec, tmp_path)
    rec.mark("saved")
    whole = {"outer": None, "final": None, "final/file": DATA}
    assert states(rec.log, tmp_path, "saved") == [whole]
    log = without(rec.log, lambda op: op.path.endswith("outer/new"))
    left = states(log, tmp_path, "saved")
    assert len(left) == 2
    assert {"outer": None, "final": None} in left
    assert replay(rec.log, tmp_path) == read_tree(tmp_path) == whole


def test_what_was_not_removed_for_certain_may_be_back(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_bytes(DATA)
    initial = read_tree(tmp_path)
    rec = Recorder()
    rec.unlink(tmp_path / "old" / "file")
    rec.rmdir(tmp_path / "old")
    rec.mark("removed")
    left = states(rec.log, tmp_path, "removed", initial=initial)
    assert sorted(map(sorted, left)) == [[], ["old"], ["old", "old/file"]]
    sync_folder(rec, tmp_path)
    rec.mark("for good")
    assert states(rec.log, tmp_path, "for good", initial=initial) == [{}]


def test_an_overwritten_file_keeps_what_was_synced_and_loses_pieces_of_the_rest(tmp_path):
    (tmp_path / "file").write_bytes(b"a" * 6)
    initial = read_tree(tmp_path)
    rec = Recorder()
    fd = rec.open(tmp_path / "file", os.O_RDWR)
    rec.pwrite(fd, b"BB", 0)
    rec.fdatasync(fd)
    rec.posix_fallocate(fd, 0, 8)
    rec.pwritev(fd, [b"C", b"C"], 2)
    rec.pwrite(fd, b"DD", 4)
    rec.pwrite(fd, b"EE", 6)
    rec.mark("written")
    rec.close(fd)
    left = {state["file"] for state in states(rec.log, tmp_path, "written", initial=initial)}
    assert all(content.startswith(b"BB") for content in left)
    assert {b"BBaaaa", b"BBaaaa\0\0", b"BBCCaaEE", b"BBaaDD", b"BBCCDDEE"} <= left
    assert replay(rec.log, tmp_path, initial) == read_tree(tmp_path)


def test_writes_may_be_lost_in_many_ways(tmp_path):
    rec = Recorder()
    fd = rec.open(tmp_path / "file", CREATE)
    for data in (b"a", b"bc", b"d"):
        rec.write(fd, data)
    rec.mark("written")
    rec.close(fd)
    left = {state.get("file") for state in states(rec.log, tmp_path, "written")}
    without_one = {b"\0bcd", b"a\0\0d", b"abc", b"abc\0"}
    alone = {b"a", b"\0bc", b"\0\0\0d"}
    torn = {b"ab", b"ab\0d", b"a\0cd"}
    assert left == {None, b"", b"\0\0\0\0", b"abcd"} | without_one | alone | torn


def test_an_fsync_covers_what_ended_before_it_began():
    early = changing("write", 20, 30, data=b"a")
    late = changing("write", 25, 41, at=1, data=b"b")
    logs = [
        [changing("create", 0, 1), early, changing("fsync", 40, 50)],
        [late, changing("fsync", 2, 3, file=(1, 0), path="/r")],
    ]
    log = merge(pickle.loads(pickle.dumps(logs)))
    assert [op.start for op in log] == [0, 2, 20, 25, 40]
    log.append(Operation("mark", 49, 49, "too early"))
    log.append(Operation("mark", 50, 50, "synced"))
    assert {"f": b""} in states(log, "/r", "too early")
    left = [state["f"] for state in states(log, "/r", "synced")]
    assert sorted(left) == [b"a", b"a\0", b"ab"]


def test_a_write_during_an_fsync_is_not_covered(tmp_path):
    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, fd):
            thread = threading.Thread(target=rec.pwrite, args=(fd, b"b", 0))
            thread.start()
            thread.join()
            os.fsync(fd)

    rec = Recorder(Os())
    fd = rec.open(tmp_path / "file", CREATE)
    rec.fsync(fd)
    rec.mark("synced")
    rec.close(fd)
    assert {"file": b""} in states(rec.log, tmp_path, "synced")


def test_processes_share_a_file(tmp_path):
    ranks = Recorder(), Recorder()
    fds = [rec.open(tmp_path / "file", os.O_CREAT | os.O_RDWR) for rec in ranks]
    for rec, fd, offset in zip(ranks, fds, (0, 4), strict=True):
        rec.pwrite(fd, b"data", offset)
    ranks[0].fsync(fds[0])
    ranks[0].mark("synced")
    for rec, fd in zip(ranks, fds, strict=True):
        rec.close(fd)
    log = merge(rec.log for rec in ranks)
    assert states(log, tmp_path, "synced") == [{}, {"file": b"datadata"}]


def test_what_had_begun_may_have_happened():
    log = [
        changing("mkdir", 0, 9, file=(1, 2), path="/r/a"),
        changing("create", 2, 9),
        changing("write", 4, 9, data=b"xy"),
        *(Operation("mark", now, now, f"at {now}") for now in (1, 3, 5)),
    ]
    assert {"a": None} in states(log, "/r", "at 1")
    assert {"a": None, "f": b""} in states(log, "/r", "at 3")
    assert {"a": None, "f": b"x"} in states(log, "/r", "at 5")


def test_an_fdatasync_does_nothing_for_names(tmp_path):
    rec = Recorder()
    write_file(rec, tmp_path / "file")
    fd = rec.open(tmp_path, os.O_RDONLY)
    rec.fdatasync(fd)
    rec.close(fd)
    rec.mark("end")
    assert {} in states(rec.log, tmp_path, "end")


def test_names_of_one_directory_are_independent(tmp_path):
    rec = Recorder()
    for name in "ab":
        write_file(rec, tmp_path / name)
    rec.mark("end")
    left = states(rec.log, tmp_path, "end")
    assert sorted(map(sorted, left)) == [[], ["a"], ["a", "b"], ["b"]]


def test_a_number_of_an_inode_that_is_given_again_is_another_file():
    log = [
        changing("create", 0, 1),
        changing("write", 2, 3, data=b"old"),
        changing("unlink", 4, 5, file=None),
        changing("create", 6, 7),
        changing("create", 8, 9),  # opened again: still the second
        changing("write", 10, 11, data=b"new"),
    ]
    assert replay(log, "/r") == {"f": b"new"}


def test_nothing_may_cross_the_border_of_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    rec = Recorder()
    write_file(rec, tmp_path / "outside")
    assert replay(rec.log, root) == {}
    rec.rename(tmp_path / "outside", root / "inside")
    with pytest.raises(ValueError, match="into the root"):
        replay(rec.log, root)
    rec.log.clear()
    rec.rename(root / "inside", tmp_path / "outside")
    with pytest.raises(ValueError, match="out of the root"):
        replay(rec.log, root, {"inside": DATA})


def test_the_log_must_begin_with_what_was_there(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    rec = Recorder()
    rec.unlink(tmp_path / "file")
    with pytest.raises(ValueError, match="how file came about"):
        replay(rec.log, tmp_path)


def test_many_combinations_are_sampled_alike_each_time(tmp_path):
    rec = Recorder()
    for i in range(12):
        write_file(rec, tmp_path / str(i), sync=False)
    rec.mark("end")
    left = states(rec.log, tmp_path, "end", limit=200)
    assert left == states(rec.log, tmp_path, "end", limit=200)
    assert left != states(rec.log, tmp_path, "end", limit=200, rng=random.Random(1))
    assert {} in left
    assert read_tree(tmp_path) in left
    assert {len(state) for state in left} == set(range(13))
    distinct = {frozenset(state.items()) for state in left}
    assert len(distinct) == len(left) <= 200
    assert {} in (few := states(rec.log, tmp_path, "end", limit=0))
    assert {"3": b""} in few
    assert read_tree(tmp_path) in few
    assert {name: DATA for name in read_tree(tmp_path) if name != "3"} in few
    assert len(few) < 150


def test_a_state_can_be_put_on_the_disk(tmp_path):
    folder = tmp_path / "root"
    for state in ({"a": None, "a/b": b"1"}, {"c": b""}, {}):
        materialise(state, folder)
        assert read_tree(folder) == state


NAMES = st.sampled_from(["a", "b", "c", "a/a", "a/b", "b/a", "a/a/a"])
STEPS = st.one_of(
    st.tuples(st.sampled_from(["mkdir", "rmdir", "unlink", "file", "folder", "makedirs"]), NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.sampled_from(["pwrite", "ftruncate"]), NAMES, st.integers(0, 9)),
)


def take(rec, root, kind, name, *args):
    """One call; many fail, which is part of the game."""
    path = root / name
    if kind == "file":
        write_file(rec, path, b"xyz", sync=len(name) == 1)
    elif kind == "folder":
        sync_folder(rec, path)
    elif kind == "rename":
        rec.rename(path, root / args[0])
    elif kind in ("pwrite", "ftruncate"):
        fd = rec.open(path, os.O_RDWR)
        with suppress(OSError):
            rec.pwrite(fd, b"data", *args) if kind == "pwrite" else rec.ftruncate(fd, *args)
        rec.close(fd)
    else:
        getattr(rec, kind)(path)


@given(st.lists(STEPS, max_size=12), st.lists(STEPS, max_size=12))
def test_what_nothing_is_lost_of_is_on_the_disk(before, steps):
    with tempfile.TemporaryDirectory() as folder:
        root, rec = Path(folder), Recorder()
        for step in before:
            with suppress(OSError):
                take(Recorder(), root, *step)
        initial = read_tree(root)
        for step in steps:
            with suppress(OSError):
                take(rec, root, *step)
        rec.mark("steps")
        end = read_tree(root)
        assert replay(rec.log, root, initial) == end
        assert end in states(rec.log, root, "steps", initial=initial, limit=9)
        for path in [root, *root.rglob("*")]:
            sync_folder(rec, path)
        rec.mark("synced")
        crashes = list(crash_states(rec.log, root, initial=initial, limit=9))
        assert crashes[0].state == initial
        assert [crash.state for crash in crashes if "synced" in crash.marks] == [end]
