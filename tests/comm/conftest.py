"""Start whole jobs."""

import os
from pathlib import Path

import pytest

from tests.support.jobs import PRELUDE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(mpirun):
    """Run a script of one or several lines that follow ``PRELUDE``."""

    def run(num_ranks, body, **settings):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return mpirun(num_ranks, source=PRELUDE + body, env={"PYTHONPATH": path}, **settings)

    return run
