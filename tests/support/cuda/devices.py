"""Devices for ``CudaKernel`` that compute on the CPU what a GPU would."""

import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from shardopt.backends.base import Rows
from shardopt.backends.cuda.kernel import FLAG_UNSET, CudaKernel
from tests.support.cuda import nvrtc
from tests.support.cuda.memory import Memory
from tests.support.cuda.ptx_machine import Machine
from tests.support.cuda.ptx_program import Program
from tests.support.kernel_arrays import HostKernel


class _HostDevice:
    """The part of a device that does not depend on what runs the kernel."""

    def __init__(self, memory):
        self.memory = memory
        self.flag = memory.array(np.array([FLAG_UNSET]))
        self.launches = []

    def upload(self, table):
        return self.memory.array(table)

    def take_flag(self):
        found = int(self.flag[0])
        self.flag[0] = FLAG_UNSET
        return found


class PtxDevice(_HostDevice):
    """Compiles for an architecture, and interprets the PTX.

    Args:
        architecture: For example ``sm_90``.
        memory: What kernels may access.
        compile_text: Returns what NVRTC makes of a text, options and an architecture.

    Attributes:
        launches: Name and number of blocks of each launch.
    """

    def __init__(self, architecture="sm_90", memory=None, compile_text=nvrtc.compile_text):
        super().__init__(memory or Memory())
        self._architecture, self._compile = architecture, compile_text

    def load(self, name, text, options):
        program = Program(self._compile(text, options, self._architecture).ptx, name)

        def launch(blocks, threads, argument):
            self.launches.append((name, blocks))
            Machine(program, self.memory).launch(blocks, threads, argument)

        return launch


class CppDevice(_HostDevice):
    """Compiles the same text with g++.

    Args:
        folder: Where to put what it makes.
    """

    def __init__(self, folder):
        super().__init__(Memory())
        self._folder = folder

    def load(self, name, text, options):
        source = self._folder / f"fused-{len(list(self._folder.iterdir()))}.cpp"
        source.write_text(text, encoding="utf-8")
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall"]
        flags += ["-Wno-unknown-pragmas", f"-I{Path(__file__).parent}", *options]
        subprocess.run(["g++", *flags, source, "-o", source.with_suffix(".so")], check=True)
        kernel = getattr(ctypes.CDLL(str(source.with_suffix(".so"))), name)

        def launch(blocks, threads, argument):
            self.launches.append((name, blocks))
            kernel(ctypes.create_string_buffer(argument, len(argument)), ctypes.c_uint32(blocks))

        return launch


def require_compiler():
    """Skip a test where there is no C++ compiler."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++ to compile the kernel's text as C++")


class DeviceKernel(HostKernel):
    """Calls ``CudaKernel`` with host arrays, by way of the memory of its device."""

    def __init__(self, device):
        super().__init__(CudaKernel(device))
        self.device = device

    def update(self, sources, targets, state, plan):
        """Return the first poisoned position."""
        with self._on_device() as array:
            inner_targets = [array(target) for target in targets]
            inner_state = {key: array(values) for key, values in state.items()}
            rows = Rows.of(*map(array, sources)), Rows.of(*inner_targets)
            self.kernel.update(*rows, inner_state, plan)
            for outer, inner in zip(targets, inner_targets, strict=True):
                outer[...] = inner
            for key, values in state.items():
                values[...] = inner_state[key]
        return self.kernel.take_poisoned()

    def reduce(self, sources, out, span, square_sums=None, factor=1.0):
        """Bring the results back; ``out`` may be one of the sources, or part of it."""
        with self._on_device() as array:
            inner_out = None if out is None else array(out)
            inner_squares = None if square_sums is None else array(square_sums)
            self.kernel.reduce(
                Rows.of(*map(array, sources)), inner_out, span, inner_squares, factor
            )
            if out is not None:
                out[...] = inner_out
            if square_sums is not None:
                square_sums[...] = inner_squares

    @contextlib.contextmanager
    def _on_device(self):
        arrays, memory = [], self.device.memory

        def array(values):
            arrays.append(memory.array(np.ascontiguousarray(values)))
            return arrays[-1]

        yield array
        for each in arrays:
            memory.free(each)
