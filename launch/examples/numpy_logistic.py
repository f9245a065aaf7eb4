"""Train a logistic regression in plain NumPy: mpirun runs this script on every rank.

    mpirun -n 2 python launch/examples/numpy_logistic.py

The points of three clusters overlap, so that a perfect classifier would still miss some. Every rank
trains on its own part of each batch, and all ranks have the same weights after every step.
"""

import argparse

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.numpy import NAdam, Parameter

NUM_CLASSES, NUM_INPUTS = 3, 20
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


def draw_points(rng: np.random.Generator, centres: Floats, count: int) -> tuple[Floats, Labels]:
    """Draw labelled points around the centres of their classes."""
    labels = rng.integers(0, NUM_CLASSES, count)
    return centres[labels] + rng.standard_normal((count, NUM_INPUTS), np.float32), labels


def softmax(scores: Floats) -> Floats:
    """Return the probabilities of the classes, row by row."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def main() -> None:
    """Train, and print the loss and the accuracy on points that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    comm = MPI.COMM_WORLD

    rng = np.random.default_rng(0)  # the same points on every rank
    centres = 0.6 * rng.standard_normal((NUM_CLASSES, NUM_INPUTS), np.float32)
    test_x, test_y = draw_points(rng, centres, 2000)

    weight = Parameter(np.zeros((NUM_INPUTS, NUM_CLASSES), np.float32), "weight")
    bias = Parameter(np.zeros(NUM_CLASSES, np.float32), "bias")
    opt = NAdam([weight, bias], lr=0.02, comm=comm)

    for step in range(1, steps + 1):
        x, y = draw_points(rng, centres, 128)
        x, y = x[comm.rank :: comm.size], y[comm.rank :: comm.size]  # this rank's part
        opt.zero_grad()
        probabilities = softmax(x @ weight.data + bias.data)
        loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
        probabilities[np.arange(len(y)), y] -= 1
        weight.grad += x.T @ probabilities / len(y)
        bias.grad += probabilities.mean(axis=0)
        opt.step()  # averages the gradients over the ranks
        if step % 50 == 0 or step == steps:
            mean_loss = opt.sum_over_ranks([loss])[0] / comm.size
            right = (test_x @ weight.data + bias.data).argmax(axis=1) == test_y
            if comm.rank == 0:
                print(f"step {step}: loss {mean_loss:.3f}, accuracy {right.mean():.3f}")
    opt.close()


if __name__ == "__main__":
    main()
