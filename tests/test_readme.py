"""What the README shows works as shown."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_example_trains(mpirun, num_ranks):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    batches = """
import numpy as np
rng = np.random.default_rng(0)
truth = rng.standard_normal((512, 10)).astype(np.float32) / 20
xs = rng.standard_normal((200, 32, 512)).astype(np.float32)
batches = [(x, x @ truth) for x in xs]
"""
    check = "\nassert np.abs(error).mean() < 0.8 * np.abs(batches[0][1]).mean()\nprint('trained')\n"
    job = mpirun(num_ranks, source=batches + example + check)
    assert job.returncode == 0, job.output
    assert job.stdout.count("trained") == num_ranks


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link
