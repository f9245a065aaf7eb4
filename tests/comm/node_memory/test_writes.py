"""Views of node memory show it again after each round, whichever way finds the written pages."""

import ctypes
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from shardopt.comm.node_memory import writes
from shardopt.comm.node_memory.linux import PAGE_NBYTES, Mapping, drop_pages, make_memfd, map_file
from shardopt.comm.node_memory.private_view import PrivateView
from shardopt.comm.node_memory.writes import VARIABLE, WriteTracking, write_tracking
from shardopt.errors import HyperparamsError

WAYS = ["userfaultfd", "pagemap", "compare"]
NUM_PAGES = 64


@pytest.fixture
def way() -> str:
    """The way that ``tracking`` finds written pages; tests with another list override it."""
    return ""


@pytest.fixture
def tracking(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteTracking]:
    if reason := writes._OBSTACLES[way]():
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, way)
    writes._tracking_of.cache_clear()
    yield write_tracking()
    writes._tracking_of.cache_clear()


every_way = pytest.mark.parametrize("way", WAYS)
ways_that_see = pytest.mark.parametrize("way", WAYS[:2])


@dataclass
class Scene:
    """A shared mapping, a private one of the same file, and the view made of them."""

    shared_mapping: Mapping
    view_mapping: Mapping
    private: PrivateView

    @property
    def shared(self) -> np.ndarray:
        return self.shared_mapping.array.reshape(-1, PAGE_NBYTES)

    @property
    def view(self) -> np.ndarray:
        return self.view_mapping.array.reshape(-1, PAGE_NBYTES)

    def find(self) -> set[int]:
        spans = self.private.find_writes()
        assert all(a.stop < b.start for a, b in itertools.pairwise(spans))
        bounds = [(span.start / PAGE_NBYTES, span.stop / PAGE_NBYTES) for span in spans]
        assert all(
            start < stop and start.is_integer() and stop.is_integer() for start, stop in bounds
        )
        return {page for start, stop in bounds for page in range(int(start), int(stop))}

    def round(self, *pages: int) -> set[int]:
        """Write to pages, find them, change the shared memory, refresh."""
        for page in pages:
            self.view[page, 5] += 1
        found = self.find()
        self.shared[:] += 1
        self.private.refresh()
        assert (self.view == self.shared).all()
        return found


MakeScene = Callable[..., Scene]


@pytest.fixture
def make_scene(tracking: WriteTracking) -> MakeScene:
    def make(num_pages: int = NUM_PAGES, budget: Callable[[], int] = lambda: 1 << 40) -> Scene:
        fd = make_memfd("test")
        os.ftruncate(fd, num_pages * PAGE_NBYTES)
        mappings = [
            map_file(fd, 0, num_pages * PAGE_NBYTES, private=private) for private in (False, True)
        ]
        os.close(fd)
        arrays = [mapping.array for mapping in mappings]
        return Scene(*mappings, PrivateView(*arrays, tracking, budget))

    return make


def found_by(tracking: WriteTracking, pages: set[int], num_pages: int = NUM_PAGES) -> set[int]:
    """What must be found where ``pages`` have been written."""
    return pages if tracking.sees_writes else set(range(num_pages))


@every_way
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0, 5 * PAGE_NBYTES, 1 << 40])
def test_random_writes_are_found_and_gone_after_refresh(make_scene, tracking, seed, budget):
    rng = np.random.default_rng(seed)
    scene = make_scene(budget=lambda: budget)
    popular = rng.integers(0, NUM_PAGES, 6)
    for _ in range(40):
        touched: set[int] = set()
        for _ in range(rng.integers(0, 4)):
            start = int(rng.integers(0, scene.view.size))
            stop = min(start + int(rng.integers(1, 3 * PAGE_NBYTES)), scene.view.size)
            scene.view_mapping.array[start:stop] ^= 255
            touched |= set(range(start // PAGE_NBYTES, -(-stop // PAGE_NBYTES)))
        if rng.random() < 0.7:
            scene.view[popular, rng.integers(0, PAGE_NBYTES)] += 1
            touched |= set(popular.tolist())
        if rng.random() < 0.3:
            scene.view[[0, -1], [0, -1]] += 1  # the first byte and the last
            touched |= {0, NUM_PAGES - 1}
        written = set(np.flatnonzero((scene.view != scene.shared).any(axis=1)).tolist())
        found = scene.find()
        assert written <= found <= found_by(tracking, touched)
        if rng.random() < 0.3:  # found again, if nothing refreshes them
            assert scene.find() >= written
        scene.shared[rng.integers(0, NUM_PAGES, 20)] += 1
        scene.private.refresh()
        assert (scene.view == scene.shared).all()
        assert scene.private.kept_nbytes <= budget


@every_way
def test_untouched_pages_show_what_others_write_at_once(make_scene):
    scene = make_scene()
    scene.view[3] = 1
    scene.shared[:] = 2
    assert (scene.view[3] == 1).all()
    assert (np.delete(scene.view, 3, axis=0) == 2).all()


@every_way
def test_nothing_is_found_where_nothing_was_written(make_scene, tracking):
    scene = make_scene()
    assert scene.view.sum() == 0  # reading is no writing
    assert scene.find() == found_by(tracking, set())
    scene.shared[:] = 1
    scene.private.refresh()
    assert scene.find() == found_by(tracking, set())


@pytest.mark.parametrize("way", WAYS[:1])
def test_runs_of_two_scans_that_touch_are_one(tracking, monkeypatch):
    parts = [np.array(runs) * PAGE_NBYTES for runs in ([[8, 9], [10, 12]], [[12, 13], [20, 21]])]
    monkeypatch.setattr(tracking._scan, "take", lambda *_: parts)
    runs = tracking.written(8 * PAGE_NBYTES, 16 * PAGE_NBYTES) // PAGE_NBYTES
    assert runs.tolist() == [[0, 1], [2, 5], [12, 13]]


@every_way
def test_what_the_kernel_writes_is_found(make_scene, tracking, tmp_path):
    scene = make_scene()
    (tmp_path / "file").write_bytes(b"\x01" * PAGE_NBYTES)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        assert file.readinto(scene.view[7].data) == PAGE_NBYTES
    assert (scene.view[7] == 1).all()
    assert scene.round() == found_by(tracking, {7})


@every_way
def test_pages_stay_pending_until_a_refresh(make_scene, tracking):
    scene = make_scene()
    scene.view[3] = 1
    assert scene.find() == found_by(tracking, {3})
    scene.view[9] = 1
    assert scene.find() == found_by(tracking, {3, 9})
    assert scene.find() == found_by(tracking, {3, 9})
    scene.private.refresh()
    assert scene.find() == found_by(tracking, set())


@every_way
def test_a_write_after_a_page_was_dropped_is_found(make_scene, tracking):
    scene = make_scene(budget=lambda: 0)
    for _ in range(4):
        assert scene.round(0, 8, NUM_PAGES - 1) == found_by(tracking, {0, 8, NUM_PAGES - 1})
        assert scene.find() == found_by(tracking, set())


@ways_that_see
def test_what_is_written_between_is_lost_in_found_pages_and_found_later_in_others(make_scene):
    scene = make_scene()
    scene.view[3] = 1
    assert scene.find() == {3}
    scene.view[3] = 2  # documented: lost
    scene.view[9] = 2
    scene.private.refresh()
    assert (scene.view[3] == 0).all()
    assert (scene.view[9] == 2).all()
    assert scene.find() - {3} == {9}
    scene.private.refresh()
    assert (scene.view == scene.shared).all()


@ways_that_see
def test_pages_written_in_two_rounds_in_a_row_are_kept(make_scene):
    scene = make_scene()
    scene.round(3, 4)
    assert scene.private.kept_nbytes == 0
    scene.round(4, 5)
    assert scene.private.kept_nbytes == PAGE_NBYTES
    scene.round(3)  # not in a row
    assert scene.private.kept_nbytes == PAGE_NBYTES
    assert scene.round(4) == {4}
    assert scene.round() == set()


@ways_that_see
def test_writing_a_kept_page_costs_no_fault(make_scene):
    def num_faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    scene = make_scene(num_pages=2048)

    def faults_of_a_round() -> int:
        before = num_faults()
        scene.view[:, 0] += 1
        scene.private.find_writes()
        scene.private.refresh()
        return num_faults() - before

    assert faults_of_a_round() >= 2048
    assert faults_of_a_round() >= 2048
    assert min(faults_of_a_round() for _ in range(3)) < 100  # those of Python's own memory
    assert scene.private.kept_nbytes == scene.view.size


@ways_that_see
def test_kept_pages_are_given_back_after_eight_equal_rounds_and_tracked_again(make_scene):
    scene = make_scene()
    scene.round(3, 4, 9)
    scene.round(3, 4, 9)
    assert scene.private.kept_nbytes == 3 * PAGE_NBYTES
    for _ in range(7):
        assert scene.round(9) == {9}
    assert scene.private.kept_nbytes == 3 * PAGE_NBYTES
    assert scene.round(4, 9) == {4, 9}  # begins anew for page 4
    assert scene.private.kept_nbytes == 2 * PAGE_NBYTES
    scene.shared[3] += 1
    assert (scene.view[3] == scene.shared[3]).all()  # it is shared again
    assert scene.round(3) == {3}
    assert scene.round(9) == {9}
    for _ in range(7):
        assert scene.round() == set()
    assert scene.private.kept_nbytes == PAGE_NBYTES  # page 9
    scene.round()
    assert scene.private.kept_nbytes == 0
    assert scene.round(2, 3, 4, 9) == {2, 3, 4, 9}


@ways_that_see
def test_a_page_given_back_is_protected_before_it_is_dropped(make_scene, tracking, monkeypatch):
    scene, calls = make_scene(), []
    protect = tracking.protect
    monkeypatch.setattr(tracking, "protect", lambda *run: (calls.append("protect"), protect(*run)))
    monkeypatch.setattr(
        "shardopt.comm.node_memory.private_view.drop_pages",
        lambda *run: (calls.append("drop"), drop_pages(*run))[1],
    )
    scene.round(3)
    scene.round(3)
    assert calls == ["drop"]
    for _ in range(8):
        scene.round()
    assert calls == ["drop", "protect", "drop"]


@ways_that_see
def test_the_budget_bounds_what_is_kept_and_is_asked_when_it_matters(make_scene):
    asked = []
    scene = make_scene(budget=lambda: asked.append(0) or 3 * PAGE_NBYTES + 1)
    scene.round(*range(5))
    assert not asked
    for _ in range(4):
        assert scene.round(*range(5)) == set(range(5))
        assert scene.private.kept_nbytes == 3 * PAGE_NBYTES
    assert asked
    assert make_scene(budget=lambda: -1).round(1) == {1}


@every_way
def test_more_runs_than_a_scan_returns_at_once(make_scene, tracking):
    num_pages = 1300 * 2
    scene = make_scene(num_pages=num_pages)
    pages = set(range(0, num_pages, 2)) | {7}
    for _ in range(4):  # kept from the second on
        assert scene.round(*pages) == found_by(tracking, pages, num_pages)


@every_way
@pytest.mark.parametrize("can_drop", [True, False])
def test_a_locked_view_is_refreshed_all_the_same(make_scene, tracking, can_drop, monkeypatch):
    if not can_drop:  # as before Linux 5.18
        monkeypatch.setattr("shardopt.comm.node_memory.linux._MADV_DONTNEED_LOCKED", 9999)
    scene = make_scene()
    locked = scene.view_mapping.address, scene.view_mapping.nbytes
    assert ctypes.CDLL(None).mlock(ctypes.c_void_p(locked[0]), ctypes.c_size_t(locked[1])) == 0
    for page in range(4):
        assert page in scene.round(page)
        scene.round()


@every_way
def test_a_child_does_nothing_and_its_parent_tracks_on(make_scene, tracking):
    scene = make_scene()
    scene.round(3)
    scene.round(3)
    scene.view[5] = 1
    scene.view[3] = 1
    pid = os.fork()
    if pid == 0:
        try:
            scene.view[11] = 1
            right = scene.private.find_writes() == []
            scene.private.refresh()
            right &= bool((scene.view[5] == 1).all() and (scene.view[11] == 1).all())
        except BaseException:
            right = False
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    scene.view[6] = 1
    assert scene.find() == found_by(tracking, {3, 5, 6})
    scene.private.refresh()
    assert (scene.view == scene.shared).all()
    assert scene.find() == found_by(tracking, set())
    assert scene.round(12) == found_by(tracking, {12})


@every_way
def test_many_views_and_ranges_used_again(make_scene, tracking):
    scenes = [make_scene(num_pages=2) for _ in range(50)]
    for scene in scenes[::2]:
        scene.view[1] = 1
    for i, scene in enumerate(scenes):
        assert scene.round() == found_by(tracking, {1} if i % 2 == 0 else set(), 2)
    mappings = scenes[0].shared_mapping.array, scenes[0].view_mapping.array
    scenes[0].private = PrivateView(*mappings, tracking, lambda: 0)  # as after a range was freed
    assert scenes[0].round(0) == found_by(tracking, {0}, 2)


@every_way
def test_the_variable_forces_a_way_for_the_process(tracking, way):
    assert tracking.name == way
    assert write_tracking() is tracking


def test_the_best_way_that_works_is_used(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for broken, name in [([], WAYS[0]), (WAYS[:1], WAYS[1]), (WAYS[:2], WAYS[2])]:
        for way in WAYS:
            reason = "It is broken." if way in broken else None
            monkeypatch.setitem(writes._OBSTACLES, way, lambda reason=reason: reason)
        writes._tracking_of.cache_clear()
        if (
            name == "compare"
            or not {"userfaultfd": writes.why_no_userfaultfd}.get(name, writes.why_no_pagemap)()
        ):
            assert write_tracking().name == name
    writes._tracking_of.cache_clear()


def test_a_way_that_does_not_exist_or_work_is_an_error(monkeypatch):
    writes._tracking_of.cache_clear()
    monkeypatch.setenv(VARIABLE, "ptrace")
    with pytest.raises(
        HyperparamsError, match="one of userfaultfd, pagemap, compare; got 'ptrace'"
    ):
        write_tracking()
    monkeypatch.setenv(VARIABLE, "pagemap")
    monkeypatch.setitem(writes._OBSTACLES, "pagemap", lambda: "It is broken.")
    with pytest.raises(HyperparamsError, match=r"got 'pagemap'. It is broken. Unset it"):
        write_tracking()
