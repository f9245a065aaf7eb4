"""What the tests of stage 2 share: a model that uses layers in many ways, and programs of a step.

A program is called with the model, its optimizer, the number of the step, and the ranks.
"""

import pytest

pytest.importorskip("torch")

import torch

SIZES = [(40, 120), (120, 80), (80, 60), (60, 3)]
NUM_STEPS = 3
SMALL = {"bucket_nbytes": 1, "ring_nbytes": 1}  # a chunk in each bucket, two buckets of each rank


class Net(torch.nn.Module):
    """Layers, one of them used twice, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in SIZES)
            self.unused = torch.nn.Linear(70, 70)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x + self.layers[-1](x.new_ones(60)) * 0.1

    def batch(self, step, rank, micro=0):
        generator = torch.Generator().manual_seed(step + 10 * rank + 100 * micro)
        return torch.randn(6, 40, generator=generator).to(self.unused.weight.dtype)

    def loss(self, step, rank, micro=0):
        return self(self.batch(step, rank, micro)).square().mean()


class Break(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError


def plain(model, opt, step, comm):
    opt.zero_grad()
    model.loss(step, comm.rank).backward()
    opt.step()


def no_batch_on_the_last(model, opt, step, comm):
    opt.zero_grad()
    if comm.rank < comm.size - 1 or step == 1:
        model.loss(step, comm.rank).backward()
    opt.step()


def held_up(model, opt, step, comm):
    """The last rank does not begin before all others have ended their backward."""
    last = comm.size - 1
    opt.zero_grad()
    if comm.rank == last:
        for rank in range(last):
            comm.recv(source=rank)
    model.loss(step, comm.rank).backward()
    if comm.rank != last:
        comm.send(None, last)
    opt.step()
