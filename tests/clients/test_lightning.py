"""Lightning, one Trainer in each rank."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from shardopt.checkpoint import Checkpointer
from tests.support.clients import (
    MAX_GRAD_NORM,
    NUM_ROWS,
    NUM_STEPS,
    assert_same_losses,
    assert_same_weights,
    batch,
    make_net,
    make_opt,
    make_whole_opt,
    require,
    rows_of,
)

lightning = require("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = pytest.mark.mpi

HALF = NUM_STEPS // 2


class Module(lightning.LightningModule):
    """The small network, and the losses of its steps."""

    def __init__(self, make_optimizer):
        super().__init__()
        self.net, self.make_optimizer, self.losses = make_net(), make_optimizer, []

    def training_step(self, rows, index):
        inputs, targets = rows
        loss = torch.nn.functional.mse_loss(self.net(inputs), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        opt = self.make_optimizer(self.named_parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.2 * step))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(folder, **settings):
    """A Trainer of one process on the CPU, which leaves the ranks to the optimizer."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_checkpointing=False,
        **{"devices": 1, "max_steps": NUM_STEPS, **quiet, **settings},
    )


def loader(comm):
    """The rows of one rank, or all of them: an epoch is half of all steps."""
    inputs, targets = zip(*map(batch, range(HALF)), strict=True)
    mine = rows_of(comm)
    data = TensorDataset(*(torch.cat([each[mine] for each in all_]) for all_ in (inputs, targets)))
    return DataLoader(data, NUM_ROWS // (1 if comm is None else comm.size))


def sharded(comm):
    return Module(lambda params: make_opt(params, comm, max_grad_norm=MAX_GRAD_NORM))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trained module of one process, which Lightning clips."""
    module = Module(make_whole_opt)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), gradient_clip_val=MAX_GRAD_NORM)
    trainer.fit(module, loader(None))
    return module


def test_lightning_in_each_rank_is_one_process(comm, tmp_path, whole):
    module, trainer = sharded(comm), make_trainer(tmp_path)
    trainer.fit(module, loader(comm))
    assert trainer.world_size == 1
    assert_same_losses(comm, module.losses, whole.losses)
    assert_same_weights(module, whole)
    assert trainer.optimizers[0].last_step.clip_factor < 1


def resumed_run(path, comm, make_module, saves=True, **settings):
    """The module of a run that ended after one epoch, and went on from Lightning's checkpoint."""
    first = make_trainer(path.parent, max_epochs=1, **settings)
    first.fit(make_module(), loader(comm))
    if saves:
        first.save_checkpoint(path)
    if comm is not None:
        comm.Barrier()
    module = make_module()
    make_trainer(path.parent, **settings).fit(module, loader(comm), ckpt_path=str(path))
    return module


@pytest.mark.parametrize("saver", ["each rank", "rank 0"])
def test_lightnings_checkpoint_resumes(comm, tmp_path, saver):
    folder = tmp_path if saver == "each rank" else comm.bcast(tmp_path)
    saves = saver == "each rank" or comm.rank == 0
    module = resumed_run(folder / "half.ckpt", comm, lambda: sharded(comm), saves)
    clip = {"gradient_clip_val": MAX_GRAD_NORM}
    whole = resumed_run(tmp_path / "whole.ckpt", None, lambda: Module(make_whole_opt), **clip)
    assert_same_losses(comm, module.losses, whole.losses)
    assert_same_weights(module, whole)


class SavedByCheckpointer(lightning.Callback):
    """Saves what the optimizer has after each epoch; begins with what was saved."""

    def __init__(self, checkpointer):
        self.checkpointer = checkpointer

    def on_train_start(self, trainer, module):
        restored = self.checkpointer.restore(trainer.optimizers[0])
        if restored is not None:
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(restored.extra["schedule"])

    def on_train_epoch_end(self, trainer, module):
        opt, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        step = opt.last_step.step
        self.checkpointer.save(step, opt, extra={"schedule": schedule.state_dict()})


def test_a_checkpointer_saves_and_resumes_lightning(comm, tmp_path, mpi_tmp_path, whole):
    for epoch in range(2):
        module = sharded(comm)
        with Checkpointer(mpi_tmp_path) as checkpointer:
            callbacks = [SavedByCheckpointer(checkpointer)]
            trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
            trainer.fit(module, loader(comm))
        assert_same_losses(comm, module.losses, whole.losses[epoch * HALF :][:HALF])
    assert_same_weights(module, whole)


class Manual(Module):
    """The same in Lightning's manual optimization."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def training_step(self, rows, index):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(super().training_step(rows, index))
        opt.step()
        self.lr_schedulers().step()


def test_manual_optimization_is_one_process(comm, tmp_path, whole):
    module = Manual(lambda params: make_opt(params, comm, max_grad_norm=MAX_GRAD_NORM))
    make_trainer(tmp_path).fit(module, loader(comm))
    assert_same_weights(module, whole)


def test_lightnings_ddp_is_one_process(comm, tmp_path, whole, process_group):
    # Lightning finds mpirun's ranks through mpi4py; averages twice, and clips the averages.
    def run():
        module = Module(lambda params: make_opt(params, comm))
        trainer = make_trainer(
            tmp_path,
            strategy="ddp",
            devices=comm.size,
            gradient_clip_val=MAX_GRAD_NORM,
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader(comm))
        return module

    assert_same_weights(run(), whole)


@pytest.mark.parametrize(
    "make_average",
    [
        lambda: lightning.pytorch.callbacks.StochasticWeightAveraging(0.02, 1, annealing_epochs=1),
        lambda: lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.8),
    ],
    ids=["SWA", "EMA"],
)
def test_lightnings_averages_of_weights_are_those_of_one_process(comm, tmp_path, make_average):
    def run(comm, module):
        settings = {"max_steps": -1, "max_epochs": 3, "callbacks": [make_average()]}
        make_trainer(tmp_path, **settings).fit(module, loader(comm))
        return module  # with the average in the place of its weights

    ours = run(comm, Module(lambda params: make_opt(params, comm)))
    assert_same_weights(ours, run(None, Module(make_whole_opt)))


class Averaging(Module):
    """The same; the gradients that Lightning clips and logs are the averages."""

    def on_before_optimizer_step(self, optimizer):
        optimizer.average_grads()


def test_lightnings_clip_after_average_grads_is_that_of_one_process(comm, tmp_path, whole):
    module = Averaging(lambda params: make_opt(params, comm))
    make_trainer(tmp_path, gradient_clip_val=MAX_GRAD_NORM).fit(module, loader(comm))
    assert_same_weights(module, whole)
