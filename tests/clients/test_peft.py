"""PEFT: LoRA adapters are trained, the model they sit on is frozen."""

import pytest
import torch

from shardopt.checkpoint import Checkpointer
from tests.support.clients import (
    NUM_ROWS,
    NUM_STEPS,
    assert_same_weights,
    make_opt,
    make_whole_opt,
    require,
    rows_of,
)

peft = require("peft")
transformers = require("transformers")

pytestmark = pytest.mark.mpi

HALF = NUM_STEPS // 2
CLIP = 0.01


def make_base():
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    drop = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=16, **sizes, **drop, **ends)
        )


def make_model(seed=0):
    """The model with adapters, which are drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        return peft.get_peft_model(make_base(), config)


def train(model, opt, steps, comm=None, clip=None):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 16, (NUM_ROWS, 8), generator=generator)[rows_of(comm)]
        opt.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
    return model


def everything(model):
    return model.parameters()


def trainable(model):
    return [param for param in model.parameters() if param.requires_grad]


def named(model):
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def sharded(comm, model, params=trainable):
    return make_opt(params(model), comm, max_grad_norm=CLIP)


@pytest.fixture(scope="module")
def whole():
    model = make_model()
    return train(model, make_whole_opt(trainable(model)), range(NUM_STEPS), clip=CLIP)


@pytest.mark.parametrize("params", [trainable, everything])
def test_lora_is_that_of_one_process(comm, whole, params):
    model = make_model()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    opt = sharded(comm, model, params)
    train(model, opt, range(NUM_STEPS), comm)
    assert_same_weights(model, whole)
    assert opt.last_step.clip_factor < 1
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in frozen.items())
    # Frozen weights have neither gradients nor moments.
    assert all(weights[name].grad is None for name in frozen)
    assert len(opt.state_dict()["state"]) == len(trainable(model)) < len(weights)


def test_adapters_that_peft_saves_are_those_that_it_loads(comm, whole, mpi_tmp_path):
    model = make_model()
    opt = sharded(comm, model)
    train(model, opt, range(HALF), comm)
    if comm.rank == 0:
        model.save_pretrained(mpi_tmp_path)
        torch.save(opt.state_dict(), mpi_tmp_path / "optimizer.pt")
    comm.Barrier()
    train(model, opt, range(HALF, NUM_STEPS), comm)

    resumed = peft.PeftModel.from_pretrained(make_base(), mpi_tmp_path, is_trainable=True)
    opt = sharded(comm, resumed)
    opt.load_state_dict(torch.load(mpi_tmp_path / "optimizer.pt"))
    train(resumed, opt, range(HALF, NUM_STEPS), comm)
    assert_same_weights(resumed, model, rtol=0, atol=0)
    assert_same_weights(resumed, whole)


def test_a_checkpointer_saves_and_resumes_adapters(comm, whole, mpi_tmp_path):
    model = make_model()
    opt = sharded(comm, model, named)
    train(model, opt, range(HALF), comm)
    with Checkpointer(mpi_tmp_path) as checkpointer:
        checkpointer.save(HALF, opt)

    resumed = make_model(seed=1)  # the checkpoint has other adapters than these
    opt = sharded(comm, resumed, named)
    with Checkpointer(mpi_tmp_path) as checkpointer:
        assert checkpointer.restore(opt).step == HALF
    train(resumed, opt, range(HALF, NUM_STEPS), comm)
    assert_same_weights(resumed, whole)


def test_merged_adapters_compute_what_the_adapted_model_does(comm, whole):
    model = make_model()
    train(model, sharded(comm, model), range(NUM_STEPS), comm)
    tokens = torch.arange(8)[None]
    logits = model.eval()(tokens).logits
    merged = model.merge_and_unload()  # writes into the frozen weights
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, whole.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
