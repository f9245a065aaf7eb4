"""Updates made in backward on any nodes have the bits of stage 1, and all ranks raise, or none."""

import functools

import pytest

pytest.importorskip("torch")

import torch

from shardopt.checkpoint import load, save
from shardopt.errors import CallOrderError, CheckpointError, RankMismatchError
from shardopt.torch import NAdam
from tests.core.test_kept_sums import file_nbytes
from tests.support.nodes import several_nodes, ways_to_the_same_bits
from tests.support.stage_two import SMALL, Net, held_up, no_batch_on_the_last, plain
from tests.torch import test_update_in_backward as one_node
from tests.torch.test_update_in_backward import assert_same_bits, policy, raw, train

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore::shardopt.errors.PartialStateWarning"),
]


def values(model):
    return [raw(param.detach()) for param in model.parameters()]


def make(model, comm, share=False, **settings):
    return NAdam(model, lr=1e-2, comm=comm, policy=policy(share_node=share, **SMALL, **settings))


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def opt(comm, model):
    with make(model, comm) as opt:
        yield opt


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program", [no_batch_on_the_last, one_node.other_branches, one_node.alternating]
)
def test_bits_are_those_of_stage_one(comm, program):
    """In some steps the last rank has no batch, and branches differ between ranks and nodes."""
    for share in several_nodes(comm):
        assert_same_bits(comm, program, torch.float32, share_node=share, **SMALL)


@pytest.mark.parametrize("program", [one_node.late_everywhere, one_node.own_tensors])
def test_other_programs(comm, program):
    assert_same_bits(comm, program, share_node=False, **SMALL)


@pytest.mark.any_mpi  # arithmetic
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float64, {}),
        (torch.float32, {"wire_dtype": "bfloat16"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"optim_bits": 8, "master_weights": False}),
    ],
)
def test_other_states_and_wires(comm, dtype, settings):
    for share in several_nodes(comm):
        assert_same_bits(comm, plain, dtype, share_node=share, bucket_nbytes=1, **settings)


def test_nobody_updates_before_all_nodes_have_their_gradients(comm):
    """The last rank does not begin before all others have ended their backward."""

    def looking(model, opt, step, comm):
        before = values(model)

        class Looking:
            """The ranks, where all but the last look at their weights before they let it go on."""

            rank, size, recv = comm.rank, comm.size, staticmethod(comm.recv)

            @staticmethod
            def send(message, dest):
                assert values(model) == before
                comm.send(message, dest)

        held_up(model, opt, step, Looking)
        assert opt.last_step.late_nbytes > 0 or comm.rank == comm.size - 1

    for share in several_nodes(comm):
        ours = train(comm, looking, policy(share_node=share, **SMALL))
        assert ours == train(comm, plain, policy(in_backward=False, share_node=share, **SMALL))


# -- what raises -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "test",
    [
        one_node.test_rates_that_differ_raise,
        one_node.test_weights_must_not_be_written_before_a_backward,
        one_node.test_a_backward_before_zero_grad_raises,
        functools.partial(
            one_node.test_backwards_that_are_refused,
            program=one_node.second_backward,
            refused="second backward",
        ),
        functools.partial(
            one_node.test_edited_groups_are_refused_by_the_next_backward,
            when="before",
            is_alone=True,
        ),
    ],
    ids=["rates", "writes", "no zero_grad", "second backward", "edited groups"],
)
def test_what_raises_on_one_node_raises_on_several(comm, model, opt, test):
    test(comm, model, opt)


def test_a_gradient_behind_backward_raises(comm):
    """One rank has not reached a layer that the others have updated, and has its gradient later."""
    for share in several_nodes(comm):
        model = Net()
        with make(model, comm, share) as opt:
            opt.zero_grad()
            order = range(3) if comm.rank == 0 else range(4)
            inputs = [torch.ones(layer.in_features) * 0.1 for layer in model.layers]
            sum(model.layers[i](inputs[i]).square().sum() for i in order).backward()
            if comm.rank == 0:
                bias = model.layers[3].bias
                bias.grad = torch.ones_like(bias)
            with pytest.raises(CallOrderError, match=r"after backward .* for 'layers.3.bias'"):
                opt.step()
            with pytest.raises(CheckpointError, match="state that is whole"):
                opt.state_dict()
            everyone = comm.allgather(values(model))
            assert all(each == everyone[0] for each in everyone)


def test_a_backward_that_raises_on_one_rank(comm, mpi_tmp_path):
    """All raise, all nodes have updated the same, and a checkpoint makes the state whole again."""
    for share in several_nodes(comm):
        results, folder = [], mpi_tmp_path / str(share)
        for breaks in (True, False):
            model = Net()
            with make(model, comm, share) as opt:
                plain(model, opt, 0, comm)
                if breaks:
                    save(folder, opt)
                    before = values(model)
                    one_node.break_on_the_first(model, opt, comm)
                    everyone = comm.allgather(values(model))
                    assert all(each == everyone[0] for each in everyone)
                    assert before != everyone[0]
                    for refused in (opt.state_dict, opt.step):
                        with pytest.raises(CheckpointError, match="state that is whole"):
                            refused()
                    load(folder, opt)
                plain(model, opt, 1, comm)
                results.append(values(model))
        assert results[0] == results[1]


def test_ranks_that_make_other_calls_all_raise(comm):
    """And may go on with the step."""
    results = []
    for is_mistaken in (False, True):
        model = Net()
        with make(model, comm) as opt:
            opt.zero_grad()
            model.loss(0, comm.rank).backward()
            if is_mistaken:
                call = opt.step if comm.rank else lambda opt=opt: opt.sum_over_ranks([1.0])
                with pytest.raises(RankMismatchError, match="the call must be the same"):
                    call()
            opt.step()
            plain(model, opt, 1, comm)
        results.append(values(model))
    assert results[0] == results[1]


# -- checkpoints and memory ------------------------------------------------------------------------


def test_training_goes_on_from_a_checkpoint_on_any_nodes(comm, mpi_tmp_path):
    for saving in several_nodes(comm):
        results, folder = [], mpi_tmp_path / str(saving)
        for loading in (None, *ways_to_the_same_bits(comm)):
            model = Net()
            with make(model, comm, saving if loading is None else loading) as opt:
                if loading is None:
                    plain(model, opt, 0, comm)
                    save(folder, opt)
                else:
                    plain(model, opt, 2, comm)  # of which nothing is left
                    load(folder, opt)
                plain(model, opt, 1, comm)
            results.append(values(model))
        assert all(each == results[0] for each in results)


def test_memory_is_what_the_report_says(comm):
    """No node has sums, averages or gradients, apart from the ring and what is in transit."""
    for share in several_nodes(comm):
        group = comm.Dup()  # whose optimizer has an arena of its own
        layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in "1234")).float()
        chosen = policy(share_node=share, bucket_nbytes=96 << 14, ring_nbytes=3 << 20)
        with NAdam(layers, comm=group, policy=chosen) as opt:
            for _ in range(2):
                opt.zero_grad()
                layers(torch.ones(1, 512)).sum().backward()
                opt.step()
            report, topology = opt.memory_report(), opt.core.topology
            staging = opt.core.parts.sync.reduction.staging_nbytes
            node_staging = max(comm.allgather(topology.node_comm.allreduce(staging)))
            assert report.grads_node_nbytes == 0
            assert report.travel_node_nbytes == node_staging
            taken = file_nbytes(opt, topology.node_comm)
            kept = 4 + 8 / topology.num_nodes
            assert taken == pytest.approx(
                kept * opt.partition.numel + report.ring_node_nbytes, rel=0.02
            )
            assert taken == pytest.approx(
                report.node_nbytes - node_staging - report.late_node_nbytes, rel=0.02
            )
        group.Free()
