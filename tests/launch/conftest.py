"""What the tests of the example read."""

import pytest


@pytest.fixture
def text(tmp_path):
    """A folder of many small files, so that some are held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(60):
        lines = [f"def f{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(40)]
        (folder / f"file{i}.py").write_text("".join(lines))
    return folder
