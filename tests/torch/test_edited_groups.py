"""Edits of ``param_groups`` hold from the next step on, as in torch.optim.NAdam."""

import copy
import gc
import warnings
import weakref

import pytest

pytest.importorskip("torch")

import torch

from shardopt import ShardPolicy
from shardopt.errors import (
    CheckpointError,
    HyperparamsError,
    LostStateWarning,
    PartialStateWarning,
    PartitionError,
    RankMismatchError,
)
from shardopt.torch import NAdam
from tests.support.errors import POLICY, refused, warned
from tests.support.torch_models import assert_same, bytes_of, everything, params_of

pytestmark = pytest.mark.mpi

WAYS = [POLICY, ShardPolicy(share_node=False, timeout_s=20, bucket_nbytes=1)]
SHAPES = {"a": (5, 3), "b": (4,), "c": (6000,), "d": (), "e": (0, 2)}


def new(*shape, seed=7):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Parameter(torch.randn(shape))


class Twin:
    """Five parameters in two groups, which ours or torch's optimizer trains; the same on all."""

    def __init__(self, make, **settings):
        self.params = {n: new(*shape, seed=i) for i, (n, shape) in enumerate(SHAPES.items())}
        groups = [
            {"params": [self.params[name] for name in "abc"]},
            {"params": [self.params[name] for name in "de"], "lr": 0.1, "weight_decay": 0.1},
        ]
        self.opt = make(groups, lr=0.01, **settings)

    def __getitem__(self, name):
        return self.params[name]

    def __setitem__(self, name, param):
        self.params[name] = param

    def backward(self):
        sum((param * param).sum() for param in self.params.values()).backward()

    def step(self):
        self.opt.zero_grad()
        self.backward()
        self.opt.step()


def twins(comm, policy=POLICY, **settings):
    return Twin(NAdam, comm=comm, policy=policy, **settings), Twin(torch.optim.NAdam, **settings)


def append(t):
    t["f"] = new(7)
    t.opt.param_groups[1]["params"].append(t["f"])


def extend(t):
    t["f"], t["g"] = new(7), new(5000)
    t.opt.param_groups[0]["params"] += [t["f"], t["g"]]


def insert(t):
    t["f"] = new(7)
    t.opt.param_groups[0]["params"].insert(0, t["f"])


def remove(t):
    params = t.opt.param_groups[0]["params"]
    params[:] = [param for param in params if param is not t["b"]]


def replace(t):
    t["a"] = new(5, 3)
    t.opt.state.pop(t.opt.param_groups[0]["params"][0], None)
    t.opt.param_groups[0]["params"][0] = t["a"]


def replace_by_longer(t):
    t["c"] = torch.nn.Parameter(torch.cat([t["c"].detach(), torch.ones(100)]))
    t.opt.param_groups[0]["params"][2] = t["c"]


def empty(t):
    t.opt.param_groups[0]["params"] = []


def move(t):
    t.opt.param_groups[1]["params"].append(t.opt.param_groups[0]["params"].pop(1))


def reorder(t):
    t.opt.param_groups[0]["params"].reverse()


def reorder_groups(t):
    t.opt.param_groups.reverse()


def slice_as_tuple(t):
    t.opt.param_groups[0]["params"] = tuple(t.opt.param_groups[0]["params"][1:])


def pop_group(t):
    t.opt.param_groups.pop()


def delete_group(t):
    del t.opt.param_groups[0]


def append_group(t):
    t["f"] = new(7)
    t.opt.param_groups.append({**t.opt.param_groups[1], "params": [t["f"]], "lr": 0.5})


def assign(t):
    kept = t.opt.param_groups[:1]
    t.opt.param_groups = kept
    assert t.opt.param_groups is kept


def assign_copies(t):
    t.opt.param_groups = [copy.copy(group) for group in t.opt.param_groups]
    t.opt.param_groups[0]["lr"] = 0.3


def assign_edited_copies(t):
    t["f"] = new(7)
    groups = [dict(group) for group in t.opt.param_groups]
    groups[0]["params"] = [*groups[1]["params"], t["f"]]
    groups[1]["params"] = [t["c"], t["a"]]
    t.opt.param_groups = groups


def assign_nothing(t):
    t.opt.param_groups = []


EDITS = [
    append,
    extend,
    insert,
    remove,
    replace,
    replace_by_longer,
    empty,
    move,
    reorder,
    reorder_groups,
    slice_as_tuple,
    pop_group,
    delete_group,
    append_group,
    assign,
    assign_copies,
    assign_edited_copies,
    assign_nothing,
]


@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
@pytest.mark.parametrize(
    ("edit", "policy"),
    [
        *((edit, WAYS[0]) for edit in EDITS),
        *((edit, WAYS[1]) for edit in (extend, replace_by_longer, assign_edited_copies)),
    ],
)
def test_an_edit_does_what_it_does_in_torch(comm, edit, policy):
    both = twins(comm, policy)
    ours, theirs = both
    with ours.opt:
        for number in range(4):
            if number == 2:
                for twin in both:
                    edit(twin)
            for twin in both:
                twin.step()
            assert_same(ours.params.values(), theirs.params.values())
            assert_same(params_of(ours.opt), params_of(theirs.opt))
        for mine, other in zip(ours.opt.param_groups, theirs.opt.param_groups, strict=True):
            assert {key: mine[key] for key in ("lr", "weight_decay")} == {
                key: other[key] for key in ("lr", "weight_decay")
            }
        state = comm.bcast(ours.opt.gather_state_dict())["state"]
        theirs_state = [theirs.opt.state.get(param, {}) for param in params_of(theirs.opt)]
        assert sorted(state) == [i for i, entry in enumerate(theirs_state) if entry]
        for index, entry in state.items():
            assert_same(entry.values(), [theirs_state[index][key].to(entry[key]) for key in entry])


@pytest.mark.parametrize("policy", WAYS, ids=["one node", "nodes"])
@pytest.mark.parametrize("edit", [remove, assign_edited_copies])
def test_the_state_of_what_stays_keeps_its_bits(comm, edit, policy):
    ours, _ = twins(comm, policy)
    with ours.opt as opt:
        ours.step()
        ours.step()

        def states():
            entries = comm.bcast(opt.gather_state_dict())["state"]
            params = enumerate(params_of(opt))
            return {p: [bytes_of(v) for v in entries[i].values()] for i, p in params}

        before, values = states(), {p: bytes_of(p) for p in params_of(opt)}
        edit(ours)
        after = states()
        stays = before.keys() & after.keys()
        assert stays
        assert [after[p] for p in stays] == [before[p] for p in stays]
        assert [bytes_of(p) for p in stays] == [values[p] for p in stays]
        assert all(float(entry["step"]) == 2 for p, entry in opt.state.items() if p in stays)
        assert opt.last_step.step == 2


def test_what_leaves_belongs_to_its_user(comm):
    ours, _ = twins(comm)
    with ours.opt as opt:
        ours.step()
        ours.backward()  # gradients of values that others are going to have
        left, grad = ours["b"], ours["b"].grad.clone()
        with torch.no_grad():
            left += comm.rank  # each rank has its own, and that is nobody's business any more
        value = left.detach().clone()
        remove(ours)
        opt.step()
        assert torch.equal(left, value)
        assert torch.equal(left.grad, grad)
        assert left not in opt.state
        hooks = left._post_accumulate_grad_hooks
        assert not hooks
        with torch.no_grad():
            left.zero_()
            left.grad += 1
        ours.step()
        assert torch.equal(left, torch.zeros_like(left))
        assert comm.allgather(bytes_of(ours["a"])) == [bytes_of(ours["a"])] * comm.size


def test_a_parameter_that_left_is_kept_by_nobody(comm):
    ours, _ = twins(comm)
    with ours.opt as opt:
        ours.step()
        gone = [weakref.ref(ours.params.pop(name)) for name in "bde"]
        opt.param_groups[0]["params"].pop(1)
        opt.param_groups.pop()
        ours.step()
        gc.collect()
        assert [ref() for ref in gone] == [None] * 3


def test_a_module_that_left_is_kept_by_nobody(comm):
    model = torch.nn.Linear(3, 2)
    gone = [weakref.ref(param) for param in model.parameters()]
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        del model
        opt.param_groups[0]["params"] = [new(4)]
        opt.average_grads()
        gc.collect()
        assert [ref() for ref in gone] == [None] * 2


def densify(opt, group, extra):
    """Make the parameter of a group longer, as splatting codes do."""
    old = group["params"][0]
    stored = opt.state.get(old, None)
    if stored is not None:
        for key in ("exp_avg", "exp_avg_sq"):
            stored[key] = torch.cat((stored[key], torch.zeros_like(extra)), dim=0)
        del opt.state[old]
    group["params"][0] = torch.nn.Parameter(torch.cat((old.detach(), extra)).requires_grad_(True))
    if stored is not None:
        opt.state[group["params"][0]] = stored


def prune(opt, group, mask):
    """Leave out rows of the parameter of a group, as splatting codes do."""
    old = group["params"][0]
    stored = opt.state.get(old, None)
    if stored is not None:
        for key in ("exp_avg", "exp_avg_sq"):
            stored[key] = stored[key][mask]
        del opt.state[old]
    group["params"][0] = torch.nn.Parameter(old.detach()[mask].requires_grad_(True))
    if stored is not None:
        opt.state[group["params"][0]] = stored


class Splats:
    """Two parameters with as many rows, in a group each."""

    def __init__(self, make, **settings):
        pairs = (("xyz", (900, 3)), ("rgb", (900, 16)))
        groups = [{"params": [new(*shape)], "name": name} for name, shape in pairs]
        self.opt = make(groups, lr=0.05, **settings)

    def step(self):
        self.opt.zero_grad()
        sum((p * p).sum() for p in params_of(self.opt)).backward()
        self.opt.step()


def test_densifying_takes_the_state_along(comm):
    both = Splats(NAdam, comm=comm, policy=POLICY), Splats(torch.optim.NAdam)
    with both[0].opt:
        for number in range(8):
            for splats in both:
                for group in splats.opt.param_groups if number % 2 else ():
                    mask = torch.arange(len(group["params"][0])) % 5 != number % 5
                    prune(splats.opt, group, mask)
                    extra = new(300, *group["params"][0].shape[1:])
                    densify(splats.opt, group, extra.detach())
                splats.step()
            assert_same(*(params_of(splats.opt) for splats in both))
        for param, other in zip(*(params_of(splats.opt) for splats in both), strict=True):
            ours, theirs = both[0].opt.state[param], both[1].opt.state[other]
            assert_same(ours.values(), [theirs[key].to(ours[key]) for key in ours])


def test_state_of_the_same_shape_may_be_handed_on_as_it_is(comm):
    both = twins(comm)
    with both[0].opt:
        for number in range(5):
            for twin in both if number == 2 else ():
                old, twin["c"] = twin["c"], torch.nn.Parameter(twin["c"].detach() + 1)
                twin.opt.param_groups[0]["params"][2] = twin["c"]
                twin.opt.state[twin["c"]] = twin.opt.state.pop(old)
            for twin in both:
                twin.step()
            assert_same(*(params_of(twin.opt) for twin in both))


@pytest.mark.mpi(min_size=2)
def test_state_cannot_be_assigned_to_new_parameters_on_several_nodes(comm):
    ours, _ = twins(comm, WAYS[1])
    with ours.opt as opt:
        ours.step()
        before = comm.bcast(opt.gather_state_dict())
        params, stored = params_of(opt), dict(opt.state.pop(ours["a"]))
        opt.param_groups[0]["params"][0] = new(5, 3)
        opt.state[opt.param_groups[0]["params"][0]] = stored
        with refused(comm, CheckpointError, "opt.state of 'param0' must be left out", "load_state"):
            opt.step()
        assert all(p is q for p, q in zip(params_of(opt), params, strict=True))
        after = comm.bcast(opt.gather_state_dict())
        assert repr(after) == repr(before)  # the state that was popped along with it is back
        ours.step()


def refuse_shape(t):
    t.opt.param_groups[0]["params"][0] = new(9)
    t.opt.state[t.opt.param_groups[0]["params"][0]] = t.opt.state.pop(t["a"])


def refuse_twice(t):
    t.opt.param_groups[0]["params"].append(t["d"])


def refuse_kind(t):
    t.opt.param_groups[0]["params"].append(3)


def refuse_dtype(t):
    whole = torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    t.opt.param_groups[0]["params"].append(whole)


def refuse_set(t):
    t.opt.param_groups[0]["params"] = set(t.opt.param_groups[0]["params"])


def refuse_lr(t):
    t.opt.param_groups.append({"params": [new(3)], "lr": -1.0})


def refuse_capturable(t):
    t.opt.param_groups.append({"params": [new(3)], "capturable": True})


def refuse_no_group(t):
    t.opt.param_groups.append([new(3)])


def refuse_no_params(t):
    t.opt.param_groups[1] = {"lr": 0.1}


REFUSED = [
    (refuse_shape, CheckpointError, "exp_avg of 'param0' must have shape (9,)"),
    (refuse_twice, PartitionError, "each parameter must be listed once"),
    (refuse_kind, PartitionError, "params must hold tensors"),
    (refuse_dtype, PartitionError, "must be floating point"),
    (refuse_set, PartitionError, "params must be in order"),
    (refuse_lr, HyperparamsError, "lr must be"),
    (refuse_capturable, HyperparamsError, "capturable must be False"),
    (refuse_no_group, PartitionError, "a param group must be a dict"),
    (refuse_no_params, PartitionError, "a param group must be a dict"),
]


@pytest.mark.parametrize(
    ("edit", "error", "text", "alone"),
    [(*case, False) for case in REFUSED] + [(*case, True) for case in REFUSED[:2]],
)
def test_an_edit_that_is_refused_leaves_everything_as_it_was(comm, edit, error, text, alone):
    ours, _ = twins(comm)
    with ours.opt as opt:
        ours.step()
        groups = list(opt.param_groups)
        before, params, partition = everything(opt), params_of(opt), opt.partition
        if comm.rank == comm.size - 1 or not alone:
            edit(ours)
        ours.backward()
        with refused(comm, error, text, alone=alone):
            opt.step()
        opt.zero_grad()
        assert everything(opt) == before
        assert opt.partition is partition
        assert all(one is other for one, other in zip(opt.param_groups, groups, strict=True))
        assert all(one is other for one, other in zip(params_of(opt), params, strict=True))
        for param in params:
            param.grad = None
        ours.step()
        assert opt.last_step.step == 2
        assert all(float(entry["step"]) == 2 for entry in opt.state.values())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("policy", WAYS, ids=["one node", "nodes"])
def test_edits_must_be_the_same_on_all_ranks(comm, policy):
    ours, _ = twins(comm, policy)
    odd = comm.rank == comm.size - 1
    with ours.opt as opt:
        ours.step()
        params = params_of(opt)
        for one, other, what in (
            (remove, move, "the number of parameters must be the same"),
            (append, extend, "must be the same"),
            (move, reorder, "must be the same"),
            (replace, reorder, "must be the same"),
        ):
            kept = dict(ours.params)
            (other if odd else one)(ours)
            with pytest.raises(RankMismatchError) as caught:
                opt.step()
            assert what in str(caught.value)
            assert comm.allgather(str(caught.value)) == [str(caught.value)] * comm.size
            ours.params = kept
            assert all(p is q for p, q in zip(params_of(opt), params, strict=True))
            for param in params:
                param.grad = None
            ours.step()
        remove(ours)
        if odd:
            append(ours)
            opt.param_groups[1]["params"].pop()
        ours.step()
        assert len(params_of(opt)) == len(params) - 1


def test_many_edits_take_no_more_memory(comm):
    splats = Splats(NAdam, comm=comm, policy=POLICY)
    with splats.opt as opt:
        sizes = []
        splats.step()
        for _ in range(50):
            group = opt.param_groups[0]
            prune(opt, group, torch.arange(900) % 3 != 0)
            densify(opt, group, new(300, 3).detach())
            splats.step()
            arena = opt.core.parts.memory.arena
            nbytes = sum(chunk.shared.nbytes for chunk in arena.chunks)
            sizes.append((opt.partition.numel, len(opt.partition.regions), nbytes))
        assert sizes[-1] == sizes[5]
        assert len(opt.core.parts.memory.pieces) == 2 * len(opt.partition.regions)


def test_a_parameter_that_comes_back_starts_anew_and_says_so(comm):
    ours, _ = twins(comm)
    with ours.opt as opt:
        ours.step()
        params, left = opt.param_groups[0]["params"], ours["b"]
        remove(ours)
        ours.step()
        params.append(left)
        with warned(comm, LostStateWarning, "'param2' came back to param_groups and starts anew"):
            ours.step()
        assert float(opt.state[left]["step"]) == 1
        for take in (lambda: opt.state.pop(left), lambda: None):
            entry = copy.deepcopy(opt.state[left])
            take()
            params.pop()
            ours.step()
            params.append(left)
            opt.state[left] = entry
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ours.step()
            assert float(opt.state[left]["step"]) == float(entry["step"]) + 1
        opt.state.pop(left)
        params.pop()
        ours.step()
        params.append(left)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.step()  # it was to start anew


def test_state_dicts_show_edits_that_no_step_has_taken_over(comm):
    for policy in WAYS:
        both = twins(comm, policy)
        ours = both[0]
        with ours.opt as opt, warnings.catch_warnings():
            warnings.simplefilter("ignore", PartialStateWarning)
            for twin in both:
                twin.step()
                twin["f"] = new(7)
                twin.opt.param_groups[1]["params"].insert(0, twin["f"])
                twin.opt.state.pop(twin.opt.param_groups[0]["params"].pop(1))
                twin.opt.param_groups.reverse()
            shown, expected = (twin.opt.state_dict() for twin in both)
            assert len(opt.partition.params) == 5  # nothing has been taken over
            packed, torchs = shown["param_groups"], expected["param_groups"]
            assert [g["params"] for g in packed] == [g["params"] for g in torchs]
            assert [g["lr"] for g in packed] == [0.1, 0.01]
            assert shown["state"].keys() == expected["state"].keys()
            for index, entry in shown["state"].items():
                want = {3: ours["a"], 4: ours["c"], 1: ours["d"], 2: ours["e"]}[index]
                assert entry["step"] == 1
                if policy is POLICY:
                    assert entry["exp_avg"].shape == want.shape
            opt.state_dict()
            if policy is POLICY:
                opt.state[ours["f"]] = {"step": torch.tensor(1.0)}
                assert float(opt.state_dict()["state"][0]["step"]) == 1


def test_gradients_of_new_parameters_are_zeroed_before_they_are_taken_over(comm):
    for settings in ({}, {"set_to_none": False}):
        both = twins(comm)
        with both[0].opt:
            for twin in both:
                twin.step()
                append(twin)
                twin.backward()  # and then somebody changes their mind
                twin.opt.zero_grad(**settings)
                twin.backward()
                twin.opt.step()
            assert_same(*(params_of(twin.opt) for twin in both))


@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
def test_names_stay_with_their_parameters(comm):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "xyz"})
    with NAdam(model.named_parameters(), comm=comm, policy=POLICY) as opt:
        group = opt.param_groups[0]
        group["params"].pop(0)
        group["params"].append(new(3))
        opt.step()
        assert group["param_names"] == ["y.weight", "z.weight", "param2"]
        group["params"].insert(0, new(4))
        opt.step()
        assert group["param_names"] == ["param0", "y.weight", "z.weight", "param3"]
        group["params"][1], group["params"][2] = group["params"][2], new(5)
        group["param_names"][2] = "w"
        opt.step()
        assert group["param_names"] == ["param0", "z.weight", "w", "param3"]
        assert [param.spec.name for param in opt.partition.params] == group["param_names"]


def test_param_groups_must_be_a_list(comm):
    ours, _ = twins(comm)
    with ours.opt as opt:
        with pytest.raises(PartitionError, match="param_groups must be a list of dicts; got tuple"):
            opt.param_groups = ()
        ours.step()


def test_writes_before_an_edit_are_adopted_with_it(comm):
    both = twins(comm)
    ours, theirs = both
    with ours.opt as opt:
        for twin in both:
            twin.step()
            with torch.no_grad():
                twin["a"][1:] *= 2
                twin["c"].data = twin["c"].data + 1
            remove(twin)
            twin.step()
        opt.state[ours["a"]]["exp_avg"].mul_(3)
        opt.state[ours["c"]]["step"] += 4
        theirs.opt.state[theirs["a"]]["exp_avg"].mul_(3)
        theirs.opt.state[theirs["c"]]["step"] += 4
        for twin in both:
            append(twin)
            twin.opt.param_groups[0]["params"].reverse()
            twin.step()
            twin.step()
        assert_same(*(params_of(twin.opt) for twin in both))
