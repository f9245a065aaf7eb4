"""A small model of torch that has everything a checkpoint of the model must keep."""

import torch

from shardopt.torch import NAdam
from tests.support.errors import POLICY


class Counter(torch.nn.Module):
    """State that is no tensor, as torch's ``get_extra_state`` gives it."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def get_extra_state(self):
        return {"seen": self.seen, "last": torch.full((2,), float(self.seen), dtype=torch.bfloat16)}

    def set_extra_state(self, state):
        if state["seen"] < 0:
            raise ValueError("seen must not be negative")
        assert state["last"].dtype == torch.bfloat16
        self.seen = state["seen"]


class Net(torch.nn.Module):
    """Tied weights, BatchNorm, a frozen layer, buffers of several dtypes, and extra state."""

    def __init__(self, seed=0, width=6):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = torch.nn.Linear(width, 5, bias=False)
            self.norm = torch.nn.BatchNorm1d(5)
            self.frozen = torch.nn.Linear(5, 5).requires_grad_(False)
            self.head = torch.nn.Linear(5, width, bias=False)
            self.head.weight = torch.nn.Parameter(torch.randn(width, 5))
            self.tied = torch.nn.Linear(5, width, bias=False)
        self.tied.weight = self.head.weight
        self.counter = Counter()
        self.register_buffer("scale", torch.full((3,), 1.5 + seed, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)

    def forward(self, x):
        return self.tied(self.frozen(self.norm(self.embed(x)))) + self.head(self.embed(x))


def build(comm, seed=0, params=None, **settings):
    """The model, and an optimizer of what it trains, which is given no names of its own."""
    model = Net(seed)
    trained = (
        [p for p in model.parameters() if p.requires_grad] if params is None else params(model)
    )
    return model, NAdam(trained, lr=0.05, comm=comm, policy=POLICY, **settings)


def train(model, opt, num_steps=2, seed=0):
    """Take steps, alike on all ranks, in which everything changes that may."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        opt.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        opt.step()
        model.counter.seen += 1
        model.count += 1
        model.scale *= 1.25


def bits(model):
    """All that ``state_dict()`` has, and the buffers that it does not have, to be compared."""
    values = {**model.state_dict(), "scratch": model.scratch}
    return {
        name: (str(value.dtype), value.shape, value.tolist())
        if isinstance(value, torch.Tensor)
        else (value["seen"], value["last"].tolist())
        for name, value in values.items()
    }


def moments(opt):
    """Moments and step counts of this rank's node, to be compared."""
    state = opt.state_dict()["state"]
    return {i: [(k, torch.as_tensor(v).tolist()) for k, v in e.items()] for i, e in state.items()}
