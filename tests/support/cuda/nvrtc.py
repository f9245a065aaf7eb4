"""NVIDIA's compiler and its tools, which need neither a GPU nor a driver.

They are in .test-env/cuda, which tests/run.sh makes.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CUPY_OPTIONS = ("-std=c++17", "-ftz=true", "--device-as-default-execution-space")
"""What CuPy compiles with, beside the options that it is given."""

_FOLDER = Path(__file__).parents[3] / ".test-env" / "cuda"


def is_there():
    """Whether the tools are installed."""
    return _find("lib/libnvrtc.so.13") is not None


def require():
    """Skip a test where the tools could not be installed."""
    if not is_there():
        missing = _FOLDER / "missing"
        if missing.exists():
            pytest.skip(missing.read_text(encoding="utf-8").strip())
        pytest.skip(".test-env/cuda has no compiler for GPUs; tests/run.sh puts it there")


def _find(pattern):
    """Return a file of the tools, or None."""
    return next(_FOLDER.glob(f"lib/python3.*/site-packages/nvidia/cu13/{pattern}"), None)


class CompileError(Exception):
    """The compiler refuses a text."""


@dataclass(frozen=True)
class Compiled:
    """A module for one architecture."""

    ptx: str
    cubin: bytes = field(repr=False)

    def resources(self):
        """Return what ptxas says of each kernel, for example ``{"update": {"REG": 59}}``."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [_find("bin/cuobjdump"), "--dump-resource-usage", file.name]
            listing = subprocess.check_output(command, text=True)
        return {
            name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
            for name, usage in re.findall(r"Function (\w+):\s*\n([^\n]*)", listing)
        }


@functools.cache
def _library():
    builtins = _find("lib/libnvrtc-builtins.so.13.*")
    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # NVRTC does not look beside itself
    return ctypes.CDLL(str(_find("lib/libnvrtc.so.13")))


@functools.cache
def compile_text(text, options, architecture="sm_90"):
    """Compile CUDA C++ as CuPy does, once in a run."""
    library, program = _library(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"fused.cu", 0, None, None)
    flags = [f"-arch={architecture}", *CUPY_OPTIONS, *options]
    array = (ctypes.c_char_p * len(flags))(*[flag.encode() for flag in flags])

    def result(name):
        nbytes = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(nbytes))
        buffer = ctypes.create_string_buffer(nbytes.value)
        getattr(library, f"nvrtcGet{name}")(program, buffer)
        return buffer.raw

    try:
        if library.nvrtcCompileProgram(program, len(flags), array):
            raise CompileError(result("ProgramLog").decode())
        return Compiled(result("PTX").rstrip(b"\0").decode(), result("CUBIN"))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
