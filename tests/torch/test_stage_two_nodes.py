"""Stage 2 on several nodes, here of one rank each: what users do, and what raises."""

import pytest

pytest.importorskip("torch")

import torch

from shardopt.checkpoint import load, save
from shardopt.errors import CallOrderError, HyperparamsError, PartitionError, RankMismatchError
from shardopt.torch import NAdam
from tests.core.test_kept_sums import file_nbytes
from tests.support.stage_two import NUM_STEPS, SMALL, Net, plain
from tests.support.torch_models import bytes_of
from tests.torch import test_stage_two as one_node
from tests.torch.test_stage_two import assert_same_bits, policy, run

pytestmark = pytest.mark.mpi(min_size=2)

APART = {**SMALL, "share_node": False}


def make(model, comm, **settings):
    return NAdam(model, comm=comm, policy=policy(2, **{**APART, **settings}))


def on_both(comm, program, **arguments):
    """Train on several nodes and on one; return the bytes of parameters of each."""
    results = [run(comm, program, 2, settings=each, **arguments)[0] for each in (APART, SMALL)]
    return [[*map(bytes_of, params)] for params in results]


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        one_node.other_branches,
        one_node.other_hooks,
        pytest.param(one_node.checkpointed(True), id="reentrant checkpoint"),
        one_node.raising_on_one,
        one_node.repeated_after_an_error,
        one_node.own_tensors,
        one_node.cleared_by_the_model,
    ],
)
def test_one_backward_has_the_bits_of_stage_one(comm, program):
    assert_same_bits(comm, program, settings=APART, max_grad_norm=0.5)


@pytest.mark.parametrize(
    "program",
    [
        one_node.retained,
        one_node.accumulated_by_hand,
        one_node.clipped,
        one_node.scaled,
        one_node.masked,
    ],
)
def test_bits_are_those_of_one_node(comm, program):
    apart, together = on_both(comm, program)
    assert apart == together


def test_two_optimizers_in_one_backward(comm):
    """They are reached in opposite orders on different ranks."""

    def train(stage):
        model = Net()
        halves, chosen = [model.layers[0], model.layers[1]], policy(stage, **APART)
        opts = [NAdam(half, comm=comm, policy=chosen) for half in halves]
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


def test_backward_goes_on_while_a_node_is_held_up(comm):
    """The last rank does not begin before all others have ended their backwards."""
    last = comm.size - 1

    def twice(model, opt, step, comm, is_held_up=False):
        opt.zero_grad()
        if comm.rank == last and is_held_up:
            for rank in range(last):
                comm.recv(source=rank)
        for micro in range(3):
            model.loss(step, comm.rank, micro).backward()
        if comm.rank != last and is_held_up:
            comm.send(None, last)
        opt.step()

    def held_up(*arguments):
        twice(*arguments, is_held_up=True)

    params, _, late = run(comm, held_up, 2, num_steps=1, settings=APART)
    assert late > 0 or comm.rank == last
    expected = run(comm, twice, 2, num_steps=1, settings=APART)[0]
    assert [*map(bytes_of, params)] == [*map(bytes_of, expected)]


def test_saves_while_gradients_are_on_their_way(comm, mpi_tmp_path):
    """Half-way through a step, whose backward is repeated by those who load it."""
    model = Net()
    with make(model, comm) as opt:
        plain(model, opt, 0, comm)
        opt.zero_grad()
        model.loss(1, comm.rank).backward()
        save(mpi_tmp_path / "half", opt)
        opt.step()
    resumed = Net()
    with make(resumed, comm) as opt:
        load(mpi_tmp_path / "half", opt)
        plain(resumed, opt, 1, comm)
    assert [*map(bytes_of, model.parameters())] == [*map(bytes_of, resumed.parameters())]


def test_closing_does_not_wait_for_a_step(comm):
    """Gradients that only some ranks have are on their way; the parameters stay as they are."""
    model = Net()
    before = [bytes_of(param) for param in model.parameters()]
    with make(model, comm):
        if comm.rank:
            model.loss(0, comm.rank).backward()
    assert [bytes_of(param) for param in model.parameters()] == before


@pytest.mark.parametrize("accumulate", ["exact", "node"])
def test_groups_may_be_edited_between_steps(comm, accumulate):
    """Between backward and the step, too."""

    def train(settings):
        model = Net()
        first = [*model.layers[:2].parameters()]
        with NAdam(first, comm=comm, policy=policy(2, **settings)) as opt:
            plain(model, opt, 0, comm)
            model.zero_grad()
            model.loss(1, comm.rank).backward()
            opt.add_param_group({"params": [*model.layers[2:].parameters()]})
            opt.step()
            plain(model, opt, 2, comm)
            del opt.param_groups[0]["params"][0]
            plain(model, opt, 3, comm)
            return [bytes_of(param) for param in model.parameters()]

    assert train({**APART, "accumulate": accumulate}) == train(SMALL)


# -- accumulate="node" -----------------------------------------------------------------------------

BY_NODE = {**APART, "accumulate": "node"}


def clipped_after_several(model, opt, step, comm):
    opt.zero_grad()
    for micro in range(2 + comm.rank % 2):
        model.loss(step, comm.rank, micro).backward()
    opt.average_grads()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.step()


def not_zeroed(model, opt, step, comm):
    """Every step adds to the gradients of all steps before."""
    model.loss(step, comm.rank).backward()
    opt.step()


def own_behind_backward(model, opt, step, comm):
    """One more gradient is put there, for which backward has none."""
    plain(model, opt, step, comm)
    opt.zero_grad()
    model.loss(step, comm.rank).backward()
    model.unused.bias.grad = torch.full_like(model.unused.bias, comm.rank + 1.0)
    opt.step()


def own_in_the_place_of_averages(model, opt, step, comm):
    """What backward has computed counts no more, in this step and in the next."""
    model.loss(step, comm.rank).backward()
    weight, bias = model.layers[1].weight, model.layers[2].bias
    weight.grad = torch.full_like(weight, comm.rank + 0.5)
    if step == 0:
        bias.grad = None
    opt.step()


@pytest.mark.parametrize(
    "program",
    [
        one_node.unequal,
        clipped_after_several,
        not_zeroed,
        own_behind_backward,
        own_in_the_place_of_averages,
    ],
)
def test_sums_by_node_are_those_of_every_exchange(comm, program):
    """But for rounding; a plain backward has the same bits."""
    exact, by_node = (
        run(comm, program, 2, settings=each, max_grad_norm=0.5) for each in (APART, BY_NODE)
    )
    assert exact[1] == pytest.approx(by_node[1], rel=1e-12)
    for one, other in zip(exact[0], by_node[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    exact, by_node = (run(comm, plain, 2, settings=each)[0] for each in (APART, BY_NODE))
    assert [*map(bytes_of, exact)] == [*map(bytes_of, by_node)]


@one_node.needs_wide_grads
@pytest.mark.parametrize(("dtype", "settings"), one_node.SIXTEEN_BITS)
def test_sums_by_node_of_sixteen_bits_travel_in_float32(comm, dtype, settings):
    """A lone rank's gradients fit into 16 bits, and sums of several backwards do not."""
    settings = {key: value for key, value in settings.items() if key != "optim_bits"}
    (_, exact, one), (_, by_node, other) = (
        one_node.train_sixteen_bits(
            comm, 2, dtype, {**each, **settings}, num_micros=3, max_grad_norm=0.01
        )
        for each in (APART, BY_NODE)
    )
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    for ours, theirs in zip(exact, by_node, strict=True):
        ours, theirs = (
            torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (ours, theirs)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_sums_by_node_are_sent_once(comm):
    sent = {}
    for accumulate in ("exact", "node"):
        model = Net()
        with make(model, comm, accumulate=accumulate) as opt:
            plain(model, opt, 0, comm)
            once = comm.allreduce(opt.last_step.sent_nbytes)
            opt.zero_grad()
            for micro in range(3):
                model.loss(1, comm.rank, micro).backward()
            opt.step()
            sent[accumulate] = once, comm.allreduce(opt.last_step.sent_nbytes)
            rows = opt.memory_report().grads_node_nbytes
            assert (rows > 0) == (accumulate == "node")
    assert sent["node"] == (sent["exact"][0], sent["exact"][0])
    assert sent["exact"][1] > 1.5 * sent["exact"][0]  # gradients three times, parameters once


def test_where_sums_by_node_have_no_meaning(comm):
    with pytest.raises(HyperparamsError, match="accumulate must be exact with stage=1"):
        policy(1, accumulate="node")
    with pytest.raises(HyperparamsError, match="accumulate must be exact on one node"):
        NAdam(Net(), comm=comm, policy=policy(2, accumulate="node"))


# -- p.grad ----------------------------------------------------------------------------------------


def unscale(model, opt):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.unscale_(opt)


USES = [
    lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    lambda model, _: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
    unscale,
    lambda model, _: model.layers[0].weight.grad * 2,
    lambda model, _: model.layers[0].weight.grad.mul_(2),
    lambda model, _: model.layers[0].weight.grad[0, 0],
    lambda model, _: model.layers[0].weight.grad.numpy(),
    lambda model, _: model.layers[0].weight.grad.data,
    lambda model, _: model.layers[0].weight.grad.detach(),
    lambda model, _: model.layers[3].bias.grad.tolist(),
    lambda model, _: repr(model.layers[0].weight.grad),
    lambda model, _: model.zero_grad(set_to_none=False),
]


def test_every_use_of_a_gradient_raises_before_it_is_an_average(comm):
    model = Net()
    with make(model, comm) as opt:
        for step in range(2):
            model.loss(step, comm.rank).backward()
            weight = model.layers[0].weight
            assert weight.grad.shape == weight.shape
            for use in USES:
                with pytest.raises(CallOrderError, match="average_grads"):
                    use(model, opt)
            opt.step()
            opt.zero_grad()
        assert opt.last_step.num_updated == 8


def test_average_grads_shows_the_average_until_the_next_backward(comm):
    model = Net()
    with make(model, comm) as opt:
        weight = model.layers[1].weight
        own = [torch.autograd.grad(model.loss(0, rank), weight)[0] for rank in range(comm.size)]
        if comm.rank:
            model.loss(0, comm.rank).backward()
        opt.average_grads()
        average = sum(own[1:]) / comm.size
        torch.testing.assert_close(weight.grad + 0, average, rtol=1e-12, atol=1e-14)
        everyone = comm.allgather(weight.grad.numpy().tobytes())
        assert set(everyone) == {everyone[0]}
        weight.grad.mul_(0.5)
        halved = bytes_of(weight.grad + 0)
        opt.step()
        assert bytes_of(weight.grad + 0) == halved != everyone[0]
        model.loss(1, comm.rank).backward()  # adds to it
        with pytest.raises(CallOrderError, match="average_grads"):
            weight.grad.sum()
        opt.average_grads()
        more = [torch.autograd.grad(model.loss(1, rank), weight)[0] for rank in range(comm.size)]
        assert not torch.allclose(weight.grad + 0, sum(more) / comm.size)
        opt.step()


@pytest.mark.parametrize("accumulate", ["exact", "node"])
def test_clipped_averages_stay_so_after_the_step(comm, accumulate):
    """Averaged and clipped twice; the last rank looks at what it clips."""
    model = Net()
    with make(model, comm, accumulate=accumulate) as opt:
        for micro in range(2):
            model.loss(0, comm.rank, micro).backward()
        opt.average_grads()
        params = [*model.layers.parameters()]
        expected = [param.grad.clone() for param in params]
        if comm.rank == comm.size - 1:
            params[0].grad.numpy()
        for factor in (0.5, 0.3):
            for param, average in zip(params, expected, strict=True):
                param.grad.mul_(factor)
                average.mul_(factor)
            opt.average_grads()
        opt.step()
        for param, average in zip(params, expected, strict=True):
            assert bytes_of(param.grad + 0) == bytes_of(average)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("share", [True, False])
def test_grad_shows_what_this_rank_has(comm, stage, share):
    model = Net()
    with NAdam(model, comm=comm, policy=policy(stage, **{**SMALL, "share_node": share})) as opt:
        weight = model.layers[1].weight
        assert opt.grad(weight) is None
        own = [torch.autograd.grad(model.loss(0, rank), weight)[0] for rank in range(comm.size)]
        model.loss(0, comm.rank).backward()
        average = torch.stack(own).mean(0)
        if stage == 2 and not share:
            with pytest.raises(CallOrderError, match="average_grads"):
                opt.grad(weight)
        else:
            expected = own[comm.rank] if stage == 1 else average
            torch.testing.assert_close(torch.tensor(opt.grad(weight)), expected)
        opt.average_grads()
        shown = opt.grad(weight)
        torch.testing.assert_close(torch.tensor(shown), average)
        with pytest.raises(ValueError, match="read-only"):
            shown[0, 0] = 1.0
        assert opt.grad(model.unused.weight) is None
        with pytest.raises(PartitionError, match="a parameter of this optimizer"):
            opt.grad(torch.ones(1))


def test_gradients_of_an_optimizer_that_was_dropped_raise(comm):
    model = Net()
    opt = make(model, comm)
    plain(model, opt, 0, comm)
    del opt
    with pytest.raises(CallOrderError, match="average_grads"):
        model.layers[0].weight.grad.sum()


# -- what raises on all ranks, and what is refused -------------------------------------------------


def written_differently(model, opt, comm):
    model.loss(0, comm.rank).backward()
    opt.average_grads()
    model.layers[1].weight.grad[3, 4] = comm.rank


def written_before_another(model, opt, comm):
    model.loss(0, comm.rank).backward()
    opt.average_grads()
    model.layers[1].weight.grad.mul_(0.5)
    model.loss(1, comm.rank).backward()


def added_to_averages(model, opt, comm):
    model.loss(0, comm.rank).backward()
    opt.average_grads()
    model.loss(1, comm.rank).backward()


def put_beside_averages(model, opt, comm):
    model.loss(0, comm.rank).backward()
    opt.average_grads()
    model.unused.bias.grad = torch.ones_like(model.unused.bias)


def put_back(model, opt, comm):
    model.loss(0, comm.rank).backward()
    old = model.layers[1].weight.grad
    opt.zero_grad()
    model.layers[1].weight.grad = old


@pytest.mark.parametrize(
    ("mistake", "error", "match"),
    [
        (one_node.zeroed_on_one, RankMismatchError, "number of backward passes before zero_grad"),
        (one_node.scaled_differently, RankMismatchError, "loss_scale"),
        (one_node.removed_on_one, RankMismatchError, "replaced or removed"),
        (written_differently, RankMismatchError, r"gradient of 'layers.1.weight'"),
        (written_before_another, CallOrderError, r"that of 'layers.1.weight' was written"),
        (put_back, CallOrderError, "an earlier p.grad for 'layers.1.weight'"),
    ],
)
def test_mistakes_raise_on_all_ranks(comm, mistake, error, match):
    model = Net()
    with make(model, comm) as opt:
        mistake(model, opt, comm)
        before = [bytes_of(param) for param in model.parameters()]
        with pytest.raises(error, match=match):
            opt.step()
        assert [bytes_of(param) for param in model.parameters()] == before
        plain(model, opt, 2, comm)  # zero_grad() makes good for it
        assert opt.last_step.num_updated == 8


@pytest.mark.parametrize("call", one_node.OTHER_CALLS)
def test_ranks_that_make_other_calls_all_raise(comm, call):
    one_node.assert_other_calls_raise(comm, one_node.OTHER_CALLS[call], make)


def test_no_overlap_is_refused(comm):
    with pytest.raises(HyperparamsError, match="overlap=False on several nodes"):
        make(Net(), comm, overlap=False)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=one_node.needs_wide_grads)],
    ids=str,
)
def test_memory_is_what_the_report_says(comm, dtype):
    """No rank has a gradient as a whole before ``average_grads()``."""
    group = comm.Dup()
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512, dtype=dtype) for _ in "1234"))
    settings = {"bucket_nbytes": 96 << 14, "ring_nbytes": 3 << 20}  # 96 chunks, for 2 to 4 ranks
    with NAdam(layers, comm=group, policy=policy(2, share_node=False, **settings)) as opt:
        for _ in range(2):
            opt.zero_grad()
            layers(torch.ones(1, 512, dtype=dtype)).sum().backward()
            opt.step()
        report, nbytes = opt.memory_report(), 4 * opt.partition.numel
        taken = file_nbytes(opt, group)
        staging = max(comm.allgather(opt.core.parts.sync.reduction.staging_nbytes))
        sums = report.travel_node_nbytes - staging
        assert report.grads_node_nbytes == 0
        assert sums == pytest.approx(nbytes / comm.size, rel=0.02)
        assert taken == pytest.approx(
            report.node_nbytes - staging - report.late_node_nbytes, rel=0.02
        )
        opt.average_grads()
        assert file_nbytes(opt, group) == pytest.approx(taken + nbytes, rel=0.02)
        assert layers[0].weight.grad.dtype == torch.float32
    group.Free()


@pytest.mark.parametrize("mistake", [added_to_averages, put_beside_averages])
def test_sums_by_node_end_with_average_grads(comm, mistake):
    model = Net()
    with make(model, comm, accumulate="node") as opt:
        mistake(model, opt, comm)
        with pytest.raises(CallOrderError, match="average_grads"):
            opt.step()
        plain(model, opt, 2, comm)
        assert opt.last_step.num_updated == 8
