"""Moments of 8 bits, and bfloat16 without masters, as users of PyTorch see them."""

import copy
from weakref import ref

import pytest

pytest.importorskip("torch")

import torch

from shardopt import ShardPolicy
from shardopt.errors import CheckpointError
from shardopt.torch import NAdam
from tests.support.errors import refused

pytestmark = pytest.mark.mpi

POLICY = ShardPolicy(optim_bits=8)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 64)
        self.inner = torch.nn.Linear(64, 80)
        self.head = torch.nn.Linear(80, 100)

    def forward(self, tokens):
        return self.head(torch.tanh(self.inner(self.embedding(tokens))))


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Model().to(dtype)


def train(model, opt, steps):
    losses = []
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(100, (64,))
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens).float(), tokens)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


def bits_of(opt):
    return {p.spec.name: p.spec.form.optim_bits for p in opt.partition.params}


def test_embeddings_of_a_module_keep_32_bits(comm):
    model = make_model()
    expected = {"embedding.weight": 32, "inner.weight": 8, "inner.bias": 32}
    expected |= {"head.weight": 8, "head.bias": 32}
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        assert bits_of(opt) == expected
    with NAdam(model.named_parameters(), comm=comm, policy=POLICY) as opt:
        assert bits_of(opt) == expected | {"embedding.weight": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_that_with_all_bits(comm, dtype):
    losses = []
    for policy in None, ShardPolicy(optim_bits=8, master_weights=False):
        model = make_model(dtype)
        with NAdam(model, lr=1e-2, comm=comm, policy=policy) as opt:
            losses.append(train(model, opt, range(40)))
    assert losses[0][-1] < 1
    assert abs(losses[0][-1] - losses[1][-1]) < 0.1


def test_a_copied_state_goes_on_to_the_same_bits(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(2))
        state, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
        train(model, opt, range(2, 4))
        expected = copy.deepcopy(model.state_dict())
    model = make_model()
    model.load_state_dict(weights)
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        opt.load_state_dict(state)
        train(model, opt, range(2, 4))
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def write(tensor):
    tensor.zero_()


def write_through_data(tensor):
    tensor.data[3] += 1


def write_through_numpy(tensor):
    tensor.view(-1)[5:].numpy()[0] = 4


def give_other_memory(tensor):
    tensor.data = torch.ones_like(tensor)


def set_other_memory(tensor):
    tensor.set_(torch.ones_like(tensor))


def change_dtype(tensor):
    tensor.data = tensor.bfloat16()  # which NumPy does not know


WAYS = [write, write_through_data, write_through_numpy]
WAYS += [give_other_memory, set_other_memory, change_dtype]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("is_stale", [False, True])
def test_writes_into_a_copy_raise(comm, how, is_stale):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        shown = opt.state[model.inner.weight]["exp_avg"]
        if is_stale:
            train(model, opt, range(1, 3))
            assert opt.state[model.inner.weight]["exp_avg"] is not shown
        how(shown)
        with refused(comm, CheckpointError, "exp_avg of 'inner.weight' in opt.state must be assig"):
            opt.step()
        assert opt.state[model.inner.weight]["exp_avg"].abs().max() > 0
        train(model, opt, range(3, 4))


def test_a_copy_that_nobody_holds_any_more_is_looked_at_too(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        opt.state[model.head.weight]["exp_avg_sq"].fill_(1)
        with refused(comm, CheckpointError, "exp_avg_sq of 'head.weight'"):
            opt.step()


def test_a_copy_with_other_memory_and_the_same_values_is_not_a_write(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        for entry in opt.state.values():
            entry["exp_avg"].data = entry["exp_avg"].clone()
        train(model, opt, range(1, 2))


def test_a_write_into_one_of_many_copies_raises(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        state = opt.state_dict()
        state["state"][3]["exp_avg_sq"].mul_(2)
        with refused(comm, CheckpointError, "exp_avg_sq of 'head.weight'"):
            opt.load_state_dict(state)
        train(model, opt, range(1, 2))


def test_copies_that_were_looked_at_are_freed(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        shown = ref(opt.state[model.inner.weight]["exp_avg"])
        assert shown() is opt.state[model.inner.weight]["exp_avg"]
        train(model, opt, range(1, 2))
        assert shown() is None


def test_assigned_moments_hold(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        train(model, opt, range(1))
        entry = opt.state[model.inner.weight]
        entry["exp_avg_sq"] = entry["exp_avg_sq"] * 4
        expected = entry["exp_avg_sq"].clone()
        opt.zero_grad()
        (model.inner.weight.sum() * 0).backward()
        opt.step()
        found = opt.state[model.inner.weight]["exp_avg_sq"]
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=0.02, atol=0)
