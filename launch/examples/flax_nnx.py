"""Train a Flax NNX model: JAX compiles the gradients, shardopt takes the place of optax.nadam.

    pip install flax optax
    mpirun -n 2 python launch/examples/flax_nnx.py

The update runs outside of ``nnx.jit``, as it talks to other ranks. The function that computes loss
and gradients is compiled as usual.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mpi4py import MPI

from shardopt.jax import nadam

BATCH = 256


class Network(nnx.Module):
    """A network that tells the two arms of a spiral apart."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(2, 64, rngs=rngs)
        self.hidden2 = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [n] scores for points of shape [n, 2]."""
        x = nnx.relu(self.hidden1(x))
        return self.out(nnx.relu(self.hidden2(x)))[:, 0]


def draw_points(rng: np.random.Generator, count: int) -> tuple[jax.Array, jax.Array]:
    """Draw points on the arms of a spiral, and the number, 0 or 1, of their arm."""
    arms, turns = rng.integers(0, 2, count), rng.uniform(0.2, 1, count)
    angles = 2 * np.pi * turns + np.pi * arms
    points = turns[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points += 0.02 * rng.standard_normal(points.shape)
    return jnp.asarray(points, jnp.float32), jnp.asarray(arms, jnp.float32)


@nnx.jit
@nnx.value_and_grad
def loss_and_grads(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the cross-entropy of a batch; its gradients come with it."""
    scores = model(x)
    return jnp.mean(jnp.logaddexp(0, scores) - y * scores)


def main() -> None:
    """Train, and print the loss and the accuracy on points that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    comm = MPI.COMM_WORLD

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, nadam(3e-3, variant="optax", comm=comm), wrt=nnx.Param)
    test_x, test_y = draw_points(np.random.default_rng(0), 1000)

    for step in range(1, steps + 1):
        x, y = draw_points(np.random.default_rng([step, comm.rank]), BATCH // comm.size)
        loss, grads = loss_and_grads(model, x, y)
        optimizer.update(model, grads)  # on all ranks, outside of nnx.jit
        if step % 100 == 0 or step == steps:
            right = (model(test_x) > 0) == (test_y > 0.5)
            if comm.rank == 0:
                print(f"step {step}: loss {loss:.3f}, accuracy {right.mean():.3f}")
    optimizer.opt_state.close()


if __name__ == "__main__":
    main()
