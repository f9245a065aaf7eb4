"""Train LoRA adapters with PEFT on a frozen model, and save them.

    pip install transformers peft
    mpirun -n 2 python launch/examples/peft_lora.py
    mpirun -n 2 python launch/examples/peft_lora.py --model distilgpt2

Only the adapters have gradients and moments. The frozen weights are passed to the optimizer too,
so that the ranks of a node hold them once. Without ``--model`` a small GPT-2 is made on the spot,
which needs no download.
"""

import argparse

import numpy as np
import torch
from mpi4py import MPI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from shardopt.torch import NAdam

NUM_TOKENS, LENGTH, BATCH = 64, 32, 16


def make_small_model() -> GPT2LMHeadModel:
    """Make a GPT-2 of two layers."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=NUM_TOKENS,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def draw_rows(rng: np.random.Generator, num_rows: int) -> torch.Tensor:
    """Draw rows that count upwards, each from a start of its own: what is to be learned."""
    starts = rng.integers(0, NUM_TOKENS, (num_rows, 1))
    return torch.from_numpy((starts + np.arange(LENGTH)) % NUM_TOKENS)


def main() -> None:
    """Train the adapters, save them, and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the name or folder of a GPT-2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", metavar="DIR", default="adapters")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model) if args.model else make_small_model()
    config = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(base, config)  # before the optimizer: rank 0's adapters win
    opt = NAdam(model.named_parameters(), lr=1e-2, max_grad_norm=1.0, comm=comm)

    for step in range(1, args.steps + 1):
        rows = draw_rows(np.random.default_rng([step, comm.rank]), BATCH // comm.size)
        opt.zero_grad()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        opt.step()
        if step % 50 == 0 or step == args.steps:
            mean_loss = opt.sum_over_ranks([loss.item()])[0] / comm.size
            if comm.rank == 0:
                print(f"step {step}: loss {mean_loss:.3f}")
    if comm.rank == 0:
        model.save_pretrained(args.output)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"saved {trained:,} trained of {model.num_parameters():,} parameters: {args.output}")
    opt.close()


if __name__ == "__main__":
    main()
