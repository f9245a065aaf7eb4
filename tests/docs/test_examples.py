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

TRAINING = {  # by framework, as one job runs all examples of one
    framework: {
        f"{name_of(page)}, example {number}": example
        for number, (page, example) in enumerate(EXAMPLES)
        if f"from shardopt.{framework} import" in example
    }
    for framework in FRAMEWORKS
}
RESUMING = {
    f"{name_of(page)}, example {number}": example
    for number, (page, example) in enumerate(EXAMPLES)
    if "Checkpointer(" in example
}
LISTENING = {
    f"{name_of(page)}, example {number}": example
    for number, (page, example) in enumerate(EXAMPLES)
    if "opt.listeners.append(" in example
}
STATE_DICTS = [
    pytest.param(example, id=name_of(page))
    for page, example in EXAMPLES
    if "torch.save(" in example
]

BATCHES = """
import numpy as np
rng = np.random.default_rng(0)
truth = rng.standard_normal((512, 10)).astype(np.float32) / 20
xs = rng.standard_normal((100, 32, 512)).astype(np.float32)
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
batches = [tuple(map(lucid.Tensor, batch)) for batch in 4 * batches]  # starts far off
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
    assert all(TRAINING.values())
    num_training = sum(map(len, TRAINING.values()))
    assert num_training + len(RESUMING) + len(STATE_DICTS) + len(LISTENING) == len(EXAMPLES)


def one_after_the_other(before, examples, after):
    """Return the text of a job that runs each example in names of its own."""
    programs = {name: before + example + after for name, example in examples.items()}
    return f"""
for name, program in {programs!r}.items():
    exec(compile(program, name, "exec"), {{"__name__": "__main__"}})
"""


@pytest.mark.any_mpi
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_examples_train(mpirun, tmp_path, framework):
    require(framework)
    examples = TRAINING[framework]
    source = one_after_the_other(BATCHES + GIVEN[framework], examples, CHECK)
    job = mpirun(2, source=source, env=environment_for(framework, tmp_path), timeout_s=110)
    assert job.returncode == 0, job.output
    assert job.stdout.count("trained") == 2 * len(examples)


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
def test_examples_of_checkpoints_resume(mpirun):
    require("torch")
    folders = {name: f"checkpoints-{number}" for number, name in enumerate(RESUMING)}
    examples = {
        name: example.replace('"checkpoints"', f'"{folders[name]}"')
        for name, example in RESUMING.items()
    }
    for num_ranks, length, taken, saved in (2, 250, "1 250 250", 200), (1, 320, "201 320 120", 300):
        expected = []
        for example in examples.values():
            num_scheduled = length if "scheduler" in example else int(taken.split()[-1])
            expected += [f"{taken} {num_scheduled}"] * num_ranks
        ending = "print(f'{taken[0]} {taken[-1]} {len(taken)} {scheduler.last_epoch}\\n', end='')"
        before = CHECKPOINTS.replace("LENGTH", str(length))
        job = mpirun(num_ranks, source=one_after_the_other(before, examples, ending))
        assert job.returncode == 0, job.output
        assert sorted(job.stdout.splitlines()) == sorted(expected)
        for folder in folders.values():
            assert (mpirun.folder / folder / f"step-{saved:012d}").is_dir()


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
from importlib.util import find_spec
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
    if not find_spec("tensorboard"):  # torch, which loads it, takes seconds to load itself
        return Writer()
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
def test_examples_of_listeners_hear_of_each_step(mpirun):
    job = mpirun(2, source=one_after_the_other(LISTENED, LISTENING, HEARD))
    assert job.returncode == 0, job.output
    assert job.stdout.count("heard") == len(LISTENING)
