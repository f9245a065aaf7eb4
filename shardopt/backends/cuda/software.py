"""The software for GPUs that this process finds: CuPy, NVRTC, and the driver."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

CUPY_MAJOR = 14
"""The first version of CuPy that has bfloat16."""

_DRIVER = Path("/proc/driver/nvidia/version")
_FIRST_FOR_CUDA_13 = 580  # the first driver that runs what CUDA 13 compiles


@dataclass(frozen=True, slots=True)
class Software:
    """The software for GPUs that this process can use.

    Attributes:
        driver: The version of NVIDIA's driver, or None if the system does not show it.
        cupy: The version of CuPy, or None if it cannot be imported.
        cuda: The newest version of CUDA that the driver supports, or None if there is no driver.
        num_devices: Number of GPUs that this process sees.
        problem: Why it cannot compute on a GPU, and the remedy, in sentences; None if it can.
    """

    driver: str | None
    cupy: str | None
    cuda: str | None
    num_devices: int
    problem: str | None


def examine_software() -> Software:
    """Import CuPy and find out what it can use; takes a second, and allocates nothing."""
    driver = read_driver()
    try:
        import cupy
    except ImportError as error:
        return Software(driver, None, None, 0, _explain_import(str(error), driver))
    version: str = cupy.__version__
    if int(version.split(".")[0]) < CUPY_MAJOR:
        problem = f"CuPy is too old ({version}). Install version {CUPY_MAJOR}: {_install(driver)}."
        return Software(driver, version, None, 0, problem)
    runtime = cupy.cuda.runtime
    try:
        cuda = parse_cuda(int(runtime.driverGetVersion()))
        num_devices = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        problem = f"CUDA refuses to start ({error}). Compare nvidia-smi."
        return Software(driver, version, None, 0, problem)
    if not num_devices:
        problem = "CUDA shows no GPU. Check CUDA_VISIBLE_DEVICES."
        return Software(driver, version, cuda, 0, problem)
    return Software(driver, version, cuda, num_devices, _why_no_compiler(driver))


def read_driver() -> str | None:
    """Return the version of NVIDIA's driver, such as ``580.65.06``, or None if there is none."""
    try:
        return parse_driver(_DRIVER.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def parse_driver(text: str) -> str | None:
    """Return the version of the driver from the text of its file in ``/proc``, or None."""
    match = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text, re.MULTILINE)
    return match[1] if match else None


def parse_cuda(number: int) -> str | None:
    """Return a version of CUDA in its usual form: 13000 is 13.0; None for 0, without a driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _install(driver: str | None) -> str:
    """Return the command that installs what GPUs need."""
    if driver is None:
        return "pip install 'shardopt[cuda12]', or [cuda13] with a driver for CUDA 13"
    is_new = int(driver.split(".")[0]) >= _FIRST_FOR_CUDA_13
    return f"pip install 'shardopt[{'cuda13' if is_new else 'cuda12'}]'"


def _explain_import(error: str, driver: str | None) -> str:
    if "No module named 'cupy'" in error:
        return f"CuPy is not installed. Install it: {_install(driver)}."
    first_line = next(filter(None, map(str.strip, error.splitlines())), "no reason given")
    return f"CuPy cannot be imported ({first_line}). Install it anew: {_install(driver)}."


def _why_no_compiler(driver: str | None) -> str | None:
    """Return what CuPy lacks to compile kernels, or None if it lacks nothing."""
    try:
        from cuda import pathfinder  # with which CuPy looks for both
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        headers = pathfinder.find_nvidia_header_directory("cudart")
    except Exception as error:  # of the loader, in classes of its own
        first_line = str(error).strip().split("\n")[0]
        return f"NVRTC is not found ({first_line}). Install it: {_install(driver)}."
    if headers is None and "CUDA_PATH" not in os.environ:
        return f"The headers of CUDA are not found. Install them: {_install(driver)}."
    return None
