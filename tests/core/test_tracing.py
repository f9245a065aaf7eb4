"""Traces of real steps and saves, on some ranks or all, on one node and on several."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from shardopt.checkpoint import Checkpointer
from shardopt.checkpoint.format.names import file_name
from shardopt.cli.trace.merge import merge
from shardopt.cli.trace.reading import choose_run
from shardopt.errors import TraceError
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy
from shardopt.trace import OFF
from tests.support.errors import assert_steps, make_optimizer, refused
from tests.support.models import UP_TO_THREE_RANKS
from tests.support.traces import assert_nested, read, spans

pytestmark = [pytest.mark.mpi, UP_TO_THREE_RANKS]

STEPS = 3
BUCKET_NBYTES = 4 * 4096 * 4


@pytest.fixture
def folder(comm, tmp_path):
    """A folder of all ranks, outside the environment's reach."""
    return Path(comm.bcast(str(tmp_path)))


def build(comm, trace, *, share_node=True, sizes=(50_000, 9_000), **settings):
    params = [Parameter(np.ones(size, np.float32), f"p{size}") for size in sizes]
    policy = ShardPolicy(
        trace=trace, share_node=share_node, bucket_nbytes=BUCKET_NBYTES, timeout_s=30
    )
    return params, NAdam(params, comm=comm, policy=policy, **settings)


def take_steps(params, opt, number=STEPS):
    for _ in range(number):
        opt.zero_grad()
        for param in params:
            param.grad[...] = 0.5
        opt.step()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("share_node", [True, False])
def test_every_bucket_of_every_step_is_shown(comm, folder, share_node, max_grad_norm):
    params, opt = build(comm, folder, share_node=share_node, max_grad_norm=max_grad_norm)
    with opt:
        take_steps(params, opt)
        buffers = opt.core.parts.memory.buffers
        owned = [shard.numel * 4 for each in buffers for shard in each.shards if shard]
        num_buckets, sends = len(opt.partition.buckets), opt.core.topology.num_nodes > 1
    events = read(folder, comm.rank)
    assert_nested(events)
    steps = spans(events, "step")
    assert [step["args"]["step"] for step in steps] == list(range(1, STEPS + 1))
    for step in steps:
        start, end = step["ts"], step["ts"] + step["dur"]
        inside = [s for s in spans(events) if start <= s["ts"] < end and s is not step]
        updated = defaultdict(int)
        for span in spans(inside, "update"):
            if span["cat"] == "span":
                updated[span["args"]["bucket"]] += span["args"]["bytes"]
        assert sorted(updated.values()) == sorted(owned)
        named = Counter(s["name"] for s in inside)
        assert [named[name] for name in ("agree", "reduce", "finish")] == [1, 1, 1]
        assert named["consensus"] == 2
        assert named["wait"] >= 2
        in_place = {s["args"]["bucket"] for s in spans(inside, "reduce_scatter")}
        expected = updated.keys() if max_grad_norm and not sends else set()
        assert in_place == set(expected)
    for name in ("reduce_scatter", "all_gather"):
        begun = Counter(e["args"]["bucket"] for e in events if e["ph"] == "b" and e["name"] == name)
        assert begun == (dict.fromkeys(range(num_buckets), STEPS) if sends else {})
    assert sum(e["ph"] == "b" for e in events) == sum(e["ph"] == "e" for e in events)


def test_phases_are_those_of_the_report(comm, folder):
    params, opt = build(comm, folder)
    with opt:
        take_steps(params, opt, 1)
        seconds = opt.last_step.seconds
    found = [span for span in spans(read(folder, comm.rank)) if span["cat"] == "phase"]
    phases = {span["name"]: span["dur"] / 1e6 for span in found}
    assert phases == pytest.approx(seconds, abs=1e-9)


def test_one_rank_may_trace_alone(comm, folder):
    alone = comm.size - 1
    params, opt = build(comm, folder if comm.rank == alone else None)
    with opt:
        take_steps(params, opt)
        assert (opt.core.parts.trace is OFF) == (comm.rank != alone)
    comm.Barrier()
    assert {event["pid"] for event in read(folder)} == {alone}
    run, number, num_runs = choose_run(folder, None)
    assert (run.ranks, number, num_runs) == ([alone], 1, 1)
    assert run.alignments[0].error_ns == 0


def test_nothing_is_left_without_a_trace(comm, folder, monkeypatch):
    monkeypatch.delenv("SHARDOPT_TRACE", raising=False)
    params, opt = build(comm, None)
    with opt:
        take_steps(params, opt)
        assert opt.core.parts.trace is OFF
    assert not list(folder.iterdir())


def test_all_ranks_raise_if_one_cannot_write(comm, folder):
    (folder / "file").touch()
    comm.Barrier()
    wrong = folder / "file" / "x"
    bad = comm.size - 1
    told = "policy.trace must be a folder in which files can be made and written; got ", str(wrong)
    with refused(comm, TraceError, *told, alone=True):
        make_optimizer(comm, policy=ShardPolicy(trace=wrong if comm.rank == bad else folder))
    with make_optimizer(comm) as opt:
        assert_steps(opt)


def test_two_optimizers_share_the_rows_of_their_process(comm, folder):
    first, opt = build(comm, folder)
    second, other = build(comm, folder, sizes=(20_000,))
    with opt, other:
        for _ in range(STEPS):
            take_steps(first, opt, 1)
            take_steps(second, other, 1)
    comm.Barrier()
    if comm.rank == 0:
        run, _, num_runs = choose_run(folder, None)
        assert num_runs == 1
        assert len(run.files) == 2 * comm.size
        assert len({file.optimizer["key"] for file in run.files}) == 2
        out = folder / "merged.json"
        merge(run, out)
        events = json.loads(out.read_text(encoding="utf-8"))
        assert_nested(events)
        rows = {(s["pid"], s["tid"]) for s in spans(events, "step")}
        assert len(rows) == comm.size
        assert len(spans(events, "step")) == 2 * STEPS * comm.size


def test_a_save_is_shown_on_its_threads(comm, folder):
    params, opt = build(comm, folder / "trace")
    with opt, Checkpointer(folder / "checkpoints") as checkpointer:
        take_steps(params, opt)
        checkpointer.save(STEPS, opt)
    events = read(folder / "trace", comm.rank)
    titles = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = {s["name"]: titles[s["tid"]] for s in spans(events)}
    assert rows["save"] == "calling thread"
    assert rows["write_file"] == "checkpoint thread"
    assert {rows["hash"], rows["write"]} <= {"checkpoint writer", "checkpoint thread"}
    assert ("commit" in rows) == (comm.rank == 0)
    hashed = sum(s["args"]["stop"] - s["args"]["start"] for s in spans(events, "hash"))
    (file,) = (folder / "checkpoints").glob(f"step-*/{file_name(comm.rank, comm.size)}")
    assert hashed == file.stat().st_size
    assert_nested(events)
