"""Updates made in backward give the bits of stage 1, and whatever they cannot follow raises."""

import dataclasses
import gc
import os

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.checkpoint import checkpoint

from shardopt import checkpoint as checkpoints
from shardopt.errors import (
    CallOrderError,
    CheckpointError,
    HyperparamsError,
    PartitionError,
    RankMismatchError,
)
from shardopt.policy import ShardPolicy
from shardopt.torch import Adam, AdamW, NAdam, RAdam
from tests.support.stage_two import (
    NUM_STEPS,
    SIZES,
    SMALL,
    Break,
    Net,
    held_up,
    no_batch_on_the_last,
    plain,
)
from tests.support.torch_models import bytes_of

pytestmark = pytest.mark.mpi(min_size=2)


def policy(in_backward=True, **settings):
    if not in_backward:
        settings.pop("ring_nbytes", None)
    stage = 2 if in_backward else 1
    return ShardPolicy(
        stage=stage, update_in_backward=in_backward, timeout_s=60, threads=1, **settings
    )


def groups_of(model):
    """Weights and biases, with different rates and decay."""
    params = dict(model.named_parameters())
    weights = [(name, param) for name, param in params.items() if "weight" in name]
    biases = [(name, param) for name, param in params.items() if "bias" in name]
    return [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "lr": 3e-2, "momentum_decay": 0.01},
    ]


def raw(tensor):
    """The bytes of a tensor; those of 16 bits as float32, which NumPy knows."""
    return bytes_of(tensor.float() if tensor.dtype is torch.bfloat16 else tensor)


def train(comm, program, chosen, dtype=None):
    """Train a model by a program; return its values and its state, as bytes."""
    model = Net().to(dtype)
    with NAdam(groups_of(model), lr=1e-2, comm=comm, policy=chosen) as opt:
        for step in range(NUM_STEPS):
            program(model, opt, step, comm)
        assert opt.last_step.step == NUM_STEPS
        state = opt.state_dict()["state"]
        moments = {
            (index, key): raw(torch.as_tensor(value))
            for index, entry in state.items()
            for key, value in entry.items()
        }
        return [raw(param.detach()) for param in model.parameters()], moments


def assert_same_bits(comm, program, dtype=None, **settings):
    ours, theirs = (train(comm, program, policy(on, **settings), dtype) for on in (True, False))
    assert ours == theirs
    assert ours[0] != [raw(param.detach()) for param in Net().to(dtype).parameters()]


@pytest.mark.parametrize("settings", [SMALL, {}, {"bucket_nbytes": 1, "ring_nbytes": 1 << 20}])
def test_bits_are_those_of_stage_one(comm, settings):
    assert_same_bits(comm, plain, torch.float32, **settings)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"optim_bits": 8}),
        (torch.bfloat16, {"optim_bits": 8, "master_weights": False}),
    ],
)
def test_other_states(comm, dtype, settings):
    assert_same_bits(comm, plain, dtype, **SMALL, **settings)


def other_branches(model, opt, step, comm):
    """Layers in another order on every rank, and some that only some ranks reach."""
    opt.zero_grad()
    order = list(range(3) if comm.rank % 2 else range(2, -1, -1))
    if comm.rank == step % 2:
        order.insert(step, 3)
    inputs = [torch.ones(1, size[0]) * (i + step) for i, size in enumerate(SIZES)]
    sum(model.layers[i](inputs[i]).square().sum() for i in order).backward()
    opt.step()


def late_everywhere(model, opt, step, comm):
    """A layer that no step before has reached, in front of all others or behind them."""
    opt.zero_grad()
    order = {0: [1, 2], 1: [0, 1, 2, 3], 2: [3]}[step]
    inputs = [torch.ones(1, size[0]) * (i + comm.rank) for i, size in enumerate(SIZES)]
    sum(model.layers[i](inputs[i]).square().sum() for i in order).backward()
    opt.step()


def alternating(model, opt, step, comm):
    """Other layers in every step, in an order that differs between ranks."""
    opt.zero_grad()
    order = [1] if step % 2 == 0 else [0, 2, 3] if comm.rank % 2 else [3, 0, 2]
    x = torch.ones(1, 1)
    for i in order[::-1]:  # the last one goes backward first
        layer = model.layers[i]
        x = layer(x.sum().expand(1, layer.in_features) * 0.01 + comm.rank + step)
    x.square().sum().backward()
    opt.step()


def other_hooks(model, opt, step, comm):
    """Users' hooks, registered before and after ours, see this rank's gradient, and change it."""
    if step == 0:
        model.seen = []
        weight = model.layers[1].weight
        weight.register_hook(lambda grad: grad * 2)
        weight.register_post_accumulate_grad_hook(lambda of: model.seen.append(of.grad.clone()))
    plain(model, opt, step, comm)
    assert len(model.seen) == step + 1


def checkpointed(model, opt, step, comm):
    opt.zero_grad()
    x = model.batch(step, comm.rank)
    for layer in model.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    model.layers[3](x.new_ones(60)).add(x).square().mean().backward()
    opt.step()


def own_tensors(model, opt, step, comm):
    """A gradient that a user puts into ``p.grad``, before backward or without one."""
    opt.zero_grad()
    for index, param in enumerate(model.layers[2:].parameters()):
        if comm.rank or index:
            param.grad = torch.full_like(param, comm.rank + index + step + 0.5)
    model.layers[2](torch.ones(80)).sum().backward()
    opt.step()


def cleared_by_the_model(model, opt, step, comm):
    model.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.step()


def with_a_schedule(model, opt, step, comm):
    if step == 0:
        model.schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    plain(model, opt, step, comm)
    model.schedule.step()


@pytest.mark.parametrize(
    "program",
    [
        no_batch_on_the_last,
        other_branches,
        late_everywhere,
        alternating,
        other_hooks,
        checkpointed,
        own_tensors,
        cleared_by_the_model,
        with_a_schedule,
    ],
)
def test_programs(comm, program):
    assert_same_bits(comm, program, **SMALL)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(AdamW, {"optim_bits": 8}), (AdamW, {}), (Adam, {}), (RAdam, {"optim_bits": 8})],
)
def test_other_optimizers(comm, kind, settings):
    """They have the bits of the other stages; RAdam adapts from its sixth step on."""
    results = []
    for chosen in (policy(**SMALL), policy(in_backward=False, **SMALL), ShardPolicy(stage=2)):
        model = Net().float()
        chosen = dataclasses.replace(chosen, **settings)
        with kind(model, lr=1e-2, weight_decay=0.1, comm=comm, policy=chosen) as opt:
            for step in range(7):
                no_batch_on_the_last(model, opt, step % 3, comm)
            entries = opt.state_dict()["state"].values()
            state = [raw(torch.as_tensor(value)) for e in entries for value in e.values()]
        results.append(([raw(param.detach()) for param in model.parameters()], state))
    assert results[0] == results[1] == results[2]


def test_groups_may_be_added_and_edited_between_steps(comm):
    results = []
    for on in (True, False):
        model = Net()
        first = [*model.layers[:2].parameters()]
        with NAdam(first, comm=comm, policy=policy(on, **SMALL)) as opt:
            plain(model, opt, 0, comm)
            opt.add_param_group({"params": [*model.layers[2:].parameters()], "lr": 1e-3})
            plain(model, opt, 1, comm)
            assert opt.last_step.num_updated == 8
            model.layers[0].weight.requires_grad_(False)
            del opt.param_groups[0]["params"][0]
            opt.adopt()
            plain(model, opt, 2, comm)
            assert opt.last_step.num_updated == 7
        results.append([raw(param.detach()) for param in model.parameters()])
    assert results[0] == results[1]


def test_parameters_that_are_frozen_at_first(comm):
    """They have no hooks until their first gradient, which the step finds."""
    results = []
    for on in (True, False):
        model = Net()
        model.layers[1].requires_grad_(False)
        with NAdam(model, lr=1e-2, comm=comm, policy=policy(on, **SMALL)) as opt:
            for step in range(NUM_STEPS):
                model.layers[1].requires_grad_(step > 0)
                plain(model, opt, step, comm)
                assert opt.last_step.num_updated == (8 if step else 6)
        results.append([raw(param.detach()) for param in model.parameters()])
    assert results[0] == results[1]


def test_backward_goes_on_while_a_rank_is_held_up(comm):
    def counted(model, opt, step, comm):
        held_up(model, opt, step, comm)
        assert opt.last_step.late_nbytes > 0 or comm.rank == comm.size - 1

    ours = train(comm, counted, policy(**SMALL))
    assert ours == train(comm, plain, policy(in_backward=False))


def test_memory_of_a_node_is_twelve_bytes_and_a_ring(comm):
    group = comm.Dup()  # whose optimizer has an arena of its own
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4))).float()
    numel = sum(param.numel() for param in model.parameters())
    chosen = policy(bucket_nbytes=1 << 17, ring_nbytes=comm.size << 18)
    with NAdam(model, comm=group, policy=chosen) as opt:
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(1, 512).float()).sum().backward()
            opt.step()
        report, file = opt.memory_report(), opt.core.parts.memory.arena.fd
        group.Barrier()
        shared = report.node_nbytes - report.late_node_nbytes
        assert os.fstat(file).st_blocks * 512 == pytest.approx(shared, rel=0.02)
        assert shared == pytest.approx(12 * numel + report.ring_node_nbytes, rel=0.02)
        assert report.grads_node_nbytes == 0
    group.Free()


# -- what it cannot have ---------------------------------------------------------------------------


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def opt(comm, model):
    with NAdam(model, comm=comm, policy=policy(**SMALL)) as opt:
        yield opt


@pytest.mark.parametrize(
    ("settings", "arguments", "refused"),
    [
        ({"check_finite": True}, {}, "False with check_finite=True"),
        ({"offload": "cpu"}, {}, "False with offload"),
        ({"stage": 1}, {}, "False without stage=2"),
        ({}, {"max_grad_norm": 1.0}, "max_grad_norm must be None"),
        ({"share_node": False, "overlap": False}, {}, "overlap=False on several nodes"),
        ({"share_node": False, "wire_dtype": "float16"}, {}, "wire_dtype must be bfloat16 or None"),
        (
            {"share_node": False, "prefetch_params": True},
            {},
            "prefetch_params .* policy.update_in_backward, which sends parameters in backward",
        ),
        ({"accumulate": "node"}, {}, "update_in_backward .* False with accumulate"),
        ({}, {"dtype": torch.float16}, "for parameters in float16"),
    ],
)
def test_refused_at_once(comm, settings, arguments, refused):
    model = Net().to(arguments.get("dtype"))
    others = {key: value for key, value in arguments.items() if key != "dtype"}
    settings = {"stage": 2, "update_in_backward": True, "timeout_s": 60, **settings}
    with pytest.raises(HyperparamsError, match=refused):
        NAdam(model, comm=comm, policy=ShardPolicy(**settings), **others)


def test_what_needs_a_gradient_says_so(comm, model, opt):
    with pytest.raises(HyperparamsError, match="max_grad_norm must be None"):
        opt.max_grad_norm = 1.0
    with pytest.raises(HyperparamsError, match="average_grads"):
        opt.average_grads()
    with pytest.raises(HyperparamsError, match="set_to_none"):
        opt.zero_grad(set_to_none=False)
    plain(model, opt, 0, comm)
    with pytest.raises(CallOrderError, match="leave the option out to clip"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(CallOrderError, match="unscale"):
        scaler.unscale_(opt)
    grad = model.layers[0].weight.grad
    assert grad.shape == model.layers[0].weight.shape
    read = lambda: opt.grad(model.layers[0].weight)  # noqa: E731
    for use in (grad.norm, lambda: grad + 1, grad.numpy, lambda: grad.data, grad.zero_, read):
        with pytest.raises(CallOrderError, match="must not be used"):
            use()
    assert model.unused.weight.grad is None
    opt.zero_grad()
    assert model.layers[0].weight.grad is None
    with pytest.raises(HyperparamsError, match="closure"):
        opt.step(lambda: pytest.fail("it was called"))
    plain(model, opt, 1, comm)
    assert opt.last_step.step == 2


def test_weights_must_not_be_written_before_a_backward(comm, model, opt):
    """Nothing is updated, so that training goes on once ranks have agreed on the values."""
    plain(model, opt, 0, comm)
    before = [raw(param.detach()) for param in model.parameters()]
    with torch.no_grad():
        model.layers[1].weight.mul_(0.5)
    opt.zero_grad()
    with pytest.raises(CallOrderError, match=r"layers.1.weight.*opt.adopt"):
        model.loss(1, comm.rank).backward()
    with pytest.raises(CallOrderError, match="written to"):
        opt.step()
    opt.adopt()
    after = [raw(param.detach()) for param in model.parameters()]
    assert [old == new for old, new in zip(before, after, strict=True)].count(False) == 1
    opt.zero_grad()
    model.loss(1, comm.rank).backward()
    opt.step()
    assert opt.last_step.step == 2


def test_bytes_that_are_written_again_are_no_write(comm):
    def swapped(model, opt, step, comm):
        with torch.no_grad():  # as averages of weights are, for an evaluation
            for param in model.parameters():
                param.copy_(param.clone())
        plain(model, opt, step, comm)

    assert_same_bits(comm, swapped, **SMALL)


def test_rates_hold_from_the_next_backward_on(comm):
    def edited(model, opt, step, comm):
        opt.zero_grad()
        model.loss(step, comm.rank).backward()
        is_early = not opt.policy.update_in_backward
        if is_early:
            opt.step()
        for group in opt.param_groups:
            group["lr"] *= 0.5
        if not is_early:
            opt.step()

    assert_same_bits(comm, edited, **SMALL)


def test_rates_that_differ_raise(comm, model, opt):
    opt.zero_grad()
    opt.param_groups[0]["lr"] = 0.1 * (1 + comm.rank)
    model.loss(0, comm.rank).backward()
    with pytest.raises(RankMismatchError, match="lr of param group 0"):
        opt.step()
    with pytest.raises(CheckpointError, match="whole"):
        opt.state_dict()


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_edited_groups_are_refused_by_the_next_backward(comm, model, opt, when, is_alone):
    """Nothing is updated, no rank waits for another, and ``adopt`` takes the edit over."""
    plain(model, opt, 0, comm)
    extra = torch.nn.Parameter(torch.ones(3))
    is_edited = comm.rank == 0 or not is_alone
    if when == "after":
        opt.zero_grad()
        model.loss(1, comm.rank).backward()
    if is_edited:
        opt.param_groups[0]["params"].append(extra)
    if when == "after":
        opt.step()
        assert opt.last_step.step == 2
    before = [raw(param.detach()) for param in model.parameters()]
    opt.zero_grad()
    try:
        model.loss(2, comm.rank).backward()
        assert not is_edited
    except CallOrderError:
        assert is_edited
    with pytest.raises(CallOrderError, match="got edited groups. Call opt.adopt"):
        opt.step()
    assert before == [raw(param.detach()) for param in model.parameters()]
    if is_alone:
        with pytest.raises(RankMismatchError, match="with edited param_groups"):
            opt.adopt()
    else:
        opt.adopt()
    plain(model, opt, 2, comm)
    assert len(opt.param_groups[0]["params"]) == (10 if is_alone else 11)


def second_backward(model, opt, comm):
    model.loss(0, comm.rank).backward()
    model.loss(1, comm.rank).backward()


def with_a_graph(model, opt, comm):
    model.loss(0, comm.rank).backward(create_graph=True)


def twice_in_one(model, opt, comm):
    layer = model.layers[2]
    x = torch.ones(1, 80, requires_grad=True)
    first = checkpoint(layer, x, use_reentrant=True)
    second = checkpoint(layer, x * 2, use_reentrant=True)
    (first + second).sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize(
    ("program", "refused"),
    [
        (second_backward, "second backward"),
        (with_a_graph, "create_graph"),
        (twice_in_one, "use_reentrant=False"),
    ],
)
def test_backwards_that_are_refused(comm, model, opt, program, refused):
    plain(model, opt, 0, comm)
    opt.zero_grad()
    with pytest.raises(CallOrderError, match=refused):
        program(model, opt, comm)
    with pytest.raises(CallOrderError, match=refused):
        opt.step()


def test_a_weight_that_is_read_after_its_gradient_raises(comm, model, opt):
    """Autograd refuses, as others may have written to it."""
    opt.zero_grad()
    weight = model.layers[2].weight
    x = torch.ones(60, 80, requires_grad=True)
    inner = x @ weight.detach().T  # goes backward last, and reads the weight
    loss = (model.layers[3].weight @ inner).sum() + model.layers[2](torch.ones(80)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(CallOrderError, match="come to its end"):
        opt.step()


def test_a_backward_before_zero_grad_raises(comm, model, opt):
    """As that of a generator through a discriminator."""
    plain(model, opt, 0, comm)
    before = [raw(param.detach()) for param in model.parameters()]
    with pytest.raises(CallOrderError, match=r"zero_grad\(\) must come before.*freeze"):
        model.loss(1, comm.rank).backward()
    with pytest.raises(CallOrderError, match="zero_grad"):
        opt.step()
    assert before == [raw(param.detach()) for param in model.parameters()]
    plain(model, opt, 1, comm)  # nothing was updated
    model.requires_grad_(False)
    model(torch.ones(1, 40, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("is_wrapped_late", [True, False])
def test_parameters_of_a_reducer(comm, mpi_tmp_path, is_wrapped_late):
    """Nothing is updated: training goes on without the wrapper."""
    store = torch.distributed.FileStore(str(mpi_tmp_path / "store"), comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    wrap = torch.nn.parallel.DistributedDataParallel
    try:
        model = torch.nn.Linear(40, 40)
        early = None if is_wrapped_late else wrap(model)
        with NAdam(model, comm=comm, policy=policy(**SMALL)) as opt:
            before = raw(model.weight.detach())
            wrapped = early or wrap(model)
            with pytest.raises(CallOrderError, match="False for parameters of DistributedData"):
                wrapped(torch.ones(1, 40)).sum().backward()
            with pytest.raises(CallOrderError, match="DistributedData"):
                opt.step()
            assert raw(model.weight.detach()) == before
            del wrapped, early
            opt.zero_grad()
            gc.collect()
            model(torch.ones(1, 40)).sum().backward()
            opt.step()
            assert raw(model.weight.detach()) != before
    finally:
        torch.distributed.destroy_process_group()


def test_a_graph_goes_backward_once(comm, model, opt):
    """Autograd itself refuses: the weights that it has saved are about to be written."""
    opt.zero_grad()
    loss = model.loss(0, comm.rank)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    opt.step()
    assert opt.last_step.num_updated == 8


def test_two_optimizers_in_one_backward(comm):
    halves = Net().layers[:2]
    opts = [NAdam(half, comm=comm, policy=policy(**SMALL)) for half in halves]
    loss = sum(half(torch.ones(1, half.in_features)).sum() for half in halves)
    with pytest.raises(CallOrderError, match="one optimizer"):
        loss.backward()
    errors = 0
    for opt in opts:
        try:
            opt.step()
        except CallOrderError:
            errors += 1
        opt.close()
    assert errors == 2


def test_calls_between_backward_and_step(comm, model, opt, tmp_path):
    opt.zero_grad()
    model.loss(0, comm.rank).backward()
    calls = {
        "opt.state": lambda: opt.state,
        "state_dict": opt.state_dict,
        "reset_state": opt.reset_state,
        "zero_grad": opt.zero_grad,
        "gather_state_dict": opt.gather_state_dict,
        "adopt": opt.adopt,
        "add_param_group": lambda: opt.add_param_group({"params": [torch.nn.Parameter(x)]}),
        "close": opt.close,
        "save": lambda: checkpoints.save(tmp_path / "none", opt),
    }
    x = torch.zeros(3)
    for name, call in calls.items():
        with pytest.raises(CallOrderError, match=rf"{name}.*must come after step\(\)"):
            call()
    opt.step()
    assert len(opt.state_dict()["state"]) == 10


def test_a_backward_that_raises_on_one_rank(comm, tmp_path):
    """All ranks raise, nothing is saved of what is left, and a checkpoint makes it whole again."""
    folder = comm.bcast(tmp_path / "saved")
    other = comm.bcast(tmp_path / "torn")
    results = []
    for breaks in (True, False):
        model = Net()
        with NAdam(model, comm=comm, policy=policy(**SMALL)) as opt:
            plain(model, opt, 0, comm)
            if breaks:
                checkpoints.save(folder, opt)
                break_on_the_first(model, opt, comm)
                for refused in (
                    opt.state_dict,
                    opt.gather_state_dict,
                    lambda opt=opt: checkpoints.save(other, opt),
                    opt.step,
                ):
                    with pytest.raises(CheckpointError, match="state that is whole"):
                        refused()
                checkpoints.load(folder, opt)
            plain(model, opt, 1, comm)
            results.append([raw(param.detach()) for param in model.parameters()])
    assert results[0] == results[1]


def break_on_the_first(model, opt, comm):
    opt.zero_grad()
    x = model.batch(1, comm.rank)
    for index, layer in enumerate(model.layers):
        x = torch.tanh(layer(Break.apply(x) if index == 2 and comm.rank == 0 else x))
    try:
        x.square().mean().backward()
    except ArithmeticError:
        assert comm.rank == 0
    with pytest.raises(CallOrderError, match="come to its end"):
        opt.step()


def test_a_gradient_that_fits_not_raises(comm):
    model, embedding = Net(), torch.nn.Embedding(10, 4, sparse=True)
    params = [*model.parameters(), *embedding.parameters()]
    with NAdam(params, comm=comm, policy=policy(**SMALL)) as opt:
        opt.zero_grad()
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(PartitionError, match="sparse"):
            opt.step()
        opt.zero_grad()  # nothing was updated
        model.loss(0, comm.rank).backward()
        opt.step()
        assert opt.last_step.num_updated == 8
