"""Each feature in each stage trains as torch.optim.NAdam does on all batches, or is refused."""

import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.checkpoint import checkpoint

from shardopt.errors import CallOrderError, HyperparamsError
from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam
from tests.support.pairs import IN_BACKWARD, ROWS, STAGES
from tests.support.torch_models import loss_of, make_model

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:.*deprecated"),  # of torch, about itself
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph"),
]

NUM_STEPS, LR, CLIP = 3, 0.1, 0.05
PROGRAMS = {}


class Run:
    """A training of a small model on all ranks.

    Args:
        comm: The ranks.
        settings: Of the policy.
    """

    def __init__(self, comm, settings):
        self.comm, self.settings, self.model = comm, settings, make_model()
        self.averages = settings["stage"] > 1  # in p.grad after backward

    def optimizer(self, params=None, policy=(), **arguments):
        chosen = ShardPolicy(timeout_s=20, threads=1, **self.settings, **dict(policy))
        params = self.model if params is None else params
        return NAdam(params, lr=LR, comm=self.comm, policy=chosen, **arguments)

    def loss(self, step, micro=0, forward=None):
        return loss_of(forward or self.model, step + 100 * micro, self.comm.rank)

    def train(self, backward, before_step=None, **arguments):
        """Take steps."""
        with self.optimizer(**arguments) as opt:
            for step in range(NUM_STEPS):
                opt.zero_grad()
                backward(step)
                if before_step is not None:
                    before_step(opt, step)
                opt.step()


def program(feature, max_norm=None, micros=(0,), change=lambda grad: None):
    """Have a function train a run's model.

    Args:
        feature: The row of the table.
        max_norm: Of the average, to which it is clipped.
        micros: The batches of a step.
        change: Of an average, before the step.
    """

    def register(function):
        PROGRAMS[feature] = function, max_norm, micros, change
        return function

    return register


def expected(comm, max_norm, micros, change):
    """The parameters that torch.optim.NAdam gives, on the batches of all ranks."""
    model = make_model()
    opt = torch.optim.NAdam(model.parameters(), lr=LR)
    for step in range(NUM_STEPS):
        opt.zero_grad()
        for rank in range(comm.size):
            for micro in micros:
                (loss_of(model, step + 100 * micro, rank) / comm.size).backward()
        for param in model.parameters():
            change(param.grad)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
    return [*model.parameters()]


PAIRS = [(row, stage) for row in ROWS for stage in STAGES if row.has_program(stage)]


@pytest.mark.parametrize(
    ("row", "stage"), [pytest.param(*pair, id=f"{pair[0].feature}-{pair[1]}") for pair in PAIRS]
)
def test_each_pair_works_or_is_refused(comm, row, stage):
    function, *settings = PROGRAMS[row.feature]
    run = Run(comm, STAGES[stage])
    if row.is_refused(stage):
        name = "update_in_backward" if stage == IN_BACKWARD else "stage"
        with pytest.raises((HyperparamsError, CallOrderError), match=name):
            function(run)
        return
    function(run)
    for ours, theirs in zip(run.model.parameters(), expected(comm, *settings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


# -- clipping and scaling --------------------------------------------------------------------------


@program("`max_grad_norm`", max_norm=CLIP)
def clipped_by_the_optimizer(run):
    run.train(lambda step: run.loss(step).backward(), max_grad_norm=CLIP)


@program("`check_finite`")
def checked(run):
    with run.optimizer(policy={"check_finite": True}) as opt:
        for step in range(NUM_STEPS):
            opt.zero_grad()
            run.loss(step).backward()
            opt.step()
        before = [param.detach().clone() for param in run.model.parameters()]
        opt.zero_grad()
        (run.loss(3) * (float("inf") if run.comm.rank else 1.0)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        assert opt.last_step.skipped
        assert all(map(torch.equal, before, run.model.parameters()))


@program("`average_grads()`")
def averaged(run):
    run.train(lambda step: run.loss(step).backward(), lambda opt, step: opt.average_grads())


@program("`clip_grad_norm_`, also `foreach=True`", max_norm=CLIP)
def clipped_by_torch(run):
    def clip(opt, step):
        if not run.averages:
            opt.average_grads()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP, foreach=bool(step % 2))

    run.train(lambda step: run.loss(step).backward(), clip)


@program(
    "`clip_grad_value_`, masks, noise", change=lambda grad: grad.clamp_(-0.01, 0.01).add_(0.01)
)
def changed(run):
    def change(opt, step):
        if not run.averages:
            opt.average_grads()
        torch.nn.utils.clip_grad_value_(run.model.parameters(), 0.01)
        for param in run.model.parameters():
            param.grad += 0.01

    run.train(lambda step: run.loss(step).backward(), change)


@program("`GradScaler`", max_norm=CLIP)
def scaled(run):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    with run.optimizer() as opt:
        for step in range(NUM_STEPS):
            opt.zero_grad()
            scaler.scale(run.loss(step)).backward()
            if not run.averages:
                opt.average_grads()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
            scaler.step(opt)
            scaler.update()


# -- backward --------------------------------------------------------------------------------------


@program("`torch.compile`")
def compiled(run):
    torch._dynamo.reset()
    forward = torch.compile(run.model, backend="aot_eager")
    run.train(lambda step: run.loss(step, forward=forward).backward())


@program("compiled autograd")
def compiled_backward(run):
    def backward(step):
        loss = run.loss(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of how it captures the graph
            with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
                loss.backward()

    run.train(backward)


@program("several backwards in a step", micros=(0, 1, 2))
def accumulated(run):
    run.train(lambda step: [run.loss(step, micro).backward() for micro in range(3)])


def train_checkpointed(run, *, use_reentrant):
    def forward(x):
        for layer in run.model:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant)
        return x

    run.train(lambda step: run.loss(step, forward=forward).backward())


@program("checkpoints of activations, not reentrant")
def checkpointed(run):
    train_checkpointed(run, use_reentrant=False)


@program("checkpoints of activations, reentrant")
def checkpointed_by_another_backward(run):
    train_checkpointed(run, use_reentrant=True)


@program("`retain_graph`, to go backward twice", micros=(0, 0))
def retained(run):
    def backward(step):
        loss = run.loss(step)
        loss.backward(retain_graph=True)
        loss.backward()

    run.train(backward)


@program("`create_graph`")
def graph_created(run):
    run.train(lambda step: run.loss(step).backward(create_graph=True))


@program("`torch.autograd.grad` into `p.grad`")
def put_there(run):
    def backward(step):
        params = [*run.model.parameters()]
        for param, grad in zip(params, torch.autograd.grad(run.loss(step), params), strict=True):
            param.grad = grad

    run.train(backward)


@program("several optimizers in one backward")
def halved(run):
    first, *others = run.model.parameters()
    with run.optimizer([first]) as one, run.optimizer(others) as two:
        for step in range(NUM_STEPS):
            one.zero_grad()
            two.zero_grad()
            run.loss(step).backward()
            one.step()
            two.step()


@program("hooks of users, registered before and after")
def hooked(run):
    seen, weight = [], run.model[0].weight

    def see(param):
        with torch.enable_grad():
            own = torch.autograd.grad(run.loss(len(seen) // 2), param)[0]
        assert torch.equal(param.grad, own)
        seen.append(type(param.grad))

    weight.register_hook(lambda grad: grad.clone())
    weight.register_post_accumulate_grad_hook(see)
    with run.optimizer() as opt:
        weight.register_post_accumulate_grad_hook(see)
        for step in range(NUM_STEPS):
            opt.zero_grad()
            run.loss(step).backward()
            opt.step()
    assert seen == [torch.Tensor] * 2 * NUM_STEPS


# -- calls -----------------------------------------------------------------------------------------


@program("`zero_grad(set_to_none=False)`, `model.zero_grad()`")
def zeroed(run):
    with run.optimizer() as opt:
        for step in range(NUM_STEPS):
            run.model.zero_grad() if step % 2 else opt.zero_grad(set_to_none=False)
            run.loss(step).backward()
            opt.step()


@program("`model.zero_grad(set_to_none=False)`")
def zeroed_by_the_model(run):
    with run.optimizer() as opt:
        for step in range(NUM_STEPS):
            run.model.zero_grad(set_to_none=False)
            run.loss(step).backward()
            opt.step()


@program("closures")
def closed_over(run):
    with run.optimizer() as opt:
        for step in range(NUM_STEPS):

            def closure(step=step, opt=opt):
                opt.zero_grad()
                loss = run.loss(step)
                loss.backward()
                return loss

            assert torch.equal(opt.step(closure), run.loss(step)) is False


# -- where -----------------------------------------------------------------------------------------


@program("several nodes")
def on_nodes(run):
    run.train(lambda step: run.loss(step).backward(), policy={"share_node": False})
