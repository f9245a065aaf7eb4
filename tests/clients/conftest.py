"""The tests of this folder run other people's trainers, in the environment that has them."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardopt import errors

if TYPE_CHECKING:
    from mpi4py import MPI

PROJECTS = ("transformers", "accelerate", "lightning", "timm", "peft", "flax", "equinox", "orbax")
WARNINGS = [name for name in vars(errors) if name.endswith("Warning")]

missing = [name for name in PROJECTS if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if missing else []

# Nothing may look for a hub; what asks one reads this as it is imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_OFFLINE="1")


def pytest_report_header() -> list[str]:
    """Return why nothing is run, where somebody asks for this folder in another environment."""
    how = "bash tests/run.sh --clients"
    return [f"tests/clients: left out without {', '.join(missing)}; {how}"] if missing else []


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let other projects warn, but not this one."""
    ours = [f"error::shardopt.errors.{name}" for name in WARNINGS]
    item.add_marker(pytest.mark.filterwarnings("ignore", *ours))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Leave no state of accelerate to the next test."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def process_group(
    comm: "MPI.Intracomm", mpi_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Have torch.distributed over the ranks, for what other projects do with it."""
    import torch.distributed as dist

    ranks = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.size}
    for name, value in ranks.items():
        monkeypatch.setenv(name, str(value))
    meeting = f"file://{mpi_tmp_path}/process-group"
    dist.init_process_group("gloo", meeting, rank=comm.rank, world_size=comm.size)
    yield
    gc.collect()  # what uses the group must be gone before it
    comm.Barrier()
    dist.destroy_process_group()
