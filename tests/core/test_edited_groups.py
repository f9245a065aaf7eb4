"""Edited param groups: on any nodes, in any dtype, with clipping, checkpoints and every call."""

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.errors import PartitionError, RankMismatchError
from tests.support.errors import POLICY
from tests.support.models import build, content, params_of, train
from tests.support.nodes import several_nodes, ways_to_share, ways_to_the_same_bits

pytestmark = pytest.mark.mpi

DTYPES = ["float32", "bfloat16", "float16", "float64"]


def new(name, *shape, dtype="float32", seed=5):
    values = np.random.default_rng(seed).standard_normal(shape)
    return Parameter(values.astype(np.dtype(dtype)), name)


def make(comm, share, params, **settings):
    policy = ShardPolicy(share_node=share, bucket_nbytes=30_000, timeout_s=30)
    return NAdam(params, lr=0.05, comm=comm, policy=policy, **settings)


def two_groups(dtype):
    params = [new(f"p{i}", n, dtype=dtype, seed=i) for i, n in enumerate([9000, 5, 4097, 300])]
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.2, "weight_decay": 0.1}]


def edit(opt, dtype):
    """One leaves a region that stays, one moves, one comes, and the order is another."""
    first, second = opt.param_groups
    left = first["params"].pop(0)
    second["params"].insert(0, first["params"].pop(1))
    first["params"].append(new("q", 5000, dtype=dtype))
    return left


def step(opt, number, rank):
    """A step with other gradients on each rank, from the name of each parameter."""
    opt.zero_grad()
    for param in params_of(opt):
        seed = [number, rank, *param.name.encode()]
        grad = np.random.default_rng(seed).standard_normal(param.data.shape)
        param.grad += grad.astype(param.data.dtype)
    opt.step()


def bits(opt):
    return [param.data.tobytes() for param in params_of(opt)]


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_goes_on_as_in_an_optimizer_of_the_new_groups(comm, dtype, max_grad_norm):
    """Masters of 16-bit parameters, moments and norms are those of what is there now."""
    results = []
    for share in ways_to_the_same_bits(comm):
        with make(comm, share, two_groups(dtype), max_grad_norm=max_grad_norm) as opt:
            for number in range(3):
                step(opt, number, comm.rank)
            left = edit(opt, dtype)
            state = comm.bcast(opt.gather_state_dict())  # the edit is taken over with it
            groups = [
                {**group, "params": [Parameter(p.data.copy(), p.name) for p in group["params"]]}
                for group in opt.param_groups
            ]
            value = left.data.copy()
            with make(comm, share, groups, max_grad_norm=max_grad_norm) as other:
                other.load_state_dict(state)
                for number in range(3, 6):
                    step(opt, number, comm.rank)
                    step(other, number, comm.rank)
                    norm = other.last_step.grad_norm
                    assert opt.last_step.grad_norm == (norm and pytest.approx(norm, rel=1e-12))
                if max_grad_norm is None:  # whose bits depend on which chunk holds what
                    assert bits(opt) == bits(other)
                    assert content(opt) == content(other)
            assert left.data.tobytes() == value.tobytes()
            results.append(bits(opt))
    assert all(result == results[0] for result in results)


def test_several_edits_in_a_row_are_the_same_everywhere(comm):
    results = []
    for share in ways_to_the_same_bits(comm):
        with make(comm, share, two_groups("float32")) as opt:
            for number in range(8):
                first, second = opt.param_groups[0]["params"], opt.param_groups[-1]["params"]
                if number in (2, 3):
                    first.append(second.pop())
                    second.insert(0, new(f"q{number}", 700 * number, dtype="float64"))
                if number == 4:
                    opt.add_param_group({"params": [new("late", 11)]})
                    opt.param_groups.insert(1, {"params": [new("early", 9)], "lr": 0.5})
                if number == 5:
                    del opt.param_groups[0]["params"][1:3]
                if number == 6:
                    opt.param_groups[0], opt.param_groups[1] = opt.param_groups[1::-1]
                step(opt, number, comm.rank)
            names = [param.name for param in params_of(opt)]
            assert names == [spec.spec.name for spec in opt.partition.params]
            results.append((names, bits(opt)))
    assert all(result == results[0] for result in results)


def test_all_parameters_may_leave_and_others_come(comm):
    for share in ways_to_share(comm):
        with make(comm, share, two_groups("float32")) as opt:
            step(opt, 0, comm.rank)
            opt.param_groups[0]["params"].clear()
            opt.param_groups.pop()
            opt.step()
            assert opt.partition.numel == 0
            assert opt.memory_report().node_nbytes == 0
            assert (content(opt) or ({}, {}))[:2] == ({}, {})
            opt.param_groups[0]["params"] += [new("q", 4000), new("r", 3)]
            for number in range(1, 3):
                step(opt, number, comm.rank)
            assert comm.allgather(bits(opt)) == [bits(opt)] * comm.size
            assert opt.last_step.num_updated == 2


CALLS = {
    "gather_state_dict": lambda opt, _: opt.gather_state_dict(),
    "load_state_dict": lambda opt, _: opt.load_state_dict(opt.state_dict()),
    "load_params": lambda opt, _: opt.load_params({p.name: p.data * 1 for p in params_of(opt)}),
    "adopt": lambda opt, _: opt.adopt(),
    "add_param_group": lambda opt, _: opt.add_param_group({"params": [new("r", 3)]}),
    "save": lambda opt, folder: save(folder / "a", opt),
    "Checkpointer.save": lambda opt, folder: Checkpointer(folder, asynchronous=False).save(1, opt),
    "Checkpointer.restore": lambda opt, folder: Checkpointer(folder).restore(opt),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_all_ranks_take_edits_over_first(comm, mpi_tmp_path, call):
    with make(comm, True, two_groups("float32")) as opt:
        step(opt, 0, comm.rank)
        if comm.rank == 0 or comm.size == 1:  # only there, at first
            kept = params_of(opt)
            edit(opt, "float32")
        if comm.size > 1:
            with pytest.raises(RankMismatchError, match="with edited param_groups"):
                CALLS[call](opt, mpi_tmp_path)
            if comm.rank == 0:
                assert all(p is q for p, q in zip(params_of(opt), kept, strict=True))
            edit(opt, "float32")
        CALLS[call](opt, mpi_tmp_path)
        names = [spec.spec.name for spec in opt.partition.params]
        assert names == ["p1", "q", "p2", "p3", *["r"] * (call == "add_param_group")]
        step(opt, 1, comm.rank)
        assert comm.allgather(bits(opt)) == [bits(opt)] * comm.size


def test_what_is_saved_after_an_edit_fits_a_model_built_so(comm, mpi_tmp_path):
    """On other numbers of ranks, and in a run that groups its parameters so from the start."""
    for number, share in enumerate(ways_to_share(comm)):
        folder = mpi_tmp_path / str(number)
        with make(comm, share, two_groups("bfloat16")) as opt:
            for count in range(3):
                step(opt, count, comm.rank)
            edit(opt, "bfloat16")
            step(opt, 3, comm.rank)
            save(folder, opt)
            saved = content(opt)
        alone = comm.Split(comm.rank)
        groups = [
            {"params": [new("p1", 5, dtype="bfloat16"), new("q", 5000, dtype="bfloat16")]},
            {"params": [new("p2", 4097, dtype="bfloat16"), new("p3", 300, dtype="bfloat16")]},
        ]
        for ranks in (comm, alone):
            with make(ranks, True, groups) as opt:
                load(folder, opt)
                assert comm.bcast(content(opt)) == comm.bcast(saved)
        alone.Free()


def test_a_save_in_progress_is_of_the_groups_at_its_time(comm, mpi_tmp_path):
    with build(comm) as opt, Checkpointer(mpi_tmp_path) as checkpointer:
        train(opt, range(2))
        checkpointer.save(2, opt)
        saved = content(opt)
        del opt.param_groups[0]["params"][::2]
        train(opt, range(2, 4))
        opt.param_groups[0]["params"].append(new("late", 4000))
        checkpointer.save(4, opt)  # which waits for the one before
        later = content(opt)
        opt.param_groups[0]["params"].pop()
        train(opt, range(4, 6))
        checkpointer.wait()
        with build(comm, seed=3) as other:
            assert checkpointer.restore(other, step=2).step == 2
            assert content(other) == saved
            del other.param_groups[0]["params"][::2]
            other.param_groups[0]["params"].append(new("late", 4000, seed=1))
            assert checkpointer.restore(other).step == 4
            assert content(other) == later


def test_state_may_be_reset_and_looked_at_between_an_edit_and_its_step(comm):
    with make(comm, True, two_groups("float32")) as opt:
        step(opt, 0, comm.rank)
        fresh, stays, old = new("q", 6), opt.param_groups[0]["params"][1], params_of(opt)[0]
        opt.param_groups[0]["params"][0] = fresh
        assert fresh not in opt.state
        assert dict(opt.state[fresh]) == {}
        opt.reset_state([stays, fresh])
        step(opt, 1, comm.rank)
        assert opt.state[stays]["step"] == opt.state[fresh]["step"] == 1
        assert opt.state[params_of(opt)[2]]["step"] == 2
        assert old not in opt.state
        with pytest.raises(PartitionError, match="must be parameters of this optimizer"):
            opt.reset_state([old])


def test_views_of_the_state_follow_their_parameters(comm):
    """Also those that users have had in their hands since before the edit."""
    with make(comm, True, two_groups("float32")) as opt:
        step(opt, 0, comm.rank)
        last = opt.param_groups[1]["params"][0]
        entry = opt.state[last]
        moment, count = entry["exp_avg"], entry["step"]
        edit(opt, "float32")
        step(opt, 1, comm.rank)
        assert opt.state[last] is entry
        assert opt.state[last]["step"] == 2
        assert entry["exp_avg"].tobytes() == moment.tobytes()
        before = moment.copy()
        moment *= 0
        opt.state[last]["step"] = 7
        step(opt, 2, comm.rank)
        assert opt.state[last]["step"] == 8
        assert not np.allclose(moment, 0.9 * before, atol=1e-6)
        assert count == 8


def test_what_users_hold_of_a_parameter_that_left_stays_theirs(comm):
    with make(comm, True, two_groups("float32")) as opt:
        step(opt, 0, comm.rank)
        held = params_of(opt)[0].data
        left = edit(opt, "float32")
        assert params_of(opt)[0].grad.any()
        opt.step()  # with the gradients from before
        held[:] = comm.rank
        assert not np.shares_memory(held, left.data)
        step(opt, 2, comm.rank)
        assert comm.allgather(bits(opt)) == [bits(opt)] * comm.size
        shared = opt.core.parts.memory.buffers
        assert not any(np.shares_memory(left.data, each.own_params) for each in shared)
        for each in shared:  # what has become padding is zero
            for grads in each.all_grads.owners:
                mask = np.ones(each.region.numel, bool)
                for index in each.region.param_indices:
                    mask[each.local(opt.partition.params[index]).slice] = False
                assert not grads[mask].any()


@pytest.mark.mpi(min_size=2)
def test_writes_to_what_left_need_not_be_equal(comm):
    for share in several_nodes(comm):
        with make(comm, share, two_groups("float32")) as opt:
            step(opt, 0, comm.rank)
            left, stays = params_of(opt)[0], params_of(opt)[1]
            left.data += comm.rank
            stays.data *= 2
            value, before = left.data.copy(), stays.data.copy()
            edit(opt, "float32")
            opt.gather_state_dict()
            assert left.data.tobytes() == value.tobytes()
            assert stays.data.tobytes() == before.tobytes()
            step(opt, 1, comm.rank)
            assert comm.allgather(bits(opt)) == [bits(opt)] * comm.size


def test_an_optimizer_takes_parameters_from_another(comm):
    with (
        make(comm, True, two_groups("float32")) as first,
        make(comm, True, [new("z", 10)]) as second,
    ):
        step(first, 0, comm.rank)
        moved = first.param_groups[0]["params"].pop()
        second.param_groups[0]["params"].append(moved)
        step(second, 1, comm.rank)
        step(first, 1, comm.rank)
        step(second, 2, comm.rank)
        assert second.state[moved]["step"] == 2
        assert moved not in first.state
        for opt in (first, second):
            assert comm.allgather(bits(opt)) == [bits(opt)] * comm.size


def test_closing_forgets_edits(comm):
    opt = NAdam(two_groups("float32"), comm=comm, policy=POLICY)
    step(opt, 0, comm.rank)
    fresh, left = new("q", 3), opt.param_groups[0]["params"].pop()
    opt.param_groups[0]["params"].append(fresh)
    opt.close()
    assert np.isfinite(left.data).all()
    assert fresh.grad is None
