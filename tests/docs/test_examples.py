"""The Python examples of the README and of docs/ work as shown."""

import pytest

from tests.support.frameworks import environment_for, require
from tests.support.pages import PAGES, README, blocks, name_of

FRAMEWORKS = ("torch", "jax", "lucid", "numpy")
EXAMPLES = [
    (page, example)
    for page in PAGES
    if page == README or page.parent.name == "docs"
    for example in blocks(page, "python")
]

TRAINING = [
    pytest.param(framework, example, id=f"{name_of(page)}-{framework}-{number}")
    for number, (page, example) in enumerate(EXAMPLES)
    for framework in FRAMEWORKS
    if f"from shardopt.{framework} import" in example
]
RESUMING = [
    pytest.param(example, id=name_of(page))
    for page, example in EXAMPLES
    if "Checkpointer(" in example
]
LISTENING = [
    pytest.param(example, id=f"{name_of(page)}-{number}")
    for number, (page, example) in enumerate(EXAMPLES)
    if "opt.listeners.append(" in example
]
STATE_DICTS = [
    pytest.param(example, id=name_of(page))
    for page, example in EXAMPLES
    if "torch.save(" in example
]

BATCHES = """
import numpy as np
rng = np.random.default_rng(0)
truth = rng.standard_normal((512, 10)).astype(np.float32) / 20
xs = rng.standard_normal((400, 32, 512)).astype(np.float32)
batches = [(x, x @ truth) for x in xs]
"""
# What short examples take for granted: batches of the framework's arrays, and a model.
GIVEN = {
    "torch": """
import torch
batches = [tuple(map(torch.from_numpy, batch)) for batch in batches]
model = torch.nn.Linear(512, 10)
loss_of = torch.nn.functional.mse_loss
""",
    "jax": """
import jax
params = {"weight": jax.numpy.zeros((512, 10))}
loss_and_grads = jax.value_and_grad(lambda p, x, y: ((x @ p["weight"] - y) ** 2).mean())
""",
    "lucid": """
import lucid
batches = [tuple(map(lucid.Tensor, batch)) for batch in batches]
""",
    "numpy": "",
}
CHECK = """
opt.close()
first = float((batches[0][1] ** 2).mean().item())
assert float(loss.item()) < 0.5 * first, (loss, first)
print("trained")
"""


def test_every_example_is_run():
    assert {param.values[0] for param in TRAINING} == set(FRAMEWORKS)
    assert len(TRAINING) + len(RESUMING) + len(STATE_DICTS) + len(LISTENING) == len(EXAMPLES)


@pytest.mark.any_mpi
@pytest.mark.parametrize(("framework", "example"), TRAINING)
def test_an_example_trains(mpirun, tmp_path, framework, example):
    require(framework)
    few = "batches = batches[:100]\n" if "import optax" in example else ""  # it takes more time
    source = BATCHES + few + GIVEN[framework] + example + CHECK
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
@pytest.mark.parametrize("example", RESUMING)
def test_an_example_of_checkpoints_resumes(mpirun, example):
    require("torch")
    keeps_scheduler = "scheduler" in example
    for num_ranks, length, taken, saved in (2, 250, "1 250 250", 200), (1, 320, "201 320 120", 300):
        num_scheduled = length if keeps_scheduler else int(taken.split()[-1])
        ending = "print(f'{taken[0]} {taken[-1]} {len(taken)} {scheduler.last_epoch}\\n', end='')"
        source = CHECKPOINTS.replace("LENGTH", str(length)) + example + ending
        job = mpirun(num_ranks, source=source)
        assert job.returncode == 0, job.output
        assert job.stdout.splitlines() == [f"{taken} {num_scheduled}"] * num_ranks
        assert (mpirun.folder / "checkpoints" / f"step-{saved:012d}").is_dir()


@pytest.mark.any_mpi
@pytest.mark.parametrize("example", STATE_DICTS)
def test_an_example_of_state_dicts_resumes(mpirun, example):
    require("torch")
    before = """
for batch in batches:
    train_step(*batch)
rank, kept = MPI.COMM_WORLD.rank, model.weight.detach().clone()
"""
    after = """
assert torch.equal(model.weight, kept)
train_step(*batches[0])
assert opt.state[model.weight]["step"] == 4
print("resumed")
"""
    example = example.replace("...\n", "MPI.COMM_WORLD.Barrier()\ntrain_step(*batches[0])\n")
    job = mpirun(2, source=CHECKPOINTS.replace("LENGTH", "3") + before + example + after)
    assert job.returncode == 0, job.output
    assert job.stdout.count("resumed") == 2


LISTENED = """
import numpy as np
from shardopt.numpy import NAdam, Parameter

params = [Parameter(np.ones(5, np.float32))]
opt = NAdam(params, max_grad_norm=1.0)

class Writer:  # what TensorBoard's SummaryWriter has of it
    def __init__(self):
        self.told = []
    def add_scalar(self, tag, value, step):
        self.told.append((tag, value, step))
    def add_scalars(self, tag, values, step):
        self.told.append((tag, sorted(values), step))
    def close(self):
        self.told.append("closed")

def make_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return Writer()
    return SummaryWriter("runs")

writer = make_writer()
"""
HEARD = """
for step in range(1, 4):
    params[0].grad[...] = step
    opt.step()
opt.close()
if opt.comm.rank == 0:
    from pathlib import Path
    if "CsvListener" in globals():
        rows = [line.split(",") for line in Path("steps.csv").read_text().splitlines()]
        assert [row[0] for row in rows] == ["1", "2", "3"], rows
        norms = [float(row[1]) for row in rows]
        assert np.allclose(norms, np.sqrt(5) * np.arange(1, 4)), norms
        assert all(len(row) == 6 and float(row[5]) > 0 for row in rows), rows
    elif isinstance(writer, Writer):
        phases = ["agree", "finish", "reduce", "update"]
        told = [[("seconds", phases, s), ("grad_norm", s)] for s in range(1, 4)]
        heard = [(t[0], t[2]) if t[0] == "grad_norm" else t for t in writer.told[:-1]]
        assert heard == sum(told, []) and writer.told[-1] == "closed", writer.told
    else:
        assert list(Path("runs").glob("events*"))
    print("heard")
"""


@pytest.mark.any_mpi
@pytest.mark.parametrize("example", LISTENING)
def test_an_example_of_listeners_hears_of_each_step(mpirun, example):
    job = mpirun(2, source=LISTENED + example + HEARD)
    assert job.returncode == 0, job.output
    assert job.stdout.count("heard") == 1
