"""Averages of weights over steps: torch's SWA and EMA, and timm's EMA, schedules and models."""

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.support.clients import (
    NUM_STEPS,
    TOLERANCE,
    assert_same_weights,
    batch,
    loss_of,
    make_net,
    make_opt,
    make_whole_opt,
    require,
    rows_of,
)

pytestmark = pytest.mark.mpi

timm = require("timm")
for part in ("optim", "scheduler", "utils"):
    require(f"timm.{part}")


def averaged_run(comm, make_model, make_average, when="after", schedule_of=None):
    """The model and its average after a run of one rank, or of one process for ``comm`` None.

    Args:
        comm: The ranks.
        make_model: Makes the model.
        make_average: Makes the average of the model.
        when: Whether that is made "before" or "after" the optimizer.
        schedule_of: Makes the schedule of the optimizer.
    """
    model = make_model()
    early = make_average(model)
    params = model.parameters()
    opt = make_whole_opt(params) if comm is None else make_opt(params, comm)
    average = early if when == "before" else make_average(model)
    update = getattr(average, "update_parameters", None) or average.update
    schedule = None if schedule_of is None else schedule_of(opt)
    for step in range(NUM_STEPS):
        opt.zero_grad()
        loss_of(model, step, rows_of(comm)).backward()
        opt.step()
        if step >= 2:
            update(model)
            if schedule is not None:
                schedule.step()
    return model, average


AVERAGES = {
    "SWA": AveragedModel,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)),
    "timm's EMA": lambda model: timm.utils.ModelEmaV3(model, decay=0.8),
    "timm's EMA, one by one": lambda model: timm.utils.ModelEmaV3(model, 0.8, foreach=False),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_weights_is_that_of_one_process(comm, kind, when):
    model, average = averaged_run(comm, make_net, AVERAGES[kind], when)
    whole, expected = averaged_run(None, make_net, AVERAGES[kind], when)
    assert_same_weights(model, whole)
    assert_same_weights(average.module, expected.module)
    assert not torch.equal(next(average.module.parameters()), next(model.parameters()))


def make_normed():
    """A network whose batch norm comes first, so that ranks' statistics do not change gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.Linear(5, 2), torch.nn.BatchNorm1d(2).eval()
        )


def test_swa_and_update_bn_are_those_of_one_process(comm):
    def run(comm):
        def schedule_of(opt):
            return SWALR(opt, swa_lr=0.02, anneal_epochs=2)

        _, average = averaged_run(comm, make_normed, AveragedModel, schedule_of=schedule_of)
        update_bn([batch(step)[0] for step in range(NUM_STEPS)], average)  # all rows on each rank
        return average.module

    ours, whole = run(comm), run(None)
    assert_same_weights(ours, whole)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()), **TOLERANCE)
    assert whole[2].running_var.mean() != 1


# -- timm's own loop -------------------------------------------------------------------------------


def make_vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=2, **settings)


class TimmRun:
    """What timm's train.py has: decay groups, a schedule by update, EMA, a saver of checkpoints."""

    def __init__(self, comm, folder=None):
        self.comm, self.model = comm, make_vit()
        groups = timm.optim.param_groups_weight_decay(self.model, 0.1)
        self.opt = make_whole_opt(groups) if comm is None else make_opt(groups, comm)
        self.ema = timm.utils.ModelEmaV3(self.model, decay=0.8)
        self.schedule = timm.scheduler.CosineLRScheduler(
            self.opt, t_initial=NUM_STEPS, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False
        )
        self.saver = folder and timm.utils.CheckpointSaver(
            self.model, self.opt, model_ema=self.ema, checkpoint_dir=str(folder)
        )

    def train(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(12, 3, 8, 8, generator=generator)
            targets = torch.randint(0, 2, (12,), generator=generator)
            rows = rows_of(self.comm)
            self.opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(images[rows]), targets[rows])
            loss.backward()
            self.opt.step()
            self.ema.update(self.model, step=step)
            self.schedule.step_update(step + 1)
        return self


def test_timms_loop_saves_and_resumes(comm, mpi_tmp_path):
    whole = TimmRun(None).train(range(NUM_STEPS))
    folder = mpi_tmp_path if comm.rank == 0 else None
    first = TimmRun(comm, folder).train(range(NUM_STEPS // 2))
    if comm.rank == 0:
        first.saver.save_checkpoint(epoch=0)
    comm.Barrier()
    first.train(range(NUM_STEPS // 2, NUM_STEPS))

    resumed = TimmRun(comm)
    path = str(mpi_tmp_path / "last.pth.tar")
    timm.models.resume_checkpoint(resumed.model, path, resumed.opt, log_info=False)
    timm.models.load_checkpoint(resumed.ema.module, path, use_ema=True)
    resumed.schedule.step_update(NUM_STEPS // 2)
    resumed.train(range(NUM_STEPS // 2, NUM_STEPS))
    for run in (first, resumed):
        assert_same_weights(run.model, whole.model)
        assert_same_weights(run.ema.module, whole.ema.module)
    assert_same_weights(resumed.model, first.model, rtol=0, atol=0)
