"""Hugging Face Trainer, one in each rank, and one whole to compare with."""

import copy

import pytest
import torch

from shardopt.checkpoint import Checkpointer
from shardopt.torch import NAdam
from tests.support.clients import (
    MAX_GRAD_NORM,
    NUM_ROWS,
    NUM_STEPS,
    SETTINGS,
    TOLERANCE,
    assert_same_losses,
    assert_same_weights,
    make_opt,
    make_whole_opt,
    require,
)
from tests.support.errors import POLICY

transformers = require("transformers")

pytestmark = pytest.mark.mpi

NUM_TOKENS, LENGTH, ACCUMULATED = 16, 8, 2


def make_model():
    config = transformers.GPT2Config(
        vocab_size=NUM_TOKENS,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)


def rows_of(comm):
    """The rows that a rank trains on: its share of each batch, batch after batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_STEPS * ACCUMULATED * NUM_ROWS, LENGTH)
    tokens = torch.randint(0, NUM_TOKENS, shape, generator=generator)
    mine = tokens if comm is None else tokens[comm.rank :: comm.size]
    return [{"input_ids": row, "labels": row} for row in mine]


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def make_trainer(folder, comm, make_optimizers, **settings):
    """A Trainer, of one rank with its own rows or of the whole; ``settings`` are its arguments."""
    model, num_ranks = make_model(), 1 if comm is None else comm.size
    settings = {
        "max_steps": NUM_STEPS,
        "save_steps": NUM_STEPS // 2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": ACCUMULATED,
        "per_device_train_batch_size": NUM_ROWS // num_ranks,
        **settings,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows_of(comm),
        eval_dataset=rows_of(None)[:NUM_ROWS],
        callbacks=[Losses()],
        **make_optimizers(model),
    )


def losses_of(trainer):
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Losses))
    return callback.losses


def with_schedule(opt):
    """What Trainer takes: an optimizer, and a schedule for it."""
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + 0.2 * step))
    return {"optimizers": (opt, schedule)}


def sharded(comm):
    """Make the optimizers of one rank; the clip is the optimizer's."""

    def make_optimizers(model):
        return with_schedule(make_opt(model.named_parameters(), comm, max_grad_norm=MAX_GRAD_NORM))

    return make_optimizers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The trained Trainer of one process, which clips by itself."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("whole"),
        None,
        lambda model: with_schedule(make_whole_opt(model.parameters())),
        max_grad_norm=MAX_GRAD_NORM,
        save_strategy="no",
    )
    trainer.train()
    return trainer


def test_a_trainer_in_each_rank_is_the_whole_one(comm, tmp_path, whole):
    trainer = make_trainer(tmp_path, comm, sharded(comm), max_grad_norm=0)
    trainer.train()
    assert_same_losses(comm, losses_of(trainer), losses_of(whole))
    assert_same_weights(trainer.model, whole.model)
    assert trainer.optimizer.optimizer.last_step.clip_factor < 1


def test_a_trainer_that_makes_the_optimizer_is_the_whole_one(comm, tmp_path):
    def make_optimizers(kind, **settings):
        return lambda model: {"optimizer_cls_and_kwargs": (kind, SETTINGS | settings)}

    # Its groups decay other weights than biases and norms.
    settings = {"save_strategy": "no", "learning_rate": SETTINGS["lr"], "warmup_steps": 2}
    ours = make_optimizers(NAdam, comm=comm, policy=POLICY, max_grad_norm=MAX_GRAD_NORM)
    trainer = make_trainer(tmp_path, comm, ours, max_grad_norm=0, **settings)
    trainer.train()
    whole = make_optimizers(torch.optim.NAdam)
    expected = make_trainer(tmp_path, None, whole, max_grad_norm=MAX_GRAD_NORM, **settings)
    expected.train()
    assert len(trainer.optimizer.param_groups) == 2
    assert_same_losses(comm, losses_of(trainer), losses_of(expected))
    assert_same_weights(trainer.model, expected.model)


@pytest.mark.parametrize("saver", ["each rank", "rank 0"])
def test_a_trainer_resumes_from_its_own_checkpoint(comm, tmp_path, whole, saver):
    folder = tmp_path if saver == "each rank" else comm.bcast(tmp_path)
    saves = saver == "each rank" or comm.rank == 0
    settings = {"max_grad_norm": 0, "save_strategy": "steps" if saves else "no"}
    first = make_trainer(folder, comm, sharded(comm), **settings)
    first.train()
    comm.Barrier()

    resumed = make_trainer(folder, comm, sharded(comm), **settings)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{NUM_STEPS // 2}")
    assert_same_weights(resumed.model, first.model, rtol=0, atol=0)
    assert_same_weights(resumed.model, whole.model)
    assert_same_losses(comm, losses_of(resumed), losses_of(whole)[NUM_STEPS // 2 :])


class SavedByCheckpointer(transformers.TrainerCallback):
    """Saves what the optimizer has, with a Checkpointer; the trainer's state is in ``extra``."""

    def __init__(self, checkpointer, opt):
        self.checkpointer, self.opt = checkpointer, opt

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step == NUM_STEPS // 2:
            extra = {"scheduler": lr_scheduler.state_dict()}
            self.checkpointer.save(state.global_step, self.opt, extra=extra)


def test_a_checkpointer_saves_and_resumes_a_trainer(comm, mpi_tmp_path, tmp_path, whole):
    settings = {"max_grad_norm": 0, "save_strategy": "no"}
    first = make_trainer(tmp_path, comm, sharded(comm), **settings)
    with Checkpointer(mpi_tmp_path) as checkpointer:
        first.add_callback(SavedByCheckpointer(checkpointer, first.optimizer))
        first.train()

    resumed = make_trainer(tmp_path, comm, sharded(comm), **settings)
    with Checkpointer(mpi_tmp_path) as checkpointer:
        restored = checkpointer.restore(resumed.optimizer)
    resumed.lr_scheduler.load_state_dict(restored.extra["scheduler"])
    rows = restored.step * ACCUMULATED * NUM_ROWS // comm.size
    resumed.train_dataset = resumed.train_dataset[rows:]
    resumed.args.max_steps -= restored.step
    resumed.train()
    assert_same_weights(resumed.model, first.model, rtol=0, atol=0)
    assert_same_weights(resumed.model, whole.model)


def distributing_run(comm, folder, resume=None):
    """The weights after a run of Trainers that find mpirun's ranks, and wrap the model in DDP.

    Each deals out the rows by itself, and only the one of rank 0 saves.
    """
    trainer = make_trainer(
        folder,
        None,
        lambda model: with_schedule(make_opt(model.parameters(), comm)),
        use_cpu=True,
        per_device_train_batch_size=NUM_ROWS // comm.size,
        max_grad_norm=MAX_GRAD_NORM,  # of the averages that DDP leaves on each rank
    )
    assert trainer.args.world_size == comm.size
    trainer.train(resume_from_checkpoint=resume)
    comm.Barrier()
    return copy.deepcopy(trainer.model.state_dict())


def test_trainers_that_distribute_by_themselves_are_the_whole_one(
    comm, mpi_tmp_path, whole, process_group
):
    folder = mpi_tmp_path / "trainer"
    weights = distributing_run(comm, folder)
    torch.testing.assert_close(weights, dict(whole.model.state_dict()), **TOLERANCE)
    resumed = distributing_run(comm, folder, resume=f"{folder}/checkpoint-{NUM_STEPS // 2}")
    torch.testing.assert_close(resumed, weights, **TOLERANCE)  # gloo adds up in another order


def test_the_best_model_is_loaded_at_the_end(comm, tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": NUM_STEPS // 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "per_device_eval_batch_size": NUM_ROWS,
    }
    trainer = make_trainer(tmp_path, comm, sharded(comm), max_grad_norm=0, **settings)
    trainer.train()
    best = transformers.GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)
    trainer.optimizer.optimizer.close()
    assert_same_weights(trainer.model, best, rtol=0, atol=0)
