"""Train a GAN, with two optimizers: a generator that learns to draw points on a circle.

    mpirun -n 2 python launch/examples/torch_gan.py

Each network has an optimizer of its own, and both use the same ranks. While the generator learns,
the discriminator is frozen: its gradients would be thrown away by the next ``zero_grad``.
"""

import argparse

import torch
from mpi4py import MPI
from torch import nn

from shardopt.torch import NAdam

NOISE, HIDDEN, BATCH = 8, 64, 256


def make_network(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """Make a network with two hidden layers."""
    hidden = [nn.Linear(num_inputs, HIDDEN), nn.LeakyReLU(0.2)]
    hidden += [nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2)]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, num_outputs))


def draw_circle(count: int) -> torch.Tensor:
    """Draw ``count`` points close to the circle of radius 2."""
    angles = 2 * torch.pi * torch.rand(count)
    points = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return points + 0.05 * torch.randn(count, 2)


def main() -> None:
    """Train both networks, and print how far the generated points are from the circle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    comm = MPI.COMM_WORLD

    torch.manual_seed(0)  # all ranks start from the same weights ...
    generator, discriminator = make_network(NOISE, 2), make_network(2, 1)
    opt_generator, opt_discriminator = (
        NAdam(network.named_parameters(), lr=1e-3, betas=(0.5, 0.9), comm=comm)
        for network in (generator, discriminator)
    )
    torch.manual_seed(1 + comm.rank)  # ... and draw points of their own
    loss_of = nn.functional.binary_cross_entropy_with_logits
    count = BATCH // comm.size
    real, fake = torch.ones(count, 1), torch.zeros(count, 1)

    for step in range(1, steps + 1):
        drawn = generator(torch.randn(count, NOISE))
        opt_discriminator.zero_grad()
        loss = loss_of(discriminator(draw_circle(count)), real)
        (loss + loss_of(discriminator(drawn.detach()), fake)).backward()
        opt_discriminator.step()

        opt_generator.zero_grad()
        discriminator.requires_grad_(False)
        loss_of(discriminator(drawn), real).backward()
        discriminator.requires_grad_(True)
        opt_generator.step()

        if step % 200 == 0 or step == steps:
            with torch.no_grad():
                radii = generator(torch.randn(1000, NOISE)).norm(dim=1)
            distance = opt_generator.sum_over_ranks([(radii - 2).abs().mean().item()])[0]
            if comm.rank == 0:
                print(f"step {step}: {distance / comm.size:.3f} from the circle on average")
    opt_generator.close()
    opt_discriminator.close()


if __name__ == "__main__":
    main()
