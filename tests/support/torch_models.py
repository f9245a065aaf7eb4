"""What the tests of the PyTorch face share: one model twice, sharded and in torch's own hands."""

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import shardopt.torch
from tests.support.errors import POLICY

torch.set_num_threads(1)


def make_model(seed=0):
    """Three layers, in the default dtype; the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 6), torch.nn.Linear(6, 3)
        )


def batch(step, rank, rows=4):
    """Inputs and targets that every rank can make for any other."""
    rng = np.random.default_rng([step, rank])
    dtype = torch.get_default_dtype()
    inputs, targets = rng.standard_normal((rows, 5)), rng.standard_normal((rows, 3))
    return torch.tensor(inputs, dtype=dtype), torch.tensor(targets, dtype=dtype)


def loss_of(model, step, rank):
    """The mean squared error on a rank's batch."""
    inputs, targets = batch(step, rank)
    return torch.nn.functional.mse_loss(model(inputs), targets)


class Twins:
    """One model over all ranks, a batch on each, and the same whole with all of the batches.

    Args:
        comm: The ranks.
        model: Makes the model, or anything that ``loss`` and ``params`` understand.
        params: What of the model to optimize.
        loss: Of (model, step, rank) the loss; None where it does not reach the model.
        policy: Of the sharded one.
        name: Of both optimizers.
        **settings: Of both optimizers.
    """

    def __init__(
        self,
        comm,
        model=make_model,
        params=lambda model: model.parameters(),
        loss=loss_of,
        policy=POLICY,
        name="NAdam",
        **settings,
    ):
        self.comm, self.loss = comm, loss
        self.ours, self.whole = model(), model()
        ours, whole = getattr(shardopt.torch, name), getattr(torch.optim, name)
        self.opt = ours(params(self.ours), comm=comm, policy=policy, **settings)
        self.whole_opt = whole(params(self.whole), **settings)
        self.steps = itertools.count()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.opt.__exit__(*error)

    @property
    def both(self):
        """The two optimizers, for what is to be done to both."""
        return self.opt, self.whole_opt

    @property
    def models(self):
        """The two models, likewise."""
        return self.ours, self.whole

    def backward(self, step=None):
        """Add the gradients of one batch from each rank."""
        step = next(self.steps) if step is None else step
        loss = self.loss(self.ours, step, self.comm.rank)
        if loss is not None:
            loss.backward()
        for rank in range(self.comm.size):
            loss = self.loss(self.whole, step, rank)
            if loss is not None:
                (loss / self.comm.size).backward()

    def step(self, zero_grad=True, **settings):
        """One step of both."""
        for opt in self.both if zero_grad else ():
            opt.zero_grad(**settings)
        self.backward()
        for opt in self.both:
            opt.step()

    def assert_same(self, rtol=1e-11, atol=1e-13):
        """All parameters must agree; what Adam divides by may be as small as eps."""
        assert_same(params_of(self.opt), params_of(self.whole_opt), rtol=rtol, atol=atol)


def params_of(opt):
    """All parameters in order."""
    return [param for group in opt.param_groups for param in group["params"]]


def assert_same(actual, expected, rtol=1e-11, atol=1e-13):
    """Two sequences of tensors must agree."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol, msg=lambda text, index=index: f"{index}: {text}"
        )


def everything(opt):
    """Parameters, state and groups of an optimizer, to be compared bit by bit."""
    state = opt.state_dict()
    entries = [
        bytes_of(value) if isinstance(value, torch.Tensor) else repr(value)
        for entry in state["state"].values()
        for value in entry.values()
    ]
    params = [bytes_of(param) for param in params_of(opt)]
    return [*params, *entries, repr(state["param_groups"])]


def bytes_of(tensor):
    """The bytes of a tensor's elements in order."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).numpy().tobytes()


def raised_everywhere(comm, error, text, call):
    """Every rank must raise ``error`` in the same words, ``text`` among them."""
    with pytest.raises(error) as caught:
        call()
    told = str(caught.value)
    assert comm.allgather(told) == [told] * comm.size
    assert text in told
