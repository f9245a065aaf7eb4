"""What runs where: the lists name files that exist, and no pair of values is left out."""

import itertools
from pathlib import Path

from tests.conftest import TESTS
from tests.support.parts import MARKED_WHOLE, ON_RANKS, SHOWN_BY_TWO, belongs_to, covering


def test_every_name_in_the_lists_exists():
    named = {*SHOWN_BY_TWO}.union(*ON_RANKS.values())
    assert [name for name in named if not (TESTS / name).exists()] == []


def test_every_file_runs_on_two_ranks_or_on_three():
    for path in {*TESTS.rglob("test_*.py")} - {Path(__file__)}:
        on_two, on_three = belongs_to("two", path), belongs_to("three", path)
        assert on_two or (on_three and "up_to_two_ranks" not in path.read_text())
    assert belongs_to("three", TESTS / "core" / "test_that_is_new.py")


def test_every_pair_of_values_runs():
    sizes = (4, 3, 2, 5)
    combinations = {
        values: {*itertools.combinations(enumerate(values), 2)}
        for values in itertools.product(*map(range, sizes))
    }
    kept = covering(combinations)
    assert set().union(*map(combinations.get, kept)) == set().union(*combinations.values())
    assert 4 * 5 <= len(kept) <= 30
    assert kept == covering(combinations)


def test_no_combination_of_one_or_two_parameters_is_left_out():
    one = {value: set() for value in range(3)}
    assert covering(one) == one.keys()
    two = {values: {tuple(enumerate(values))} for values in itertools.product(range(3), range(4))}
    assert covering(two) == two.keys()


def test_files_of_which_all_tests_run_on_ranks():
    assert MARKED_WHOLE.search("import x\n\npytestmark = pytest.mark.mpi\n")
    assert MARKED_WHOLE.search(
        "pytestmark = [\n    needs_torch,\n    pytest.mark.mpi(min_size=2),\n]"
    )
    assert not MARKED_WHOLE.search("pytestmark = [x]\n\n@pytest.mark.mpi\n")
    assert not MARKED_WHOLE.search("pytestmark = pytest.mark.mpirun\n")
