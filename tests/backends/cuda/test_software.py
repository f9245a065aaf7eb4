"""What is installed for GPUs, told from files, versions and errors."""

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardopt.backends.cuda import software

ROOT = Path(__file__).parents[3]
PROC = """NVRM version: NVIDIA UNIX {kind}x86_64 Kernel Module  {version}  Release Build  (x@y)
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""


@pytest.mark.parametrize("kind", ["", "Open Kernel Module for "])
@pytest.mark.parametrize("version", ["580.65.06", "535.104", "470.57.02"])
def test_the_version_of_the_driver(kind, version):
    text = PROC.format(kind=kind, version=version).replace("Module for x", "Module for  x")
    assert software.parse_driver(text) == version


def test_no_version():
    assert software.parse_driver("something else") is None
    assert software.parse_cuda(0) is None
    assert [software.parse_cuda(n) for n in (12090, 13000)] == ["12.9", "13.0"]


CUPY = """
class CUDARuntimeError(RuntimeError):
    pass

class runtime:
    CUDARuntimeError = CUDARuntimeError

    @staticmethod
    def driverGetVersion():
        return {driver}

    @staticmethod
    def getDeviceCount():
        if {count} < 0:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: too old")
        return {count}

class cuda:
    runtime = runtime

__version__ = "{version}"
"""
NVRTC = "def getVersion():\n    {answer}\n"


def test_the_extras_that_messages_name_have_the_version_that_is_needed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for extra in ("cuda12", "cuda13"):
        cupy, nvrtc, headers = project["optional-dependencies"][extra]
        assert cupy == f"cupy-{extra}x>={software.CUPY_MAJOR}"
        assert nvrtc.startswith("nvidia-cuda-nvrtc")
        assert headers.startswith("nvidia-cuda-runtime")


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """Examine a CuPy of a few lines that is found before any other, and a driver."""

    def examine(cupy, driver=None, nvrtc="return 13, 0", headers="/usr/include"):
        libs = tmp_path / "cupy_backends" / "cuda" / "libs"
        libs.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cupy.py").write_text(cupy)
        (libs / "nvrtc.py").write_text(NVRTC.format(answer=nvrtc))
        for name in [name for name in sys.modules if name.startswith("cupy")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        pathfinder = SimpleNamespace(find_nvidia_header_directory={"cudart": headers}.get)
        monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(software, "read_driver", lambda: driver)
        found = software.examine_software()
        for name in [name for name in sys.modules if name.startswith("cupy")]:
            del sys.modules[name]
        return found

    return examine


def cupy(version="14.2.0", driver=13000, count=2):
    """A module with the calls that are looked at."""
    return CUPY.format(version=version, driver=driver, count=count)


def test_all_is_there(examine):
    assert examine(cupy()) == software.Software(None, "14.2.0", "13.0", 2, None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"version": "13.6.0"}, "CuPy is too old (13.6.0). Install version 14: pip install"),
        ({"driver": 0, "count": -1}, "CUDA refuses to start (cudaErrorInsufficientDriver: too "),
        ({"count": 0}, "CUDA shows no GPU. Check CUDA_VISIBLE_DEVICES."),
    ],
)
def test_something_is_missing(examine, settings, told):
    assert examine(cupy(**settings)).problem.startswith(told)


def test_the_compiler_is_missing(examine):
    found = examine(cupy(), "535.104", "raise OSError('no libnvrtc.so.12\\n')")
    told = "NVRTC is not found (no libnvrtc.so.12). Install it: pip install 'shardopt[cuda12]'."
    assert found.problem == told
    found = examine(cupy(), "580.65.06", headers=None)
    told = "The headers of CUDA are not found. Install them: pip install 'shardopt[cuda13]'."
    assert found.problem == told


@pytest.mark.parametrize(
    ("driver", "error", "told"),
    [
        (
            None,
            "No module named 'cupy'",
            "pip install 'shardopt[cuda12]', or [cuda13] with a drive",
        ),
        (
            "580.65.06",
            "No module named 'cupy'",
            "not installed. Install it: pip install 'shardopt[",
        ),
        ("580.65.06", "No module named 'cupy'", "[cuda13]'."),
        ("535.104", "No module named 'cupy'", "[cuda12]'."),
        ("535.104", "\\n===\\nlibcuda.so.1: no such file", "CuPy cannot be imported (===)."),
    ],
)
def test_cupy_cannot_be_imported(examine, driver, error, told):
    found = examine(f'raise ImportError("{error}")', driver)
    assert (found.driver, found.cupy, found.num_devices) == (driver, None, 0)
    assert told in found.problem
