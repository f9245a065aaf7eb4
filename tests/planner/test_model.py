"""Models from counts, files and scripts."""

import textwrap

import numpy as np
import pytest

from shardopt.errors import PlanError
from shardopt.planner.model import evenly, load_model, read_safetensors


def write_script(folder, source):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(source))
    return f"{path}:make_model"


def shapes(model):
    return [(spec.name, spec.shape, spec.dtype) for spec in model.specs]


def test_equal_tensors():
    model = evenly(1003, "bfloat16", 4)
    assert [spec.numel for spec in model.specs] == [250, 251, 251, 251]
    assert (model.numel, len(evenly(2, "float32", 8).specs)) == (1003, 2)
    with pytest.raises(PlanError, match="parameters must be float16, .*; got int8"):
        evenly(4, "int8", 1)


def test_headers_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.save_file({"w": np.zeros((3, 4), np.float32)}, first, {"format": "np"})
    safetensors.save_file({"v": np.zeros((), np.float16)}, second)
    with first.open("r+b") as file:  # no tensor is read
        file.truncate(first.stat().st_size - 40)
    model = read_safetensors([first, second])
    assert shapes(model) == [("w", (3, 4), "float32"), ("v", (), "float16")]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x10" + b"\0" * 7 + b'{"w": {"shape":1'],
)
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(PlanError, match="--safetensors must name files .*; got "):
        read_safetensors([path])


def test_embeddings_of_a_module_of_torch_are_known(tmp_path):
    pytest.importorskip("torch")
    target = write_script(
        tmp_path,
        """
        import torch
        def make_model():
            model = torch.nn.ModuleDict({"words": torch.nn.Embedding(9000, 4)})
            model["head"] = torch.nn.Linear(4, 9000)
            model["head"].weight = model["words"].weight
            return model
        """,
    )
    assert load_model(target).embeddings == {"words.weight"}


def test_a_module_of_torch_is_not_allocated(tmp_path):
    pytest.importorskip("torch")
    target = write_script(
        tmp_path,
        """
        import torch
        def make_model():
            model = torch.nn.Linear(1 << 22, 1 << 20, bias=False)  # 16 TiB
            assert model.weight.is_meta
            head = torch.nn.Linear(3, 2, dtype=torch.bfloat16).requires_grad_(False)
            return torch.nn.ModuleList([model, head])
        """,
    )
    model = load_model(target)
    assert shapes(model) == [
        ("0.weight", (1 << 20, 1 << 22), "float32"),
        ("1.weight", (2, 3), "bfloat16"),
        ("1.bias", (2,), "bfloat16"),
    ]
    assert not model.embeddings
    assert model.framework == "torch"
    assert [spec.name for spec in model.trained_specs] == ["0.weight"]


def test_a_pytree_of_jax_is_only_traced(tmp_path):
    pytest.importorskip("jax")
    target = write_script(
        tmp_path,
        """
        import jax.numpy as jnp
        def make_model():
            return {"w": jnp.zeros((1 << 22, 1 << 20), jnp.bfloat16), "b": [jnp.zeros(3)]}
        """,
    )
    model = load_model(target)
    assert model.framework == "jax"
    found = sorted(shapes(model))
    assert found == [("b.0", (3,), "float32"), ("w", (1 << 22, 1 << 20), "bfloat16")]


def test_arrays_of_numpy(tmp_path):
    target = write_script(
        tmp_path,
        """
        import numpy as np
        from shardopt.numpy import Parameter
        def make_model():
            return {"a": np.zeros((2, 3)), "b": (np.zeros(4, "f4"), Parameter(np.ones(5, "f4")))}
        """,
    )
    model = load_model(target)
    assert model.framework == "numpy"
    assert shapes(model) == [
        ("a", (2, 3), "float64"),
        ("b.0", (4,), "float32"),
        ("b.1", (5,), "float32"),
    ]


@pytest.mark.parametrize(
    ("made", "framework"),
    [
        ("np.zeros(3).view(Mine)", "numpy"),
        ("Parameter(np.zeros(3))", "numpy"),
        ("types.SimpleNamespace(data=types.SimpleNamespace(shape=(3,), dtype='float32'))", None),
    ],
)
def test_the_framework_behind_classes_of_users(tmp_path, made, framework):
    source = f"""
        import types
        import numpy as np
        from shardopt.numpy import Parameter
        class Mine(np.ndarray):
            pass
        def make_model():
            return {{"a": {made}}}
        """
    assert load_model(write_script(tmp_path, source)).framework == framework


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("make_model = 3", "--model must name a function in .*; got 'make_model'"),
        ("def make_model(): return 3", "--model must return a module, or arrays .*; got int"),
        ("def make_model(): return {'a': [None]}", "got NoneType at a.0"),
        ("def make_model(): return {}", "a model must have parameters; got none"),
        ("import numpy\ndef make_model(): return numpy.arange(3)", "must be float16.*; got int64"),
    ],
)
def test_a_script_that_makes_no_model(tmp_path, source, told):
    with pytest.raises(PlanError, match=told):
        load_model(write_script(tmp_path, source))


@pytest.mark.parametrize("target", ["script.py", "none.py:make_model", ":x"])
def test_no_script(target):
    with pytest.raises(PlanError, match=r"--model must be script\.py:function; got "):
        load_model(target)
