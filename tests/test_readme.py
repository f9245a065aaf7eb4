"""What the README shows works as shown."""

import re
from pathlib import Path

import pytest

from tests.support.frameworks import environment_for, require

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

BATCHES = """
import numpy as np
rng = np.random.default_rng(0)
truth = rng.standard_normal((512, 10)).astype(np.float32) / 20
xs = rng.standard_normal((400, 32, 512)).astype(np.float32)
batches = [(x, x @ truth) for x in xs]
"""
AS_TENSORS = {
    "torch": "import torch\nbatches = [tuple(map(torch.from_numpy, batch)) for batch in batches]\n",
    "lucid": "import lucid\nbatches = [tuple(map(lucid.Tensor, batch)) for batch in batches]\n",
}
CHECK = """
opt.close()
first = float((batches[0][1] ** 2).mean().item())
assert float(loss.item()) < 0.5 * first, (loss, first)
print("trained")
"""


@pytest.mark.any_mpi
@pytest.mark.parametrize("framework", ["torch", "jax", "lucid", "numpy"])
def test_an_example_trains(mpirun, tmp_path, framework):
    require(framework)
    (example,) = [text for text in EXAMPLES if f"shardopt.{framework}" in text]
    source = BATCHES + AS_TENSORS.get(framework, "") + example + CHECK
    job = mpirun(2, source=source, env=environment_for(framework, tmp_path))
    assert job.returncode == 0, job.output
    assert job.stdout.count("trained") == 2


CHECKPOINTS = """
import torch
from mpi4py import MPI
from shardopt.torch import NAdam

torch.manual_seed(0)
batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(LENGTH)]
model = torch.nn.Linear(4, 1)
opt = NAdam(model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=400)
taken = []

def train_step(x, y):
    opt.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    opt.step()
    scheduler.step()
    taken.append(opt.last_step.step)

"""


@pytest.mark.any_mpi
def test_the_example_of_checkpoints_resumes(mpirun):
    require("torch")
    (example,) = [text for text in EXAMPLES if "Checkpointer(" in text]
    for num_ranks, length, taken, saved in (2, 250, "1 250 250", 200), (1, 320, "201 320 120", 300):
        ending = "print(f'{taken[0]} {taken[-1]} {len(taken)} {scheduler.last_epoch}\\n', end='')"
        source = CHECKPOINTS.replace("LENGTH", str(length)) + example + ending
        job = mpirun(num_ranks, source=source)
        assert job.returncode == 0, job.output
        assert job.stdout.splitlines() == [f"{taken} {length}"] * num_ranks
        assert (mpirun.folder / "checkpoints" / f"step-{saved:012d}").is_dir()


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link
