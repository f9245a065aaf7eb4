"""Fine-tune a Hugging Face model with Trainer, one Trainer in each rank.

    pip install transformers accelerate
    mpirun -n 2 python launch/examples/hf_trainer.py
    mpirun -n 2 python launch/examples/hf_trainer.py --model distilgpt2 --text book.txt

Without ``--model`` a small GPT-2 is made on the spot and learns the bytes of the text, so that the
example needs no download. Trainer knows of one rank only: it gets this rank's rows, and the
optimizer averages the gradients and clips them.
"""

import argparse
import os
from pathlib import Path

import torch
from mpi4py import MPI
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from shardopt.torch import NAdam

LENGTH = 64


def make_small_model() -> GPT2LMHeadModel:
    """Make a GPT-2 of two layers whose tokens are bytes."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def rows_of(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Cut tokens into rows of LENGTH, as Trainer takes them."""
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Fine-tune, save the model, and print the loss on rows that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the name or folder of a causal language model")
    parser.add_argument("--text", type=Path, default=Path(os.__file__), help="a text file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", metavar="DIR", default="fine-tuned")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD

    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        text = args.text.read_text(encoding="utf-8")
        tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    else:
        model = make_small_model()
        tokens = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
    rows = rows_of(tokens)
    held_out, rows = rows[::10], [row for index, row in enumerate(rows) if index % 10]

    opt = NAdam(model.named_parameters(), lr=2e-3, max_grad_norm=1.0, comm=comm)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=args.steps)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.output}/rank{comm.rank}",
            max_steps=args.steps,
            per_device_train_batch_size=16 // comm.size,
            max_grad_norm=0,  # the optimizer clips, after the average
            save_strategy="no",
            logging_steps=20,
            disable_tqdm=comm.rank > 0,
            log_level="error" if comm.rank else "passive",
            report_to=[],
        ),
        train_dataset=rows[comm.rank :: comm.size],  # this rank's part
        eval_dataset=held_out,
        optimizers=(opt, schedule),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]  # on all ranks: the weights are the same
    if comm.rank == 0:
        model.save_pretrained(args.output)
        print(f"held-out loss: {before:.3f} before, {after:.3f} after; saved in {args.output}")
    opt.close()


if __name__ == "__main__":
    main()
