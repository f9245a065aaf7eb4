"""Parameters that arrive while forward computes; ranks of one machine play several nodes.

Their pages cannot be touched before somebody waits for them; see ``tests.support.on_the_way``.
"""

import copy
import functools
import pickle

import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.comm.waiting import wait_briefly
from shardopt.errors import CallOrderError, HyperparamsError
from shardopt.overlap.ring import advance_all
from shardopt.transport import all_gather
from tests.support.frameworks import require
from tests.support.nodes import several_nodes
from tests.support.on_the_way import Guard

torch = require("torch")

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from shardopt.torch import AdamW, NAdam  # noqa: E402

pytestmark = pytest.mark.mpi(min_size=2)

WIDTH, WIDE = 64, 256
BUCKET_NBYTES = 20_000  # less than a layer
STAGES = pytest.mark.parametrize("stage", [1, 2])


class Model(nn.Module):
    """Tied weights, attention, modules called twice, recomputed, or never; and a list."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 50, bias=False)
        self.list = nn.ParameterList([torch.randn(WIDTH), torch.randn(WIDTH)])
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.recomputed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
        self.first = nn.Embedding(50, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, tokens):
        x = self.layer(self.first(tokens)) * self.list[0]
        x = self.twice(torch.tanh(self.twice(x)))
        x = checkpoint(self.recomputed, x, use_reentrant=False)
        return self.last(x + self.list[1])


class Job:
    """A model and its optimizer; ``guarded`` if parameters may be on their way."""

    def __init__(self, comm, share, *, prefetch=True, dtype=torch.float32, kind=NAdam, **settings):
        torch.manual_seed(0)
        self.comm = comm
        self.model = Model().to(dtype)
        policy = ShardPolicy(
            share_node=share,
            bucket_nbytes=BUCKET_NBYTES,
            timeout_s=30,
            prefetch_params=prefetch,
            **settings.pop("policy", {}),
        )
        self.opt = kind(self.model, lr=0.01, comm=comm, policy=policy, **settings)
        self.prefetch = self.opt.core.parts.prefetch
        if prefetch:
            Guard(self.opt)

    def tokens(self, seed):
        rng = np.random.default_rng([seed, self.comm.rank])
        return torch.from_numpy(rng.integers(0, 50, (2, 5)))

    def backward(self, seed):
        self.model(self.tokens(seed)).float().square().mean().backward()

    def train(self, *seeds):
        for seed in seeds:
            self.opt.zero_grad()
            self.backward(seed)
            self.opt.step()

    def bits(self):
        self.opt.wait_params()
        params = [param.detach().view(torch.uint8) for param in self.model.parameters()]
        return b"".join(param.numpy().tobytes() for param in params)

    def finish(self):
        bits = self.bits()
        self.opt.close()
        assert len(set(self.comm.allgather(bits))) == 1
        return bits


def train_alone(job):
    job.train(0, 1, 2)


def accumulate(job, steps=range(3)):
    for step in steps:
        job.opt.zero_grad()
        for part in range(2):
            job.backward(10 * step + part)
        job.opt.step()


def accumulate_and_evaluate(job):
    for step in range(3):
        accumulate(job, [step])
        with torch.no_grad():
            job.model.eval()(job.tokens(step))
        job.model.train()


BFLOAT16 = {"dtype": torch.bfloat16, "policy": {"wire_dtype": "bfloat16"}}
EIGHT_BITS = {"policy": {"optim_bits": 8}, "max_grad_norm": 0.1, "kind": AdamW}
WAYS = [
    (train_alone, {}),
    (train_alone, BFLOAT16),
    (train_alone, EIGHT_BITS),
    (accumulate_and_evaluate, {}),
]


def with_stage(settings, stage, **policy):
    """Return the settings of a job with more of its policy."""
    return {**settings, "policy": {**settings.get("policy", {}), "stage": stage, **policy}}


def sent_and_bits(comm, share, run, settings, *, prefetch):
    job = Job(comm, share, prefetch=prefetch, **copy.deepcopy(settings))
    run(job)
    if prefetch:
        assert job.prefetch._places  # what nobody has needed, at least
    return job.opt.last_step.sent_nbytes, job.finish()


def assert_bits_without_prefetch(comm, run, settings):
    for share in several_nodes(comm):
        alone, prefetched = (
            sent_and_bits(comm, share, run, settings, prefetch=prefetch)
            for prefetch in (False, True)
        )
        assert alone == prefetched


@pytest.mark.parametrize(("run", "settings"), WAYS)
def test_the_bits_are_those_without_prefetch(comm, run, settings):
    assert_bits_without_prefetch(comm, run, settings)


@pytest.mark.parametrize("settings", [{}, EIGHT_BITS])
def test_the_bits_of_stage_two_are_those_of_stage_one(comm, settings):
    for share in several_nodes(comm):
        (_, in_rows), alone, prefetched = (
            sent_and_bits(comm, share, train_alone, with_stage(settings, stage), prefetch=prefetch)
            for stage, prefetch in ((1, False), (2, False), (2, True))
        )
        assert alone == prefetched
        assert prefetched[1] == in_rows


@pytest.mark.parametrize("order", ["exact", "node"])
@pytest.mark.parametrize("settings", [{}, BFLOAT16])
def test_several_backwards_have_the_bits_without_prefetch(comm, settings, order):
    if "dtype" in settings and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch takes gradients of the parameter's dtype only")
    assert_bits_without_prefetch(comm, accumulate, with_stage(settings, 2, accumulate=order))


def test_gradients_are_exchanged_while_parameters_are_held_up(comm, monkeypatch):
    """Those that no forward needs wait on all ranks for the end of the next backward."""
    monkeypatch.setattr(all_gather, "_MAX_IN_TRANSIT", 1)
    for share in several_nodes(comm):
        results = []
        for is_held_up in (False, True):
            job = Job(comm, share, **with_stage({}, 2))
            job.train(0, 1)
            parts = job.opt.core.parts
            sync, ring, prefetch = parts.sync, parts.grads._ring, job.prefetch
            num_needed, advance = len(prefetch._order), sync.advance_params

            def advance_a_part(sync=sync, advance=advance, num_needed=num_needed):
                return advance() if sync.num_published < num_needed else 1

            def are_exchanged(ring=ring, reduction=sync.reduction):
                advance_all()
                return ring._summed == ring._base and reduction.is_idle

            job.opt.zero_grad()
            job.backward(2)
            if is_held_up:
                job.opt.wait_params()  # those of the step before
                sync.advance_params = advance_a_part
            job.opt.step()
            job.opt.zero_grad()
            job.backward(3)
            if is_held_up:
                assert wait_briefly(are_exchanged, 20)
                assert (
                    prefetch._thread.num_landed() == [num_needed] * job.opt.core.topology.node_size
                )
                comm.Barrier()  # all have looked
                sync.advance_params = advance
            assert prefetch._places
            job.opt.step()
            results.append(job.finish())
        assert results[0] == results[1]


def deepcopy_the_model(job, folder):
    copy.deepcopy(job.model)(job.tokens(0))  # its hooks wait for nothing


ENTRIES = {
    "wait_params": lambda job, folder: job.opt.wait_params(),
    "state": lambda job, folder: job.opt.state,
    "gather_state_dict": lambda job, folder: job.opt.gather_state_dict(),
    "load_state_dict": lambda job, folder: job.opt.load_state_dict(job.opt.gather_state_dict()),
    "save": lambda job, folder: save(folder, job.opt, model=job.model),
    "load": lambda job, folder: load(folder, job.opt, model=job.model),
    "adopt": lambda job, folder: job.opt.adopt(),
    "load_params": lambda job, folder: job.opt.load_params(dict(job.model.named_parameters())),
    "average_grads": lambda job, folder: job.opt.average_grads(),
    "model.state_dict": lambda job, folder: job.model.state_dict(),
    "state_dict of a part": lambda job, folder: job.model.twice.state_dict(),
    "model.load_state_dict": lambda job, folder: job.model.load_state_dict(job.model.state_dict()),
    "pickle": lambda job, folder: pickle.loads(pickle.dumps(job.model)),
    "deepcopy": deepcopy_the_model,
    "reset_state": lambda job, folder: job.opt.reset_state(),  # the next step waits
}


@STAGES
def test_whatever_looks_at_parameters_waits_for_them(comm, mpi_tmp_path, stage):
    share, settings = several_nodes(comm)[0], with_stage({}, stage)
    job, other = Job(comm, share, **settings), Job(comm, share, prefetch=False, **settings)
    for number, (name, entry) in enumerate(ENTRIES.items()):
        for each, folder in ((job, mpi_tmp_path / "prefetched"), (other, mpi_tmp_path / "not")):
            each.train(number)
            if each is job:
                each.opt.zero_grad()
                assert each.prefetch._places, name
            entry(each, folder)
            assert not getattr(each.prefetch, "_places", ()), name
        assert job.bits() == other.bits(), name
    job.opt.close()
    other.opt.close()


@STAGES
def test_groups_can_be_added_while_parameters_are_on_their_way(comm, stage):
    for share in several_nodes(comm):
        results = []
        for prefetch in (False, True):
            job = Job(comm, share, prefetch=prefetch, **with_stage({}, stage))
            job.train(0, 1)
            late = torch.nn.Parameter(torch.ones(5))
            job.opt.add_param_group({"params": [("late", late)]})
            job.train(2, 3)
            results.append(job.finish())
        assert results[0] == results[1]


@STAGES
def test_two_optimizers_for_parts_of_a_model(comm, stage):
    results = []
    for prefetch in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        share = several_nodes(comm)[0]
        policy = ShardPolicy(
            share_node=share, bucket_nbytes=1, prefetch_params=prefetch, stage=stage
        )
        opts = [NAdam(part, comm=comm, policy=policy) for part in model]
        if prefetch:
            for opt in opts:
                Guard(opt)
        for step in range(3):
            rng = np.random.default_rng([step, comm.rank])
            x = torch.from_numpy(rng.standard_normal((3, WIDTH), np.float32))
            for opt in opts:
                opt.zero_grad()
            model(x).square().mean().backward()
            for opt in opts if step < 2 else opts[::-1]:
                opt.step()
        for opt in opts:
            opt.close()
        results.append([param.detach().numpy().tobytes() for param in model.parameters()])
    assert results[0] == results[1]


class Plain(nn.Module):
    """Layers that are called in another order than they were made in, one maybe never."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(4))

    def forward(self, x, order=(2, 0, 1)):
        for index in order:
            x = self.layers[index](x)
        return x


def make_plain(comm, **policy):
    torch.manual_seed(0)
    model = Plain()
    share = several_nodes(comm)[-1]  # buckets differ from layers elsewhere
    policy = ShardPolicy(share_node=share, bucket_nbytes=1, prefetch_params=True, **policy)
    return model, NAdam(model, comm=comm, policy=policy)


def test_buckets_are_sent_in_the_order_of_the_last_forward_all_ranks_share(comm):
    model, opt = make_plain(comm)
    prefetch, partition = opt.core.parts.prefetch, opt.partition

    def sent_first():
        """The layers, in the order of the buckets that hold nothing but them."""
        layers = [i // 2 for i in range(8)]
        seen = {}
        for plan in prefetch.order():
            bucket = partition.buckets[plan.bucket]
            held = {layers[i] for i, _ in partition.params_in(bucket.region, bucket)}
            if len(held) == 1:
                seen.setdefault(*held, None)
        return list(seen)

    orders = []
    for order in [(2, 0, 1), (2, 0, 1), (3, 2, 1, 0), (0, 1) if comm.rank else (1, 0), (2,)]:
        opt.zero_grad()
        model(torch.ones(1, WIDE), order).sum().backward()
        opt.step()
        orders.append(sent_first())
    assert orders[0][:3] == [2, 0, 1]
    assert orders[2] == orders[3] == [3, 2, 1, 0]
    assert orders[4][0] == 2
    opt.close()


@STAGES
@pytest.mark.parametrize(
    ("found_by", "is_alone"),
    [("forward", False), ("step", False), ("step", True), ("average_grads", True)],
)
def test_a_write_to_a_parameter_on_its_way_is_taken_back_and_raises(
    comm, found_by, is_alone, stage
):
    results = []
    for writes in (False, True):
        (model, opt), x = make_plain(comm, stage=stage), torch.ones(1, WIDE)
        for step in range(4):
            opt.zero_grad()
            order = (2, 0, 1, 3) if step == 0 else (2, 0, 1)
            model(x + comm.rank, order).sum().backward()
            opt.step()
            if writes and step == 2:
                layer = 0 if found_by == "forward" else 3
                find = functools.partial(model, x) if layer == 0 else getattr(opt, found_by)
                if comm.rank == 0 or not is_alone:
                    with torch.no_grad():
                        model.layers[layer].weight.clamp_(-0.01, 0.01)
                with pytest.raises(CallOrderError, match=rf"a write to .*'layers.{layer}.weight'"):
                    find()
        with torch.no_grad():
            model(x, (3, 1))  # waits for most
            opt.wait_params()
            model.layers[1].weight.clamp_(-0.02, 0.02)  # this holds
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()
        assert opt.core.parts.prefetch._places == {}  # users have written
        results.append(b"".join(param.detach().numpy().tobytes() for param in model.parameters()))
        opt.close()
    assert len({*results, *comm.allgather(results[0])}) == 1


class Functional(nn.Module):
    """A layer of which the parameters are used, and that is not called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


@STAGES
def test_parameters_used_without_their_module_are_refused_before_anything_is_sent(comm, stage):
    model = Functional()
    policy = ShardPolicy(share_node=several_nodes(comm)[0], prefetch_params=True, stage=stage)
    opt = NAdam(model, comm=comm, policy=policy)
    (model if comm.rank else model.layer)(torch.ones(1, WIDTH)).sum().backward()
    with pytest.raises(HyperparamsError, match=r"got a gradient of 'layer.weight', whose module"):
        opt.step()
    opt.zero_grad()
    model.layer(torch.ones(1, WIDTH)).sum().backward()
    opt.step()
    opt.close()
