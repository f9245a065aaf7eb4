"""The frameworks that some tests need, where they are installed."""

import os
import typing

import pytest

LEND_OVERRIDE = """
import typing

if not hasattr(typing, "override"):
    typing.override = lambda method: method
"""
"""lucid wants Python 3.12, but of it needs this name only."""

INSTALL = {
    "torch": "pip install '.[torch]'",
    "jax": "pip install '.[jax]'",
    "lucid": "With Python 3.12: pip install '.[lucid]'. With 3.11 too: pip install 'mlx[cpu]'; "
    "pip install --no-deps --ignore-requires-python lucid-dl==2.9.0",
}


def require(framework):
    """Import a framework, or skip the test where it is not installed."""
    if framework == "lucid" and not hasattr(typing, "override"):
        exec(LEND_OVERRIDE, {})
    reason = f"{framework} cannot be imported. {INSTALL.get(framework)}"
    module = pytest.importorskip(framework, reason=reason, exc_type=ImportError)
    if framework == "jax":  # two devices, as tests of placing need; it must be told before its use
        module.config.update("jax_num_cpu_devices", 2)
    return module


def environment_for(framework, folder):
    """Variables with which a job can import a framework as ``require`` does."""
    if framework != "lucid":
        return {}
    (folder / "sitecustomize.py").write_text(LEND_OVERRIDE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
