"""The text that the tests of the training job learn from."""

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of similar files, of which only file17.py is held out."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        lines = [f"def f{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(100)]
        (folder / f"file{i}.py").write_text("".join(lines))
    return folder
