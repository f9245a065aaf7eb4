"""Train with Lightning, one Trainer in each rank or Lightning's DDP over all of them.

    pip install lightning
    mpirun -n 2 python launch/examples/lightning_module.py
    mpirun -n 2 python launch/examples/lightning_module.py --ddp

Without ``--ddp`` each rank has a Trainer that knows of no other: it gets this rank's rows, and the
optimizer averages the gradients. With it, Lightning finds the ranks of mpirun, deals out the rows
and wraps the model in DDP, which averages the gradients first; that takes longer and more memory,
and lets Lightning clip.
"""

import argparse
import os

import lightning
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from shardopt.torch import NAdam

NUM_ROWS, BATCH, EPOCHS = 2048, 64, 4


class Regression(lightning.LightningModule):
    """A network that learns to compute the product of its two inputs."""

    def __init__(self, comm: MPI.Intracomm, max_grad_norm: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
        self.comm, self.max_grad_norm = comm, max_grad_norm

    def training_step(self, rows: list[torch.Tensor], _: int) -> torch.Tensor:
        """Compute the loss of a batch."""
        x, y = rows
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> NAdam:
        """Make the optimizer, over the ranks."""
        params = self.named_parameters()
        return NAdam(params, lr=1e-2, max_grad_norm=self.max_grad_norm, comm=self.comm)


def draw_rows(seed: int) -> TensorDataset:
    """Draw inputs, and the products that are to be learned."""
    x = 2 * torch.rand(NUM_ROWS, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return TensorDataset(x, x.prod(dim=1, keepdim=True))


def main() -> None:
    """Train, and print the error on rows that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddp", action="store_true", help="let Lightning find the ranks")
    ddp = parser.parse_args().ddp
    comm = MPI.COMM_WORLD

    data: Dataset[tuple[torch.Tensor, ...]] = draw_rows(seed=1)
    settings: dict[str, object] = {"devices": 1}
    if ddp:
        os.environ.setdefault("MASTER_ADDR", "localhost")  # on several hosts: that of rank 0
        settings = {"strategy": "ddp", "devices": comm.size, "gradient_clip_val": 1.0}
    else:
        data = Subset(data, range(comm.rank, NUM_ROWS, comm.size))
    module = Regression(comm, None if ddp else 1.0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,  # see docs/frameworks.md for Lightning's and shardopt's own
        enable_progress_bar=comm.rank == 0,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(data, BATCH // comm.size, shuffle=not ddp))
    x, y = draw_rows(seed=2).tensors
    with torch.no_grad():
        error = (module.net(x) - y).square().mean().sqrt().item()
    if comm.rank == 0:
        print(f"error {error:.3f}, of {y.square().mean().sqrt().item():.3f} at the start")
    trainer.optimizers[0].close()


if __name__ == "__main__":
    main()
