"""Stage 2: gradients averaged as backward goes give what stage 1 gives, whatever users do."""

import gc
import math
import weakref

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.checkpoint import checkpoint

from shardopt.errors import CallOrderError, HyperparamsError, PartitionError, RankMismatchError
from shardopt.layout.ring import plan_ring
from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam, averages
from tests.support.device_training import up_to_two_ranks
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


def policy(stage, **settings):
    if stage == 1:
        settings.pop("ring_nbytes", None)
    return ShardPolicy(stage=stage, timeout_s=20, threads=1, **settings)


def run(comm, program, stage, num_steps=NUM_STEPS, settings=None, **arguments):
    """Train a model by a program; return its parameters, the norms, and bytes that were late."""
    model = Net()
    norms, late = [], 0
    chosen = policy(stage, **SMALL if settings is None else settings)
    with NAdam(model, lr=1e-2, comm=comm, policy=chosen, **arguments) as opt:
        for step in range(num_steps):
            program(model, opt, step, comm)
            norms.append(opt.last_step.grad_norm)
            late += opt.last_step.late_nbytes
        params = [param.detach().clone() for param in model.parameters()]
    return params, norms, late


def assert_same_bits(comm, program, **arguments):
    ours, theirs = (run(comm, program, stage, **arguments) for stage in (2, 1))
    assert ours[1] == theirs[1]
    assert [*map(bytes_of, ours[0])] == [*map(bytes_of, theirs[0])]


def assert_close(comm, program, **arguments):
    """Compare where sums over micro-batches have another order."""
    ours, theirs = (run(comm, program, stage, **arguments)[0] for stage in (2, 1))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    initial = Net().parameters()
    assert sum(bool((one != old).any()) for one, old in zip(ours, initial, strict=True)) == 8


# -- one backward in each step has the bits of stage 1 ---------------------------------------------


@pytest.mark.parametrize("settings", [SMALL, {}, {"bucket_nbytes": 1, "ring_nbytes": 1 << 20}])
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_bits_are_those_of_stage_one(comm, settings, max_grad_norm):
    assert_same_bits(comm, plain, settings=settings, max_grad_norm=max_grad_norm)


def test_bits_with_moments_of_eight_bits(comm):
    results = []
    for stage in (2, 1):
        layer = Net().layers[1].float()
        with NAdam(layer, comm=comm, policy=policy(stage, optim_bits=8, **SMALL)) as opt:
            for step in range(NUM_STEPS):
                opt.zero_grad()
                layer(
                    torch.full((1, 120), 1.0 + comm.rank + step).float()
                ).square().sum().backward()
                opt.step()
        results.append([*map(bytes_of, layer.parameters())])
    assert results[0] == results[1] != [*map(bytes_of, Net().layers[1].float().parameters())]


needs_wide_grads = pytest.mark.skipif(
    not averages._AveragingAdapter.widens_grads,
    reason="this torch takes gradients of the parameter's dtype only",
)

SIXTEEN_BITS = [
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"master_weights": False, "optim_bits": 8}),
]


def train_sixteen_bits(comm, stage, dtype, settings, num_micros=1, **arguments):
    """Train; return the bits of parameters and moments, and the norms."""
    net, norms = torch.nn.Sequential(torch.nn.Linear(90, 70), torch.nn.Linear(70, 3)).to(dtype), []
    with torch.no_grad():
        for number, param in enumerate(net.parameters()):
            param.copy_(torch.linspace(-0.1, 0.1 + number, param.numel()).view_as(param))
    chosen = policy(stage, **{**SMALL, **settings})
    with NAdam(net, comm=comm, policy=chosen, **arguments) as opt:
        for step in range(NUM_STEPS):
            opt.zero_grad()
            for micro in range(num_micros):
                x = torch.full((2, 90), 0.1 + comm.rank + step + micro / 3).to(dtype)
                net(x).square().mean().backward()
            if stage == 2:
                assert {param.grad.dtype for param in net.parameters()} == {torch.float32}
            opt.step()
            norms.append(opt.last_step.grad_norm)
        state = comm.bcast(opt.gather_state_dict())["state"]
    assert {param.grad_dtype for param in net.parameters()} == {dtype}
    moments = [bytes_of(entry["exp_avg"]) for entry in state.values()]
    params = [bytes_of(param.detach().view(torch.int16)) for param in net.parameters()]
    assert len(set(comm.allgather(tuple(params)))) == 1
    return params, moments, norms


@needs_wide_grads
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize(("dtype", "settings"), SIXTEEN_BITS)
def test_bits_of_sixteen_bits(comm, dtype, settings, max_grad_norm):
    ours, theirs = (
        train_sixteen_bits(comm, stage, dtype, settings, max_grad_norm=max_grad_norm)
        for stage in (2, 1)
    )
    assert ours == theirs


@needs_wide_grads
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("unscales", [True, False])
def test_float16_with_a_scaler(comm, share, unscales):
    """Averages are float32, and may be unscaled; an overflow on one rank skips the step."""
    layer = torch.nn.Linear(40, 4).half()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    with NAdam(layer, comm=comm, policy=policy(2, **SMALL, share_node=share)) as opt:
        for step, skips in enumerate((False, True, False)):
            opt.zero_grad()
            factor = 1e4 if skips and comm.rank == 0 else 1.0
            loss = layer(torch.full((1, 40), 0.5 + comm.rank).half()).float().sum() * factor
            scaler.scale(loss).backward()
            if not share:
                opt.average_grads()
            if unscales:
                scaler.unscale_(opt)
            average = sum(0.5 + rank for rank in range(comm.size)) / comm.size
            if unscales and not skips:
                expected = torch.full_like(layer.weight, average, dtype=torch.float32)
                assert torch.equal(layer.weight.grad, expected)
            before = bytes_of(layer.weight)
            scaler.step(opt)
            scaler.update()
            assert opt.last_step.skipped == skips == (bytes_of(layer.weight) == before), step
        assert scaler.get_scale() == 128.0


def other_branches(model, opt, step, comm):
    """Layers in another order on every rank, and one that only some ranks reach."""
    opt.zero_grad()
    order = range(3) if comm.rank % 2 else range(2, -1, -1)
    inputs = [torch.ones(1, size[0]) * (i + step) for i, size in enumerate(SIZES)]
    terms = [model.layers[i](inputs[i]).square().sum() for i in order]
    if comm.rank == step % 2:
        terms.append(model.layers[3](inputs[3]).square().sum())
    sum(terms[1:], start=terms[0]).backward()
    opt.step()


def other_hooks(model, opt, step, comm):
    """Users' hooks, registered before and after ours, see this rank's gradient, and change it."""
    if step == 0:
        param = model.layers[1].weight
        param.register_hook(lambda grad: grad * 2)
        param.register_post_accumulate_grad_hook(seen_by(model, param))
    plain(model, opt, step, comm)
    assert len(model.seen) == step + 1
    own = torch.autograd.grad(model.loss(step, comm.rank), model.layers[0].weight)[0]
    assert own.shape == model.layers[0].weight.shape


def seen_by(model, param):
    model.seen = []

    def hook(of):
        assert of is param
        assert type(of.grad) is torch.Tensor  # this rank's, not the average
        model.seen.append(of.grad.clone())

    return hook


def checkpointed(use_reentrant):
    def program(model, opt, step, comm):
        opt.zero_grad()
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(step + comm.rank))
        x = x.requires_grad_()
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        x.square().mean().backward()
        opt.step()

    return program


def raising_on_one(model, opt, step, comm):
    """A backward that stops half-way on one rank, who goes on with what it has."""
    opt.zero_grad()
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(step + comm.rank))
    for index, layer in enumerate(model.layers):
        x = torch.tanh(layer(Break.apply(x) if index == 2 and comm.rank == 0 else x))
    try:
        x.square().mean().backward()
    except ArithmeticError:
        assert comm.rank == 0
    opt.step()


def repeated_after_an_error(model, opt, step, comm):
    """Backward stops half-way on all ranks, and is repeated with other gradients of the model."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(step + comm.rank))
    for index, layer in enumerate(model.layers):
        x = torch.tanh(layer(Break.apply(x) if index == 2 else x))
    with pytest.raises(ArithmeticError):
        x.square().mean().backward()
    model.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.step()


def own_tensors(model, opt, step, comm):
    """A gradient that a user puts into ``p.grad`` is this rank's own."""
    opt.zero_grad()
    for index, param in enumerate(model.layers.parameters()):
        if comm.rank or index:
            values = torch.full_like(param, comm.rank + index + step + 0.5)
            others = torch.full_like(param, math.nan)
            param.grad = torch.stack([values, others], dim=-1)[..., 0]  # with gaps in between
    opt.step()


def graph_kept(model, opt, step, comm):
    """A gradient with a graph is this rank's own until the step."""
    opt.zero_grad()
    model.loss(step, comm.rank).backward(create_graph=True)
    assert model.layers[0].weight.grad.requires_grad
    opt.step()
    opt.zero_grad()


def cleared_by_the_model(model, opt, step, comm):
    model.zero_grad()
    model.loss(step, comm.rank).backward()
    if step == 1:  # this backward is for nothing
        model.zero_grad()
        model.loss(step, comm.rank, micro=1).backward()
    opt.step()


@pytest.mark.parametrize(
    "program",
    [
        no_batch_on_the_last,
        other_branches,
        other_hooks,
        pytest.param(checkpointed(False), id="checkpoint"),
        pytest.param(checkpointed(True), id="reentrant checkpoint"),
        raising_on_one,
        repeated_after_an_error,
        own_tensors,
        cleared_by_the_model,
    ],
)
def test_what_one_backward_does(comm, program):
    assert_same_bits(comm, program, max_grad_norm=0.5)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_create_graph(comm):
    assert_same_bits(comm, graph_kept)


# -- several backwards -----------------------------------------------------------------------------


def unequal(model, opt, step, comm):
    opt.zero_grad()
    for micro in range(1 + (comm.rank + step) % 3):
        model.loss(step, comm.rank, micro).backward()
    opt.step()


def retained(model, opt, step, comm):
    opt.zero_grad()
    loss = model.loss(step, comm.rank)
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()


def accumulated_by_hand(model, opt, step, comm):
    """Backward adds to a gradient that a user has put there before, and to zeros."""
    opt.zero_grad(set_to_none=step == 0)
    if step == 0:
        model.layers[0].bias.grad = torch.full_like(model.layers[0].bias, comm.rank + 1.0)
    model.loss(step, comm.rank).backward()
    opt.step()


@pytest.mark.parametrize("program", [unequal, retained, accumulated_by_hand])
def test_several_backwards_are_added_up(comm, program):
    assert_close(comm, program)


def test_micro_batches_have_the_same_bits_for_any_ring(comm):
    results = [
        [*map(bytes_of, run(comm, unequal, 2, settings=settings)[0])]
        for settings in (SMALL, {}, {"bucket_nbytes": 1 << 16})
    ]
    assert results[0] == results[1] == results[2]


def test_two_optimizers_in_one_backward(comm):
    """They are reached in opposite orders on different ranks."""

    def train(stage):
        model = Net()
        halves = [model.layers[0], model.layers[1]]
        opts = [NAdam(half, comm=comm, policy=policy(stage, **SMALL)) for half in halves]
        for step in range(NUM_STEPS):
            for opt in opts:
                opt.zero_grad()
            order = halves if comm.rank % 2 else halves[::-1]
            terms = [half(torch.ones(1, half.in_features) + step).square().sum() for half in order]
            (terms[0] + terms[1]).backward()
            for opt in opts:
                opt.step()
        params = [bytes_of(param) for param in model.parameters()]
        for opt in opts:
            opt.close()
        return params

    assert train(2) == train(1)


def late_nbytes(opt, model):
    """The gradients that find no room in the first backward, which closes no bucket.

    The first buckets have a parameter that it does not reach, which nobody knows before its end.
    """
    partition, ring = opt.partition, plan_ring(opt.partition, SMALL["ring_nbytes"])
    numel = 0
    for bucket in partition.buckets[: -ring.depth]:  # they travel from the last to the first
        for index, span in partition.params_in(bucket.region, bucket):
            numel += span.numel if partition.params[index].spec.name.startswith("layers") else 0
    return numel * model.layers[0].weight.itemsize


@pytest.mark.parametrize(
    "backend",  # each rank compiles for itself, which takes seconds
    [None, pytest.param("aot_eager", marks=up_to_two_ranks)],
)
def test_backward_goes_on_while_a_rank_is_held_up(comm, backend):
    """What finds no room is counted, also if a compiled graph hands all over at once."""
    model = Net()
    if backend is not None:
        torch._dynamo.reset()
        model.compile(backend=backend)
    with NAdam(model, lr=1e-2, comm=comm, policy=policy(2, **SMALL)) as opt:
        held_up(model, opt, 0, comm)
        assert opt.last_step.late_nbytes == late_nbytes(opt, model) > 0
        ours = [bytes_of(param.detach()) for param in model.parameters()]
    assert ours == [*map(bytes_of, run(comm, plain, 1, num_steps=1)[0])]


# -- p.grad ----------------------------------------------------------------------------------------


def test_after_backward_the_gradient_is_the_average(comm):
    model = Net()
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        weight = model.layers[1].weight
        own = [torch.autograd.grad(model.loss(0, rank), weight)[0] for rank in range(comm.size)]
        model.loss(0, comm.rank).backward()
        assert weight.grad.shape == weight.shape
        torch.testing.assert_close(weight.grad + 0, sum(own) / comm.size, rtol=1e-12, atol=1e-14)
        everyone = comm.allgather(weight.grad.numpy().tobytes())
        assert set(everyone) == {everyone[0]}
        assert model.unused.weight.grad is None
        before = weight.grad
        opt.step()
        opt.zero_grad()
        assert weight.grad is None
        model.loss(1, comm.rank).backward()
        assert weight.grad is before


def test_averages_where_ranks_take_other_rounds(comm):
    """The first rank expects what its backward before has reached, and takes more rounds."""
    model = Net()
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        opt.zero_grad()
        loss = model.loss(0, comm.rank) if comm.rank else model.layers[0](torch.ones(1, 40)).sum()
        loss.backward()
        opt.step()
        opt.zero_grad()
        params = [*model.layers.parameters()]
        own = [torch.autograd.grad(model.loss(1, rank), params) for rank in range(comm.size)]
        model.loss(1, comm.rank).backward()
        for index, param in enumerate(params):
            average = sum(grads[index] for grads in own) / comm.size
            torch.testing.assert_close(param.grad + 0, average, rtol=1e-5, atol=1e-8)
        torch.nn.utils.clip_grad_norm_(params, 0.01)
        opt.step()
        assert opt.last_step.num_updated == 8


def test_zero_grad_makes_good_for_a_refused_gradient(comm):
    """It was all that one rank had, while another had averages."""
    model, embedding = Net(), torch.nn.Embedding(10, 4, sparse=True)
    params = [*model.parameters(), *embedding.parameters()]
    with NAdam(params, comm=comm, policy=policy(2, **SMALL)) as opt:
        is_first = comm.rank == 0
        loss = embedding(torch.tensor([1, 2])).sum() if is_first else model.loss(0, comm.rank)
        loss.backward()
        with pytest.raises(PartitionError, match="sparse"):
            opt.step()
        plain(model, opt, 1, comm)
        assert opt.last_step.num_updated == 8


def clipped(model, opt, step, comm):
    opt.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.average_grads()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.step()


def scaled(model, opt, step, comm):
    if step == 0:
        model.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    opt.zero_grad()
    model.scaler.scale(model.loss(step, comm.rank)).backward()
    opt.average_grads()
    if step == 1:
        model.layers[0].weight.grad.fill_(float("inf"))
    model.scaler.unscale_(opt)
    model.scaler.step(opt)
    model.scaler.update()


def masked(model, opt, step, comm):
    """Written to in place, replaced, and removed, alike on all ranks."""
    opt.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.average_grads()
    weight, bias = model.layers[0].weight, model.layers[2].bias
    weight.grad[::2] = 0.0
    weight.grad.data[1] += 1.0
    bias.grad = bias.grad * 3.0
    model.layers[1].weight.grad = None
    opt.step()


def in_one_page(model, opt, step, comm):
    """Written to beside gradients that are replaced and removed, in the same pages of memory."""
    opt.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.average_grads()
    first, second = model.layers[:2]
    for written in first.weight, second.weight:
        written.grad.mul_(2.0)
    first.bias.grad = first.bias.grad * 3.0
    second.bias.grad = None
    opt.step()


@pytest.mark.parametrize("program", [clipped, masked, in_one_page])
def test_averages_may_be_changed_alike(comm, program):
    runs = [run(comm, program, stage, max_grad_norm=0.5) for stage in (2, 1)]
    (ours, our_norms, _), (theirs, their_norms, _) = runs
    assert our_norms == pytest.approx(their_norms)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_operators_in_place_leave_the_average(comm):
    model = Net()
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        model.loss(0, comm.rank).backward()
        weight = model.layers[1].weight
        before, values = weight.grad, weight.grad.clone()
        weight.grad *= 2.0
        assert weight.grad is before
        assert weight.grad.add_(1.0) is before
        assert type(weight.grad * 2.0) is torch.Tensor
        assert bytes_of(weight.grad + 0) == bytes_of(values * 2.0 + 1.0)
        opt.step()


def test_averages_can_be_read_after_close(comm):
    model = Net()
    opt = NAdam(model, comm=comm, policy=policy(2, **SMALL))
    model.loss(0, comm.rank).backward()
    held = model.layers[1].weight.grad
    before = held.clone()
    opt.close()
    assert model.layers[1].weight.grad is None
    assert bytes_of(held + 0) == bytes_of(before)


def test_averages_keep_no_optimizer(comm):
    """One that was dropped, not closed, leaves its parameters to another."""
    model = Net()
    opt = NAdam(model, comm=comm, policy=policy(2, **SMALL))
    model.loss(0, comm.rank).backward()
    before = model.layers[1].weight.grad.clone()
    grads = weakref.ref(opt.core.parts.grads)
    del opt
    gc.collect()
    assert grads() is None
    assert bytes_of(model.layers[1].weight.grad + 0) == bytes_of(before)
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as other:
        plain(model, other, 1, comm)
        assert other.last_step.num_updated == 8


def test_averages_take_no_loss_scale(comm):
    opt = NAdam(Net(), comm=comm, policy=policy(2, **SMALL))
    with opt, pytest.raises(HyperparamsError, match="loss_scale must be 1 with policy.stage=2"):
        opt.average_grads(loss_scale=2.0)


def test_grad_scaler(comm):
    ours, theirs = (run(comm, scaled, stage)[0] for stage in (2, 1))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


# -- what cannot be followed raises on all ranks ---------------------------------------------------


def zeroed_on_one(model, opt, comm):
    model.loss(0, comm.rank).backward()
    if comm.rank == 0:
        opt.zero_grad()
    model.loss(1, comm.rank).backward()


def written_differently(model, opt, comm):
    model.loss(0, comm.rank).backward()
    model.layers[1].weight.grad[3, 4] = comm.rank


def written_on_one(model, opt, comm):
    model.loss(0, comm.rank).backward()
    if comm.rank == comm.size - 1:
        model.layers[1].weight.grad.add_(2.0)


def multiplied_on_one(model, opt, comm):
    model.loss(0, comm.rank).backward()
    if comm.rank == comm.size - 1:
        model.layers[1].weight.grad.mul_(2.0)


def clipped_differently(model, opt, comm):
    model.loss(0, comm.rank).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (comm.rank + 1))


def removed_on_one(model, opt, comm):
    model.loss(0, comm.rank).backward()
    if comm.rank == 0:
        model.layers[1].weight.grad = None


def written_before_another(model, opt, comm):
    model.loss(0, comm.rank).backward()
    model.layers[1].weight.grad.mul_(0.5)
    model.loss(1, comm.rank).backward()


def scaled_before_another(model, opt, comm):
    model.loss(0, comm.rank).backward()
    for param in model.layers.parameters():
        param.grad *= 0.5
    model.loss(1, comm.rank).backward()


def viewed_before_another(model, opt, comm):
    model.loss(0, comm.rank).backward()
    for param in model.layers.parameters():
        param.grad = param.grad.detach()
    model.loss(1, comm.rank).backward()


def removed_before_another(model, opt, comm):
    model.loss(0, comm.rank).backward()
    model.layers[1].weight.grad = None
    model.loss(1, comm.rank).backward()


def scaled_differently(model, opt, comm):
    model.loss(0, comm.rank).backward()
    opt.grad_scale = torch.tensor(1.0 + comm.rank)


@pytest.mark.parametrize(
    ("mistake", "error", "match"),
    [
        (zeroed_on_one, RankMismatchError, "number of backward passes before zero_grad"),
        (scaled_differently, RankMismatchError, "loss_scale"),
        (written_differently, RankMismatchError, r"gradient of 'layers.1.weight'"),
        (written_on_one, RankMismatchError, "averaged gradients were written to"),
        (multiplied_on_one, RankMismatchError, "factors by which .*'layers.1.weight'"),
        (clipped_differently, RankMismatchError, "factors by which averaged gradients"),
        (removed_on_one, RankMismatchError, "replaced or removed"),
        (written_before_another, CallOrderError, r"that of 'layers.1.weight' was written"),
        (scaled_before_another, CallOrderError, "was written to before another backward"),
        (viewed_before_another, CallOrderError, "were replaced by views of them"),
        (removed_before_another, CallOrderError, r"'layers.1.weight' were replaced or removed"),
    ],
)
def test_mistakes_raise_on_all_ranks(comm, mistake, error, match):
    model = Net()
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        mistake(model, opt, comm)
        before = [bytes_of(param) for param in model.parameters()]
        with pytest.raises(error, match=match):
            opt.step()
        assert [bytes_of(param) for param in model.parameters()] == before
        plain(model, opt, 2, comm)  # zero_grad() makes good for it
        assert opt.last_step.num_updated == 8


OTHER_CALLS = {
    "another call": lambda opt, other: opt.sum_over_ranks([1.0]),
    "another optimizer": lambda opt, other: other.step(),
}


def assert_other_calls_raise(comm, other_call, make):
    """Have rank 0 make another call than ``step()``; all raise, and may go on with the step."""
    results = []
    for is_mistaken in (False, True):
        models = Net(), Net()
        opt, other = (make(model, comm) for model in models)
        with opt, other:
            for step in range(3):
                for model in models:
                    model.loss(step, comm.rank).backward()
                if is_mistaken and step != 1:
                    with pytest.raises(RankMismatchError, match="the call must be the same"):
                        opt.step() if comm.rank else other_call(opt, other)
                for each in (opt, other):
                    each.step()
                    each.zero_grad()
        results.append([bytes_of(param) for model in models for param in model.parameters()])
    assert results[0] == results[1]


@pytest.mark.parametrize("settings", [{}, {"update_in_backward": True}])
@pytest.mark.parametrize("call", OTHER_CALLS)
def test_ranks_that_make_other_calls_all_raise(comm, call, settings):
    """At once, although backward exchanges nothing."""

    def make(model, comm):
        return NAdam(model, lr=1e-2, comm=comm, policy=policy(2, **settings))

    assert_other_calls_raise(comm, OTHER_CALLS[call], make)


def test_a_gradient_must_not_be_read_in_backward(comm):
    model = Net()
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        last = model.layers[3].weight

        def read(_):
            with pytest.raises(CallOrderError, match="read after backward"):
                last.grad.sum()

        model.layers[0].weight.register_hook(read)
        plain(model, opt, 0, comm)


def test_a_scaler_that_finds_no_gradient_on_a_rank(comm):
    model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=4.0)
    with NAdam(model, comm=comm, policy=policy(2, **SMALL)) as opt:
        loss = scaler.scale(model.loss(0, comm.rank))
        if comm.rank:
            loss.backward()
        scaler.step(opt)
        assert opt.last_step.num_updated == 8


def test_groups_may_be_edited_between_steps(comm):
    def train(stage):
        model = Net()
        first = [*model.layers[:2].parameters()]
        with NAdam(first, comm=comm, policy=policy(stage, **SMALL)) as opt:
            plain(model, opt, 0, comm)
            model.zero_grad()
            model.loss(1, comm.rank).backward()
            opt.add_param_group({"params": [*model.layers[2:].parameters()]})
            opt.step()
            plain(model, opt, 2, comm)
            del opt.param_groups[0]["params"][0]
            plain(model, opt, 3, comm)
            return [param.detach().clone() for param in model.parameters()]

    for one, other in zip(train(2), train(1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_groups_that_one_rank_has_edited(comm):
    """All ranks raise, and can step with the groups from before."""

    def train(stage):
        model = Net()
        with NAdam(model, comm=comm, policy=policy(stage, **SMALL)) as opt:
            model.loss(1, comm.rank).backward()
            if comm.rank == 0:
                del opt.param_groups[0]["params"][0]
            with pytest.raises(RankMismatchError, match="with edited param_groups"):
                opt.step()
            opt.step()
            assert opt.last_step.num_updated == 8
            return [bytes_of(param.detach()) for param in model.parameters()]

    assert train(2) == train(1)


def test_memory_has_one_row(comm):
    model = Net()
    reports = []
    for stage in (1, 2):
        with NAdam(model, comm=comm, policy=policy(stage)) as opt:
            reports.append(opt.memory_report())
    rows, one = reports
    assert one.grads_node_nbytes * comm.size == rows.grads_node_nbytes
    assert rows.ring_node_nbytes == 0 < one.ring_node_nbytes
    assert one.late_node_nbytes == comm.size * 120 * 80 * 8
    in_step = one.node_nbytes - one.ring_node_nbytes - one.late_node_nbytes
    total = in_step + (comm.size - 1) * one.grads_node_nbytes
    assert total == rows.node_nbytes


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_refused_by_a_torch_that_does_not_widen(comm, dtype, monkeypatch):
    monkeypatch.setattr(averages._AveragingAdapter, "widens_grads", False)
    with pytest.raises(HyperparamsError, match="policy.stage must be 1 for parameters of 16 bits"):
        NAdam(Net().to(dtype), comm=comm, policy=policy(2))
