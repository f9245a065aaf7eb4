"""A small GPT in PyTorch, trained by this project and by what PyTorch itself has.

The model and the text are those of ``launch/train_lm.py``.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from benchmarks import ROOT
from benchmarks.contenders.names import DDP, FSDP2, THROUGH_TORCH


def load_train_lm(module: str) -> Any:
    """Import a module of ``launch/train_lm``.

    Raises:
        ImportError: A package that it needs is missing.
    """
    scripts = str(ROOT / "launch")
    if scripts not in sys.path:
        sys.path.append(scripts)
    return importlib.import_module(f"train_lm.{module}")


@dataclass(frozen=True)
class Gpt:
    """A model, the same for every contender, and the ranks that train it.

    Attributes:
        comm: The ranks; torch's process group has the same ones.
        layers: Transformer blocks.
        width: Of the model.
        context: Bytes it sees at once.
        learning_rate: Constant, of NAdam with its defaults.
    """

    comm: MPI.Intracomm
    layers: int
    width: int
    context: int
    learning_rate: float

    @property
    def numel(self) -> int:
        """Parameters."""
        numel: int = load_train_lm("models.base").count_weights(self._shape())
        return numel

    def make(self) -> Any:
        """Return the model as an ``nn.Module`` with its first weights, on every rank the same."""
        torch = importlib.import_module("torch")
        base, models = load_train_lm("models.base"), load_train_lm("models.torch")
        shape = self._shape()
        weights = base.out_by_in(base.initial_weights(shape, seed=0))
        model = models.Transformer(shape)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        return model

    def _shape(self) -> Any:
        base, options = load_train_lm("models.base"), load_train_lm("options")
        if self.width % options.HEAD_WIDTH:
            raise ValueError(
                f"--width must be a multiple of {options.HEAD_WIDTH}; got {self.width}. "
                "Choose another one."
            )
        return base.Shape(self.layers, self.width, self.width // options.HEAD_WIDTH, self.context)


class Trainer:
    """A model and its optimizer, ready to train. Collective: every method.

    Args:
        model: Takes tokens [batch, context], returns logits [batch, context, 256].
        optimizer: One of torch's protocol.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        self._torch = importlib.import_module("torch")
        self._model, self._optimizer = model, optimizer

    def step(self, inputs: Any, targets: Any) -> float:
        """Train for one step on this rank's bytes, each [batch, context]; return its loss."""
        self._optimizer.zero_grad()
        loss = self._loss(inputs, targets)
        loss.backward()
        self._optimizer.step()
        return float(loss.item())

    def loss(self, inputs: Any, targets: Any) -> float:
        """Return the loss of bytes, in nats per byte."""
        with self._torch.no_grad():
            return float(self._loss(inputs, targets).item())

    def close(self) -> None:
        """Free the memory."""
        close = getattr(self._optimizer, "close", None)
        del self._model, self._optimizer
        if close is not None:
            close()

    def _loss(self, inputs: Any, targets: Any) -> Any:
        tokens, following = (self._torch.from_numpy(part).long() for part in (inputs, targets))
        logits = self._model(tokens).flatten(0, 1)
        return self._torch.nn.functional.cross_entropy(logits, following.flatten())


def shardopt_torch(gpt: Gpt, **settings: Any) -> Trainer:
    """Train with this project.

    Args:
        gpt: The model.
        **settings: Further arguments of ``NAdam``.
    """
    face = importlib.import_module("shardopt.torch")
    model = gpt.make()
    optimizer = face.NAdam(model.parameters(), gpt.learning_rate, comm=gpt.comm, **settings)
    return Trainer(model, optimizer)


def ddp(gpt: Gpt) -> Trainer:
    """Train replicas, with an option that its documentation has for less memory and copying."""
    parallel = importlib.import_module("torch.nn.parallel")
    model = parallel.DistributedDataParallel(gpt.make(), gradient_as_bucket_view=True)
    return _with_nadam(model, gpt)


def fsdp2(gpt: Gpt) -> Trainer:
    """Train shards: each block, and then the model, as its documentation advises."""
    fsdp = importlib.import_module("torch.distributed.fsdp")
    meshes = importlib.import_module("torch.distributed.device_mesh")
    mesh = meshes.init_device_mesh("cpu", (gpt.comm.size,))
    model = gpt.make()
    for module in (*model.blocks, model):
        fsdp.fully_shard(module, mesh=mesh)
    return _with_nadam(model, gpt)


def _with_nadam(model: Any, gpt: Gpt) -> Trainer:
    torch = importlib.import_module("torch")
    return Trainer(model, torch.optim.NAdam(model.parameters(), gpt.learning_rate))


TRAINERS: dict[str, Callable[[Gpt], Trainer]] = {
    THROUGH_TORCH: shardopt_torch,
    DDP: ddp,
    FSDP2: fsdp2,
}
