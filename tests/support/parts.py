"""Which tests a run takes; tests/run.sh names its part, and this file says what belongs to it.

Every test is of one of three kinds: it runs on ranks (marked ``mpi``), starts jobs (the fixture
``mpirun``), or neither. Files with no test of the kind that a run takes are not even imported.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from tests.conftest import TESTS
from tests.support.in_step import runs_with_mpi

WITHOUT_RANKS = ("plain", "jobs", "mpi-jobs")
SHOWN_BY_TWO = (
    "checkpoint/test_alignment.py",  # files
    "checkpoint/test_bad_rng.py",
    "checkpoint/test_damage.py",
    "checkpoint/test_disk_faults.py",
    "checkpoint/test_interop.py",
    "checkpoint/test_other_models.py",
    "checkpoint/test_other_optimizer.py",
    "checkpoint/test_partial.py",
    "checkpoint/test_power_loss.py",
    "checkpoint/test_small_states.py",
    "checkpoint/test_whole_model.py",
    "core/test_bad_input.py",  # tests/comm and test_bad_step.py have three ranks disagree
    "core/test_bad_state.py",
    "core/test_edited_groups.py",  # settings
    "core/test_settings.py",
    "core/test_sixteen_bits.py",  # arithmetic
    "core/test_state_view.py",
    "devices/test_arrays.py",  # test_steps.py runs on three, test_nodes.py on four
    "devices/test_checkpoints.py",
    "devices/test_memory.py",
    "devices/test_nodes.py",
    "devices/test_offload.py",
    "devices/test_order.py",
    "devices/test_params.py",
    "devices/test_state.py",
    "devices/test_writes.py",
    "jax",  # tests/nodes runs every front end on any number of ranks
    "params",
    "planner/test_real_settings.py",
    "test_lucid.py",
    "torch",
)
"""What a third rank does not change. On two cores, two ranks take a third of the time of three."""

EVEN = (
    "checkpoint/test_save_load.py",
    "comm",
    "core/test_stage_two.py",
    "core/test_state_dict.py",
    "core/test_step.py",
    "nodes",
    "torch/test_stage_two.py",
    "transport",
)
"""What may change where shards and nodes are of the same size, as those of four ranks are."""

ON_RANKS = {
    "one": (  # neighbours, other nodes and other shards are missing
        "checkpoint/test_checkpointer.py",
        "checkpoint/test_golden.py",
        "checkpoint/test_interop.py",
        "checkpoint/test_load.py",
        "checkpoint/test_save_load.py",
        "cli",
        "comm",
        "core/test_average_grads.py",
        "core/test_bad_step.py",
        "core/test_golden.py",
        "core/test_kept_sums.py",
        "core/test_non_finite.py",
        "core/test_optimizer.py",
        "core/test_settings.py",
        "core/test_stage_two.py",
        "core/test_state_dict.py",
        "core/test_step.py",
        "devices/test_steps.py",
        "jax/test_stage_two.py",
        "jax/test_state.py",
        "jax/test_transformation.py",
        "measure",
        "planner",
        "support",
        "test_lucid.py",
        "torch/test_amp.py",
        "torch/test_interface.py",
        "torch/test_stage_two.py",
        "torch/test_training.py",
        "transport",
    ),
    "two": (*SHOWN_BY_TWO, "checkpoint/test_load.py", "core/test_average_grads.py"),
    "three": (
        "torch/test_shards.py",
        "torch/test_stage_two.py",
        "torch/test_stage_two_nodes.py",
        "torch/test_update_in_backward.py",
    ),
    "four": (  # also nodes of two ranks
        *EVEN,
        "core/test_small_states.py",
        "core/test_unequal_writes.py",
        "core/test_writes.py",
        "devices/test_nodes.py",
        "jax/test_stage_two.py",  # sums of two are rounded alike in any number of rounds
        "measure",
        "overlap/test_prefetch.py",
        "planner/test_real_settings.py",
    ),
    "mpi": (  # messages, communicators, threads within MPI, and how ranks end
        "checkpoint/test_checkpointer.py",
        "checkpoint/test_load.py",
        "checkpoint/test_save_load.py",
        "cli",
        "comm",
        "core/test_bad_step.py",
        "core/test_stage_two.py",
        "core/test_state_dict.py",
        "core/test_step.py",
        "measure",
        "nodes/test_bits.py",
        "nodes/test_checkpoints.py",
        "nodes/test_stage_two.py",
        "nodes/test_update_in_backward.py",
        "overlap",
        "support",
        "torch/test_training.py",
        "transport",
    ),
}
"""By part, the files and folders that it takes; "three" also all that are not named above."""

T = TypeVar("T")
Pair = tuple[tuple[str, int], tuple[str, int]]
"""Two parameters, with what identifies their values."""

MARKED_WHOLE = re.compile(r"^pytestmark = (\[[^\]]*)?pytest\.mark\.mpi\b", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that tests/run.sh uses."""
    parser.addoption(
        "--part",
        choices=[*WITHOUT_RANKS, *ON_RANKS],
        help="of the tests without ranks: those that start no mpirun, those that do, or those of "
        "them that are not marked any_mpi; of the tests on ranks: those for so many ranks, or for "
        "another MPI library. tests/support/parts.py lists them",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="also run the tests marked thorough, as tests/run.sh --all does",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Thin out combinations, unless all are asked for."""
    if not config.getoption("--thorough") and "long" not in config.getoption("-m"):
        config.pluginmanager.register(Pairs())


@functools.cache
def text_of(path: Path) -> str:
    """Return the text of a file of tests, with that of the fixtures of its folders."""
    folders = [folder for folder in path.parents if TESTS in folder.parents]
    files = [path, *(folder / "conftest.py" for folder in folders)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.exists())


def may_run_on_ranks(text: str) -> bool:
    """Whether the text of a file may mark a test ``mpi``."""
    return "mark.mpi" in text


def may_start_jobs(text: str) -> bool:
    """Whether the text of a file, and its fixtures, may use the fixture ``mpirun``."""
    return "mpirun" in text


def is_in(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is one of those named, or in one of the folders."""
    return any(path.is_relative_to(TESTS / name) for name in names)


def belongs_to(part: str | None, path: Path) -> bool:
    """Whether a part takes the tests of a file that run on ranks."""
    named = is_in(path, ON_RANKS.get(part, ["."]))
    return named or (part == "three" and not is_in(path, SHOWN_BY_TWO))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that have nothing for this run."""
    path, part = collection_path, config.getoption("--part")
    if not (path.name.startswith("test_") and path.suffix == ".py" and TESTS in path.parents):
        return None
    text = text_of(path)
    if runs_with_mpi(config):
        takes = may_run_on_ranks(text) and belongs_to(part, path)
    elif part in ("jobs", "mpi-jobs"):
        takes = may_start_jobs(text)
    else:
        takes = not MARKED_WHOLE.search(text)
    return None if takes else True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that start mpirun themselves, and check that no other run misses a test."""
    if "mpirun" in getattr(item, "fixturenames", ()):
        item.add_marker("mpirun")
    marks = {mark.name for mark in item.iter_markers()}
    for mark, may in (("mpi", may_run_on_ranks), ("mpirun", may_start_jobs)):
        if mark in marks and TESTS in item.path.parents and not may(text_of(item.path)):
            raise pytest.UsageError(
                f"a file with tests for {mark} must say so, or it is not collected for them; got "
                f"{item.nodeid}. Use the mark or the fixture in the file itself."
            )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long or thorough, unless it is asked for, and what ``--part`` does."""
    part, thorough = config.getoption("--part"), config.getoption("--thorough")
    with_long = "long" in config.getoption("-m")

    def runs_now(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        if ("long" in marks and not with_long) or ("thorough" in marks and not thorough):
            return False
        if part in ("mpi", "mpi-jobs") and "any_mpi" in marks:
            return False
        return part not in WITHOUT_RANKS or ("mpirun" in marks) == (part != "plain")

    keep_only(config, items, runs_now)


class Pairs:
    """Thins out tests of many combinations, after all other choices have been made.

    Of a test with three parameters or more, combinations are left out of which every pair of values
    is in another one that runs.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep as many combinations as it takes to run every pair of values."""
        combinations: dict[str, dict[pytest.Item, set[Pair]]] = {}
        for item in items:
            if hasattr(item, "callspec") and not item.get_closest_marker("skip"):
                test = item.nodeid.partition("[")[0]
                # Values are the same objects in all combinations, and may not be comparable.
                values = sorted((name, id(value)) for name, value in item.callspec.params.items())
                combinations.setdefault(test, {})[item] = {*itertools.combinations(values, 2)}
        spare = {item for each in combinations.values() for item in each.keys() - covering(each)}
        keep_only(config, items, lambda item: item not in spare)


def covering(combinations: dict[T, set[Pair]]) -> set[T]:
    """Return some of the combinations, in which all pairs are; of equally good ones the first."""
    missing = set().union(*combinations.values())
    kept = {item for item, pairs in combinations.items() if not pairs}  # of a single parameter
    while missing:
        best = max(combinations, key=lambda item: len(combinations[item] & missing))
        kept.add(best)
        missing -= combinations[best]
    return kept


def keep_only(
    config: pytest.Config, items: list[pytest.Item], runs_now: Callable[[pytest.Item], bool]
) -> None:
    """Deselect all other tests."""
    config.hook.pytest_deselected(items=[item for item in items if not runs_now(item)])
    items[:] = filter(runs_now, items)
