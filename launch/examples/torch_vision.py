"""Train a convolutional network with BatchNorm, and keep an average (EMA) of its weights.

    mpirun -n 2 python launch/examples/torch_vision.py --checkpoint shapes

The images are drawn as they are needed: a disc, a frame or a cross, in noise. Two things differ
from a run in one process. Each rank has BatchNorm statistics of its own images, so before they are
used for evaluation they are averaged over the ranks. And the average of the weights is computed by
every rank, alike, so that rank 0 can save it for all.
"""

import argparse

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardopt.checkpoint import Checkpointer
from shardopt.torch import NAdam

SIZE, NUM_SHAPES, EMA_DECAY = 16, 3, 0.95


def draw_images(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy images, of shape (count, 1, SIZE, SIZE), and the numbers of their shapes."""
    y, x = np.mgrid[:SIZE, :SIZE]
    centres = rng.uniform(5, SIZE - 6, (2, count, 1, 1))
    radii = rng.uniform(3, 5, (count, 1, 1))
    dy, dx = np.abs(y - centres[0]), np.abs(x - centres[1])
    far, near = np.maximum(dy, dx), np.minimum(dy, dx)
    disc, frame = dy**2 + dx**2 <= radii**2, (far <= radii) & (far > radii - 2)
    cross = (far <= radii) & (near < 1.2)
    labels = rng.integers(0, NUM_SHAPES, count)
    shapes = np.stack([disc, frame, cross])[labels, np.arange(count)]
    images = shapes + 0.4 * rng.standard_normal(shapes.shape)
    return torch.from_numpy(images[:, None].astype(np.float32)), torch.from_numpy(labels)


def make_model() -> nn.Sequential:
    """Make the network; all ranks draw the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, NUM_SHAPES)),
    )


def average_buffers(model: nn.Module, comm: MPI.Intracomm) -> None:
    """Average the BatchNorm statistics over all ranks. Collective."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            comm.Allreduce(MPI.IN_PLACE, buffer.numpy())
            buffer /= comm.size


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the part of the images that the model recognises."""
    model.eval()
    right = model(images).argmax(dim=1) == labels
    model.train()
    return right.float().mean().item()


def main() -> None:
    """Train, average, and print how many test images the model and its average recognise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--checkpoint", metavar="DIR", help="resume from here, and save here")
    args = parser.parse_args()
    comm = MPI.COMM_WORLD

    model = make_model()
    opt = NAdam(model.named_parameters(), lr=3e-3, comm=comm)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=False)
    checkpointer = Checkpointer(args.checkpoint) if args.checkpoint else None
    start = 1
    if checkpointer and (restored := checkpointer.restore(opt, model=model)):
        ema.load_state_dict((restored.extra or {})["ema"])
        start = restored.step + 1

    for step in range(start, args.steps + 1):
        images, labels = draw_images(np.random.default_rng([step, comm.rank]), 64 // comm.size)
        opt.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        opt.step()
        ema.update_parameters(model)

    if checkpointer:
        extra = {"ema": ema.state_dict()}
        checkpointer.save(args.steps, opt, extra, model=model, per_rank_buffers=True)
        checkpointer.close()
    average_buffers(model, comm)
    for average, buffer in zip(ema.module.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)
    test = draw_images(np.random.default_rng(0), 500)
    if comm.rank == 0:
        print(f"accuracy {accuracy(model, *test):.3f}, of the average {accuracy(ema, *test):.3f}")
    opt.close()


if __name__ == "__main__":
    main()
