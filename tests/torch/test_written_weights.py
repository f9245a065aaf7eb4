"""Methods that write to weights between steps give what they give with a replica on each rank."""

import copy
import functools
import io

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.nn import Parameter

from shardopt import ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.errors import RankMismatchError
from shardopt.torch import NAdam
from tests.support.replicas import assert_equal_on_all_ranks, share
from tests.support.torch_models import Twins, assert_same, batch, make_model, params_of

__all__ = ["share"]  # fixture

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.filterwarnings("error::shardopt.errors.DivergedWarning"),
]

NUM_STEPS = 14


def twins_of(comm, share, model=make_model, **settings):
    settings.setdefault("lr", 0.05)
    policy = ShardPolicy(share_node=share, bucket_nbytes=200, timeout_s=20)
    return Twins(comm, model, policy=policy, **settings)


def assert_alike(twins):
    """All ranks must read the same bytes, and those be what replicas have."""
    assert_equal_on_all_ranks(
        twins.comm, [param.detach().numpy() for param in twins.ours.parameters()]
    )
    assert_same(twins.ours.parameters(), twins.whole.parameters(), rtol=1e-9, atol=1e-11)


# -- methods that write after a step ---------------------------------------------------------------


def clamp(model, step, kept):
    for param in model.parameters():
        param.clamp_(-0.2, 0.2)


def clamp_data(model, step, kept):
    for param in model.parameters():
        param.data.clamp_(-0.2, 0.2)


def clip_in_numpy(model, step, kept):
    for param in model.parameters():
        array = param.detach().numpy()
        np.clip(array, -0.2, 0.2, out=array)


def prune(model, step, kept):
    for index, param in enumerate(model.parameters()):
        if step == 1:
            generator = torch.Generator().manual_seed(index)
            kept[index] = torch.rand(param.shape, generator=generator) < 0.7
        if step >= 1:
            param.mul_(kept[index])


def look_ahead(model, step, kept):
    """Slow weights go half of the way of the fast ones every third step, and are copied back."""
    for index, param in enumerate(model.parameters()):
        slow = kept.setdefault(index, param.clone())
        if step % 3 == 2:
            param.copy_(slow.lerp_(param, 0.5))


def normalise_spectrum(model, step, kept):
    for param in model.parameters():
        if param.ndim == 2:
            param.div_(torch.linalg.matrix_norm(param, 2).clamp(min=1.0))


def add_noise(model, step, kept):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.add_(torch.randn(param.shape, generator=generator), alpha=0.01)


def merge_adapters(model, step, kept):
    """Add a product of two small matrices for an evaluation, and take it away again."""
    weight = model[0].weight
    generator = torch.Generator().manual_seed(3)
    low, high = (torch.randn(n, 2, generator=generator) for n in weight.shape)
    delta = low @ high.t() * 0.1
    weight.add_(delta)
    model(torch.ones(1, weight.shape[1]))
    if step % 2:
        weight.sub_(delta)


def swap_average(model, step, kept):
    """Evaluate an average of weights in their place, and put them back."""
    average = kept.setdefault("average", copy.deepcopy(model))
    for of_average, param in zip(average.parameters(), model.parameters(), strict=True):
        of_average.lerp_(param, 0.3)
    for of_average, param in zip(average.parameters(), model.parameters(), strict=True):
        value = param.clone()
        param.copy_(of_average)
        of_average.copy_(value)
    if step % 5 < 4:  # else training goes on from the average
        for of_average, param in zip(average.parameters(), model.parameters(), strict=True):
            value = param.clone()
            param.copy_(of_average)
            of_average.copy_(value)


def find_rate(model, step, kept):
    """Go back to the weights of the start, as after trying learning rates."""
    if step == 0:
        kept["start"] = copy.deepcopy(model.state_dict())
    elif step in (4, 5):
        model.load_state_dict(kept["start"])


def reinitialise(model, step, kept):
    if step == 2:
        torch.manual_seed(11)
        for param in model.parameters():
            torch.nn.init.normal_(param, std=0.2)


METHODS = [
    clamp,
    clamp_data,
    clip_in_numpy,
    prune,
    look_ahead,
    normalise_spectrum,
    add_noise,
    merge_adapters,
    swap_average,
    find_rate,
    reinitialise,
]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_writes_after_steps(comm, share, method):
    with twins_of(comm, share) as twins:
        kept = {}, {}
        for step in range(NUM_STEPS):
            twins.step()
            assert_alike(twins)
            with torch.no_grad():
                for model, own in zip(twins.models, kept, strict=True):
                    method(model, step, own)
        assert_same(twins.ours.parameters(), twins.whole.parameters(), rtol=1e-9, atol=1e-11)
        twins.step()
        assert_alike(twins)


# -- between backward and step ---------------------------------------------------------------------


def climb(params):
    """Go a little in the direction of the gradient, as SAM does, and return the weights before."""
    norm = torch.stack([param.grad.norm() for param in params]).norm()
    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param in params:
            param.add_(param.grad, alpha=0.05 / float(norm))
    return before


def put_back(params, before):
    with torch.no_grad():
        for param, value in zip(params, before, strict=True):
            param.copy_(value)


def gradients(twins, model, step, rank):
    """The gradients of a rank's batch, which SAM takes where it has climbed to."""
    params = list(model.parameters())
    for param in params:
        param.grad = None
    twins.loss(model, step, rank).backward()
    before = climb(params)
    for param in params:
        param.grad = None
    twins.loss(model, step, rank).backward()
    put_back(params, before)
    return [param.grad.clone() for param in params]


def test_sharpness_aware_minimisation(comm, share):
    """Each rank climbs on its own batch, so that views differ between ranks for a while."""
    with twins_of(comm, share) as twins:
        for step in range(NUM_STEPS):
            gradients(twins, twins.ours, step, comm.rank)
            each = [gradients(twins, twins.whole, step, rank) for rank in range(comm.size)]
            for param, grads in zip(twins.whole.parameters(), zip(*each, strict=True), strict=True):
                param.grad = sum(grads) / comm.size
            for opt in twins.both:
                opt.step()
            assert_alike(twins)


# -- adapters and frozen weights -------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """A frozen matrix, and two small ones that are trained in its place."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator)
        self.weight = Parameter(draw(3, 5), requires_grad=False)
        self.low, self.high = Parameter(draw(3, 2) * 0.1), Parameter(draw(2, 5) * 0.1)
        self.scale = Parameter(torch.tensor(1.0))
        self.empty = Parameter(torch.zeros(0, 2))

    def forward(self, inputs):
        return inputs @ (self.weight + self.low @ self.high).t() * self.scale

    def merge(self):
        with torch.no_grad():
            self.weight += self.low @ self.high
            self.low.zero_()


def test_adapters_are_merged_into_frozen_weights(comm, share):
    with twins_of(comm, share, Adapted) as twins:
        for step in range(9):
            twins.step()
            assert_alike(twins)
            if step % 3 == 1:
                for model in twins.models:
                    model.merge()
            if step == 4:  # without a gradient in this step
                for model in twins.models:
                    model.scale.requires_grad_(False)
                    model.scale.data.fill_(0.5)
        assert not twins.ours.weight.requires_grad


# -- ways to write ---------------------------------------------------------------------------------


def set_through_data(param):
    param.data[...] = 0.5


def set_through_numpy(param):
    param.detach().numpy()[...] = 0.5


def set_by_copy(param):
    with torch.no_grad():
        param.copy_(torch.full_like(param, 0.5))


def set_by_reading(param):
    array = param.detach().numpy()
    io.BytesIO(np.full_like(array, 0.5).tobytes()).readinto(memoryview(array).cast("B"))


def set_by_init(param):
    torch.nn.init.constant_(param, 0.5)


def set_in_inference_mode(param):
    with torch.inference_mode():
        param.detach().fill_(0.5)


WAYS = [
    set_through_data,
    set_through_numpy,
    set_by_copy,
    set_by_reading,
    set_by_init,
    set_in_inference_mode,
]


@pytest.mark.parametrize("set_to", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ways_to_write(comm, share, set_to, dtype):
    if set_to is set_through_numpy and dtype is torch.bfloat16:
        dtype = torch.float64
    if set_to is set_by_reading and dtype is torch.bfloat16:
        dtype = torch.float64  # NumPy lacks it
    param = Parameter(torch.ones(1000, dtype=dtype))
    policy = ShardPolicy(share_node=share, bucket_nbytes=500, timeout_s=20)
    with NAdam([param], lr=2**-6, comm=comm, policy=policy) as opt:
        for _ in range(2):
            set_to(param)
            param.grad = None
            param.sum().backward()
            opt.step()
            assert (param < 0.5).all()
            assert (param > 0.4).all()
            assert len(set(param.tolist())) == 1
            assert_equal_on_all_ranks(comm, [param.detach().double().numpy()])


def test_a_state_dict_loaded_before_the_first_step(comm, share):
    with twins_of(comm, share) as twins:
        for model in twins.models:
            model.load_state_dict(make_model(seed=5).state_dict())
        for _ in range(3):
            twins.step()
            assert_alike(twins)


def test_weights_written_before_a_save_are_saved(comm, share, mpi_tmp_path):
    with twins_of(comm, share) as twins, twins_of(comm, share) as other:
        twins.step()
        for model in twins.models:
            with torch.no_grad():
                add_noise(model, 0, {})
        save(mpi_tmp_path / "saved", twins.opt)
        load(mpi_tmp_path / "saved", other.opt)
        assert_same(other.ours.parameters(), twins.whole.parameters())
        assert_alike(twins)


def test_batch_norms_buffers_may_differ_between_ranks(comm, share):
    """They are no parameters: each rank has its own, as in DDP without broadcast_buffers."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    with NAdam(
        model.parameters(), comm=comm, policy=ShardPolicy(share_node=share, timeout_s=20)
    ) as opt:
        for step in range(3):
            opt.zero_grad()
            model(batch(step, comm.rank)[0]).square().sum().backward()
            opt.step()
        assert_equal_on_all_ranks(comm, [param.detach().numpy() for param in model.parameters()])


# -- what only some ranks write --------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_an_embedding_with_max_norm_is_refused_with_the_remedy(comm, share):
    torch.manual_seed(0)
    model = torch.nn.Embedding(20 * comm.size, 4, max_norm=0.1)
    policy = ShardPolicy(share_node=share, bucket_nbytes=200, timeout_s=20)
    with NAdam(model.parameters(), comm=comm, policy=policy) as opt:
        out = model(torch.tensor([5 * comm.rank])) if comm.rank else model.weight[:1]
        out.sum().backward()
        with pytest.raises(RankMismatchError, match=r"Embedding\(max_norm"):
            opt.step()
        opt.adopt(0)
        opt.step()
        assert_equal_on_all_ranks(comm, [model.weight.detach().numpy()])


@pytest.mark.mpi(min_size=2)
def test_averages_may_be_swapped_in_for_an_evaluation_on_one_rank(comm, share):
    with twins_of(comm, share) as twins:
        averages = [torch.optim.swa_utils.AveragedModel(model) for model in twins.models]
        for _ in range(NUM_STEPS):
            twins.step()
            for average, model in zip(averages, twins.models, strict=True):
                average.update_parameters(model)
            if comm.rank == 0:
                params, of_average = params_of(twins.opt), list(averages[0].module.parameters())
                kept = [param.detach().clone() for param in params]
                put_back(params, of_average)
                assert_same(params, of_average)
                put_back(params, kept)
            assert_alike(twins)
