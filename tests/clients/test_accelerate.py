"""accelerate, in each rank by itself and with the ranks found by it."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.support.clients import (
    MAX_GRAD_NORM,
    NUM_ROWS,
    NUM_STEPS,
    TOLERANCE,
    assert_same_weights,
    batch,
    make_net,
    make_opt,
    make_whole_opt,
    require,
    rows_of,
)

accelerate = require("accelerate")

pytestmark = pytest.mark.mpi

ACCUMULATED = 2
HALF = NUM_STEPS * ACCUMULATED // 2


def all_rows(rows):
    """The given rows of all batches, batch after batch."""
    inputs, targets = zip(*map(batch, range(NUM_STEPS * ACCUMULATED)), strict=True)
    return TensorDataset(
        torch.cat([each[rows] for each in inputs]), torch.cat([each[rows] for each in targets])
    )


def prepared(accelerator, data, batch_size, opt_of):
    """Everything of a run, as ``prepare`` returns it."""
    model = make_net()
    opt = opt_of(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.2 * step))
    return accelerator.prepare(model, opt, DataLoader(data, batch_size), schedule)


def train(accelerator, parts, batches, clip=None):
    """Take steps on some of the batches; ``clip`` is for accelerate to do."""
    model, opt, loader, schedule = parts
    for index, (inputs, targets) in enumerate(loader):
        if index not in batches:
            continue
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            schedule.step()
            opt.zero_grad()


def make_accelerator(**settings):
    return accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATED, **settings)


def alone(comm):
    """A run of one rank."""
    accelerator = make_accelerator()
    data, rows = all_rows(rows_of(comm)), NUM_ROWS // comm.size
    opt_of = lambda params: make_opt(params, comm, max_grad_norm=MAX_GRAD_NORM)  # noqa: E731
    return accelerator, prepared(accelerator, data, rows, opt_of)


@pytest.fixture(scope="module")
def whole():
    """The model that one process has trained, without accelerate."""
    model = make_net()
    opt = make_whole_opt(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.2 * step))
    for step in range(NUM_STEPS):
        opt.zero_grad()
        for inputs, targets in map(batch, range(step * ACCUMULATED, (step + 1) * ACCUMULATED)):
            (torch.nn.functional.mse_loss(model(inputs), targets) / ACCUMULATED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        opt.step()
        schedule.step()
    return model


def test_accelerate_in_each_rank_is_one_process(comm, whole):
    accelerator, parts = alone(comm)
    assert accelerator.num_processes == 1
    train(accelerator, parts, range(2 * HALF))
    assert_same_weights(parts[0], whole)


@pytest.mark.parametrize("saver", ["each rank", "rank 0"])
def test_a_saved_state_resumes(comm, tmp_path, whole, saver):
    folder = tmp_path if saver == "each rank" else comm.bcast(tmp_path)
    accelerator, parts = alone(comm)
    train(accelerator, parts, range(HALF))
    if saver == "each rank" or comm.rank == 0:
        accelerator.save_state(str(folder))
    comm.Barrier()
    train(accelerator, parts, range(HALF, 2 * HALF))

    again, resumed = alone(comm)
    again.load_state(str(folder))
    train(again, resumed, range(HALF, 2 * HALF))
    assert_same_weights(resumed[0], parts[0], rtol=0, atol=0)
    assert_same_weights(resumed[0], whole)


def distributed_run(comm, folder, batches, resume=False):
    """The weights after a run in which accelerate has found the ranks and deals out the rows."""
    # Without split_batches it would take as many steps of the schedule at once as there are ranks.
    split = accelerate.DataLoaderConfiguration(split_batches=True)
    accelerator = make_accelerator(cpu=True, dataloader_config=split)
    assert accelerator.num_processes == comm.size
    opt_of = lambda params: make_opt(params, comm)  # noqa: E731
    parts = prepared(accelerator, all_rows(slice(None)), NUM_ROWS, opt_of)
    if resume:
        accelerator.load_state(folder)
    train(accelerator, parts, batches, clip=MAX_GRAD_NORM)
    if not resume:
        accelerator.save_state(folder)  # rank 0's
        comm.Barrier()
    return copy.deepcopy(accelerator.unwrap_model(parts[0]).state_dict())


def test_accelerate_that_distributes_is_one_process(comm, mpi_tmp_path, whole, process_group):
    folder = str(mpi_tmp_path / "state")
    weights = distributed_run(comm, folder, range(2 * HALF))
    torch.testing.assert_close(weights, whole.state_dict(), **TOLERANCE)
    distributed_run(comm, folder, range(HALF))
    resumed = distributed_run(comm, folder, range(HALF, 2 * HALF), resume=True)
    torch.testing.assert_close(resumed, weights, **TOLERANCE)  # gloo adds up in another order


def test_accelerates_clip_after_average_grads_is_that_of_one_process(comm, whole):
    accelerator = make_accelerator()
    data, rows = all_rows(rows_of(comm)), NUM_ROWS // comm.size
    parts = prepared(accelerator, data, rows, lambda params: make_opt(params, comm))
    clip = accelerator.clip_grad_norm_

    def clip_average(params, limit):
        parts[1].optimizer.average_grads()
        clip(params, limit)

    accelerator.clip_grad_norm_ = clip_average
    train(accelerator, parts, range(2 * HALF), clip=MAX_GRAD_NORM)
    assert_same_weights(parts[0], whole)
