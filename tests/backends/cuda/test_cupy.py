"""Whatever the backend asks of CuPy is there, where CuPy is installed; no GPU is needed."""

import ast
import inspect
from pathlib import Path

import pytest

import shardopt.backends.cuda

FOLDER = Path(shardopt.backends.cuda.__file__).parent
FILES = [FOLDER / name for name in ("cupy_gpu.py", "device.py", "probing.py")]


def names_in(tree, roots):
    """Return the dotted names in a file that begin with one of some names, such as ``runtime``."""
    names = set()
    for node in ast.walk(tree):
        path = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in roots and path:
            names.add(".".join([roots[node.id], *reversed(path)]))
        if isinstance(node, ast.Name) and node.id == "self" and path[-1:] == ["_runtime"]:
            names.add(".".join(["cupy.cuda.runtime", *reversed(path[:-1])]))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_exist(path):
    cupy = pytest.importorskip("cupy")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = names_in(tree, {"cupy": "cupy", "runtime": "cupy.cuda.runtime"})
    assert len(names) > 3
    for name in names:
        found = cupy
        for part in name.split(".")[1:]:
            found = getattr(found, part)


def test_streams_of_others_are_left_to_them(capfd):
    """CuPy destroys streams of its own only: the stream 1234 does not exist."""
    cupy = pytest.importorskip("cupy")
    from shardopt.backends.cuda.cupy_gpu import _Stream

    stream = cupy.cuda.Stream.from_external(_Stream(1234))
    assert stream.ptr == 1234
    del stream
    assert "Exception" not in capfd.readouterr().err


def test_the_whole_protocol_is_implemented():
    pytest.importorskip("cupy")
    from shardopt.backends.cuda.cupy_gpu import CupyGpu
    from shardopt.backends.cuda.gpu import Gpu

    wanted = {name: each for name, each in vars(Gpu).items() if inspect.isfunction(each)}
    for name, each in wanted.items():
        if not name.startswith("_"):
            assert inspect.signature(getattr(CupyGpu, name)).parameters.keys() == (
                inspect.signature(each).parameters.keys()
            )
