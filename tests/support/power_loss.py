"""What a power loss may leave of the files that a piece of code was writing.

A ``Recorder`` stands in for the module ``os`` of the code under test: the calls really happen, and
a log is kept of them. From the log ``crash_states`` tells what the disk may hold if the power goes
at any moment, on a file system that promises no more than ext4 and xfs do:

- Data last once an fsync or fdatasync of the file has ended that began after the write had ended.
  Until then each write may be there, be missing, or show as zeros; one of them may be torn in two.
- The name that a create, mkdir, rename, unlink or rmdir gave or took lasts once an fsync of its
  directory has ended that began after it; a rename's is that of the new name. Until then each may
  have happened or not, whatever became of the others. An fsync of a file does nothing for its name.
- A rename is atomic, also from one directory to another, also over a file that was there.

Both stamps of an operation err on the side of loss: it may have happened from its start on, and
had not for certain until its end.

``replay(log, root, initial) == read_tree(root)`` shows that nothing went past the recorder.
"""

import enum
import itertools
import math
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.recorder import Operation, Recorder, fsyncs, merge, without

__all__ = [
    "Crash",
    "Operation",
    "Recorder",
    "State",
    "crash_states",
    "fsyncs",
    "materialise",
    "merge",
    "read_tree",
    "replay",
    "without",
]

State = dict[str, bytes | None]
"""Path below the root -> content, or None for a directory."""


class Crash(NamedTuple):
    """What a power loss may leave.

    ``marks`` had been reached for certain; ``after`` is the last operation that began, or that
    ended as an fsync, before the loss, for messages.
    """

    state: State
    marks: tuple[str, ...]
    after: Operation | None


def crash_states(
    log: Iterable[Operation],
    root: Any,
    *,
    initial: Mapping[str, bytes | None] | None = None,
    limit: int = 64,
    rng: random.Random | None = None,
) -> Iterator[Crash]:
    """What a power loss at any moment may leave below the root, each state and marks once.

    Args:
        log: What happened, in any order.
        root: A directory that was there before and stays.
        initial: What lasts below it from before the log began, as ``read_tree`` tells it; nothing
            by default.
        limit: All combinations of what may be lost at one moment are tried if they are no more
            than this. Otherwise those in which all, nothing, all but one or one alone is lost,
            and others by chance until they are this many.
        rng: Makes the choice by chance.
    """
    history = History(log, root, initial or {})
    rng = rng or random.Random(0)
    seen = set()
    for moment, after in history.moments():
        marks = tuple(op.path for op in history.marks if op.start <= moment)
        for state in history.states(moment, limit, rng):
            key = (frozenset(state.items()), marks)
            if key not in seen:
                seen.add(key)
                yield Crash(state, marks, after)


def replay(
    log: Iterable[Operation], root: Any, initial: Mapping[str, bytes | None] | None = None
) -> State:
    """What is below the root at the end of the log if nothing is lost."""
    history = History(log, root, initial or {})
    # At the end of time everything has lasted.
    (state,) = history.states(math.inf, 1, random.Random(0))
    return state


ROOT = 0  # the root's node


class Tree:
    """The names in each directory. A node has one name at most, so no rename makes a circle."""

    def __init__(self) -> None:
        self.entries: dict[int, dict[str, int]] = {ROOT: {}}  # a key for each directory
        self.homes: dict[int, tuple[int, str]] = {}

    def copy(self) -> "Tree":
        twin = Tree()
        twin.entries = {node: dict(names) for node, names in self.entries.items()}
        twin.homes = dict(self.homes)
        return twin

    def put(self, parent: int, name: str, node: int | None) -> None:
        """Give the name to the node, which loses its old one; or to nothing."""
        displaced = self.entries[parent].pop(name, None)
        self.homes.pop(displaced, None)
        if node is not None:
            old_parent, old_name = self.homes.pop(node, (parent, name))
            self.entries[old_parent].pop(old_name, None)
            self.entries[parent][name] = node
            self.homes[node] = (parent, name)

    def find(self, parts: Sequence[str]) -> int | None:
        node: int | None = ROOT
        for part in parts:
            node = self.entries.get(node, {}).get(part)
        return node

    def walk(self, folder: int = ROOT, prefix: str = "") -> Iterator[tuple[str, int]]:
        for name, node in self.entries[folder].items():
            yield prefix + name, node
            if node in self.entries:
                yield from self.walk(node, f"{prefix}{name}/")


@dataclass(eq=False, slots=True)
class Effect:
    """What an operation does to one name, or to the content of one file.

    It may have happened from the operation's start, and has for certain from ``lasts``.
    """

    op: Operation
    keeper: int  # whose fsync makes it last: the directory of the name, or the file
    name: str = ""
    node: int | None = None  # that gets the name; nothing does if None
    lasts: float = math.inf


class History:
    """Sorts out which nodes the operations of a log are about, and until when they are in doubt."""

    def __init__(
        self, log: Iterable[Operation], root: Any, initial: Mapping[str, bytes | None]
    ) -> None:
        self.marks: list[Operation] = []
        self._root = os.path.realpath(root)
        self._tree = Tree()  # as it is in the middle of the log, nothing lost
        self._old: dict[int, bytes] = {}  # content at first
        self._edits: list[Effect] = []  # of names
        self._changes: defaultdict[int, list[Effect]] = defaultdict(list)  # of content
        self._syncs: defaultdict[int, list[Operation]] = defaultdict(list)
        self._nodes: dict[tuple[int, int] | None, int] = {}
        self._numbers = itertools.count(ROOT + 1)
        self._contents: dict[tuple[int, ...], tuple[bytes, ...]] = {}
        for path, content in initial.items():
            self._add_initial(path.split("/"), content)
        self._start = self._tree.copy()
        for op in merge([log]):
            self._take(op)
        for folder in self._tree.entries:
            self._start.entries.setdefault(folder, {})
        for effect in itertools.chain(self._edits, *self._changes.values()):
            syncs = self._syncs[effect.keeper]
            effect.lasts = min((s.end for s in syncs if s.start >= effect.op.end), default=math.inf)

    def moments(self) -> Iterator[tuple[float, Operation | None]]:
        """When what may be left changes: before all, as an operation begins, as an fsync ends."""
        yield -math.inf, None
        begun = [effect.op for effect in itertools.chain(self._edits, *self._changes.values())]
        ended = itertools.chain.from_iterable(self._syncs.values())
        moments = [*((op.start, op) for op in begun + self.marks), *((op.end, op) for op in ended)]
        yield from sorted(moments, key=lambda moment: moment[0])

    def states(self, now: float, limit: int, rng: random.Random) -> Iterator[State]:
        """What a power loss now may leave."""
        edits = [edit for edit in self._edits if edit.op.start <= now]
        settled = list(itertools.takewhile(lambda edit: edit.lasts <= now, edits))
        later = edits[len(settled) :]
        base = self._start.copy()
        for edit in settled:
            base.put(edit.keeper, edit.name, edit.node)
        contents = {node: self._contents_at(node, now) for node in self._old}
        fates = [(False, True) if edit.lasts > now else (True,) for edit in later]
        for choice in _combinations([*fates, *contents.values()], limit, rng):
            tree = base.copy()
            for edit, happened in zip(later, choice, strict=False):
                if happened:
                    tree.put(edit.keeper, edit.name, edit.node)
            chosen = dict(zip(contents, choice[len(later) :], strict=True))
            yield {path: chosen.get(node) for path, node in tree.walk()}

    def _contents_at(self, node: int, now: float) -> tuple[bytes, ...]:
        """What a file may hold after a power loss now: first everything lost, last nothing."""
        begun = [change for change in self._changes[node] if change.op.start <= now]
        doubted = [change.lasts > now for change in begun]
        key = (node, *doubted)
        if key not in self._contents:
            self._contents[key] = _possible_contents(
                self._old[node], [change.op for change in begun], doubted
            )
        return self._contents[key]

    def _add_initial(self, parts: Sequence[str], content: bytes | None) -> None:
        """Put what was there before the log into the tree, and the directories above it."""
        parent = ROOT
        for depth, name in enumerate(parts, start=1):
            node = self._tree.find(parts[:depth])
            if node is None:
                is_folder = depth < len(parts) or content is None
                node = self._new(None if is_folder else content)
                self._tree.put(parent, name, node)
            parent = node

    def _new(self, content: bytes | None) -> int:
        """Make a node: a directory if there is no content."""
        node = next(self._numbers)
        if content is None:
            self._tree.entries[node] = {}
        else:
            self._old[node] = content
        return node

    def _take(self, op: Operation) -> None:
        """Note what the operation does, unless it is about something outside the root."""
        if op.kind == "mark":
            self.marks.append(op)
        elif (parts := self._inside(op.path)) is None:
            if self._inside(op.target) is not None:
                raise ValueError(f"nothing may be moved into the root from elsewhere; got {op}")
        elif op.kind in ("create", "mkdir"):
            self._take_new(op, parts)
        elif op.kind in ("unlink", "rmdir"):
            self._known(op, parts)
            self._edit(op, parts, None)
        elif op.kind == "rename":
            self._edit(op, self._inside(op.target), self._known(op, parts))
        elif op.kind == "fsync" or (op.kind == "fdatasync" and self._node(op, parts) in self._old):
            self._syncs[self._node(op, parts)].append(op)
        elif op.kind in ("truncate", "allocate") or op.data:
            node = self._node(op, parts)
            self._changes[node].append(Effect(op, node))

    def _take_new(self, op: Operation, parts: Sequence[str]) -> None:
        """Give a name to a new node, unless this create found a file that was there.

        The number of an inode is given again once its file is gone, so what has the number and
        has lost its name is another node.
        """
        if self._nodes.get(op.file) in self._tree.homes:
            return
        node = self._tree.find(parts)
        if node is None:
            node = self._new(None if op.kind == "mkdir" else b"")
            self._edit(op, parts, node)
        self._nodes[op.file] = node

    def _edit(self, op: Operation, parts: Sequence[str] | None, node: int | None) -> None:
        """Give a name to a node or to nothing."""
        if not parts:
            raise ValueError(f"nothing may be moved out of the root, nor the root itself; got {op}")
        parent = self._known(op, parts[:-1])
        self._edits.append(Effect(op, parent, parts[-1], node))
        self._tree.put(parent, parts[-1], node)

    def _node(self, op: Operation, parts: Sequence[str]) -> int:
        """The node of an open file: what has its number, else what has its path."""
        if op.file not in self._nodes:
            self._nodes[op.file] = self._known(op, parts)
        return self._nodes[op.file]

    def _known(self, op: Operation, parts: Sequence[str]) -> int:
        node = self._tree.find(parts)
        if node is None:
            raise ValueError(f"the log must tell how {'/'.join(parts)} came about; got {op} first")
        return node

    def _inside(self, path: str) -> tuple[str, ...] | None:
        """The parts of the path below the root; None if it leads elsewhere."""
        if path == self._root:
            return ()
        folder = self._root.rstrip("/") + "/"
        return tuple(path[len(folder) :].split("/")) if path.startswith(folder) else None


def _combinations(
    choices: Sequence[Sequence[Any]], limit: int, rng: random.Random
) -> Iterable[Sequence[Any]]:
    """Ways to take one of each; the first of its options is all lost, the last nothing lost."""
    if math.prod(len(options) for options in choices) <= limit:
        return itertools.product(*choices)
    absent = [options[0] for options in choices]
    present = [options[-1] for options in choices]
    ways = [absent, present]
    for index, options in enumerate(choices):
        ways += [[*present[:index], option, *present[index + 1 :]] for option in options[:-1]]
        ways.append([*absent[:index], options[-1], *absent[index + 1 :]])
    for _ in range(limit - len(ways)):
        share = rng.random()  # of what is there; deep trees need much of it, bare ones little
        ways.append([o[-1] if rng.random() < share else rng.choice(o[:-1] or o) for o in choices])
    return ways


class Fate(enum.Enum):
    """Shares of a write: from where and to where its data are there, and how far the file grew."""

    LOST = (0, 0, 0)
    CUT = (0, 0.5, 0.5)
    SIZED = (0, 0, 1)
    TORN = (0, 0.5, 1)
    HOLED = (0.5, 1, 1)
    DONE = (0, 1, 1)


def _possible_contents(
    old: bytes, ops: Sequence[Operation], doubted: Sequence[bool]
) -> tuple[bytes, ...]:
    """What a file may hold: first if all that is in doubt is lost, last if nothing is.

    In between: the size without the data; each write missing, with and without its size; each
    write alone; and the largest of them torn, which may have been the last one, too.
    """
    sizes = [len(op.data) for op, doubt in zip(ops, doubted, strict=True) if doubt]
    count = len(sizes)
    if not count:
        return (_apply(old, ops, [Fate.DONE] * len(ops)),)

    def alone(index: int, other: Fate, usual: Fate) -> list[Fate]:
        return [usual] * index + [other] + [usual] * (count - index - 1)

    large = sizes.index(max(sizes))
    fates = [
        [Fate.LOST] * count,
        [Fate.SIZED] * count,
        [Fate.DONE] * large + [Fate.CUT] + [Fate.LOST] * (count - large - 1),
        alone(large, Fate.TORN, Fate.DONE),
        alone(large, Fate.HOLED, Fate.DONE),
        *(alone(index, Fate.LOST, Fate.DONE) for index in range(count)),
        *(alone(index, Fate.SIZED, Fate.DONE) for index in range(count)),
        *(alone(index, Fate.DONE, Fate.LOST) for index in range(count)),
        [Fate.DONE] * count,
    ]
    contents = []
    for doubtful in map(iter, fates):
        all_fates = [next(doubtful) if doubt else Fate.DONE for doubt in doubted]
        contents.append(_apply(old, ops, all_fates))
    lost, *between, done = contents
    # A set, but in the same order each time.
    distinct = [content for content in dict.fromkeys(between) if content not in (lost, done)]
    return (lost, *distinct, done)


def _apply(old: bytes, ops: Sequence[Operation], fates: Sequence[Fate]) -> bytes:
    """The content of a file after what has become of the writes to it."""
    content = bytearray(old)
    for op, fate in zip(ops, fates, strict=True):
        if fate is Fate.LOST:
            continue
        if op.kind == "truncate":
            del content[op.at :]
        first, last, reach = (int(share * len(op.data)) for share in fate.value)
        content.extend(bytes(max(0, op.at + reach - len(content))))
        content[op.at + first : op.at + last] = op.data[first:last]
    return bytes(content)


def read_tree(root: Any) -> State:
    """What is really on the disk below the root."""
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in Path(root).rglob("*")
    }


def materialise(state: Mapping[str, bytes | None], folder: Any) -> None:
    """Make the state everything that the folder holds."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    for name, content in state.items():
        path = Path(folder, name)
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
