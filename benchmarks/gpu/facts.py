"""Print what this machine's GPU and its software are, one JSON object for each fact.

What one of them needs may be missing: the others are printed all the same. Nothing here needs
shardopt or MPI. ``python -m benchmarks.gpu.facts``
"""

import ctypes
import json
import mmap
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

_PINNED_NBYTES = 1 << 28
_PORTABLE_AND_MAPPED = 3
_PACKAGES = ("numpy", "numba", "mpi4py", "ml_dtypes", "xxhash", "pytest", "pytest-mpi", "torch")
_TOOLS = ("mpiexec", "compute-sanitizer", "nvidia-smi", "nvcc")

Facts = dict[str, Any]


def main() -> int:
    """Print all facts; return 1 if there is no GPU to compute on."""
    has_gpu = True
    for fact in (host, software, driver, gpu, compiler, peers, pinned_memory, torch, nccl):
        try:
            found = fact()
        except Exception as error:  # any: whatever fails is what we want to know
            found = {"error": f"{type(error).__name__}: {error}"}
            has_gpu = has_gpu and fact is not gpu
        print(json.dumps({"fact": fact.__name__, **found}), flush=True)
    return 0 if has_gpu else 1


def host() -> Facts:
    """Return what the machine is."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GB": os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE / 1e9,
        "shm_GB": shutil.disk_usage("/dev/shm").free / 1e9,
        "locked_memory_limit": "none" if soft == resource.RLIM_INFINITY else soft,
    }


def software() -> Facts:
    """Return the versions of packages, and which tools there are."""
    names = [*_PACKAGES, *_cupy_packages()]
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        **{tool: shutil.which(tool) for tool in _TOOLS},
    }


def driver() -> Facts:
    """Return the driver's own description of the GPUs."""
    query = "name,driver_version,memory.total,memory.used,mig.mode.current,compute_mode"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return {query: done.stdout.strip().splitlines(), "problem": done.stderr.strip()}


def gpu() -> Facts:
    """Return the GPU as CuPy sees it, after a first computation on it."""
    cupy: Any = import_module("cupy")
    runtime = cupy.cuda.runtime
    begin_s = time.perf_counter()
    assert int(cupy.arange(1000).sum()) == 499_500
    found = runtime.getDeviceProperties(0)
    return {
        "cupy": cupy.__version__,
        "name": found["name"].decode(),
        "capability": f"{found['major']}.{found['minor']}",
        "memory_GB": found["totalGlobalMem"] / 1e9,
        "count": runtime.getDeviceCount(),
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "first_computation_s": time.perf_counter() - begin_s,
        "bfloat16": str(cupy.zeros(3, _bfloat16()).dtype),
    }


def compiler() -> Facts:
    """Return NVRTC's version, and how long a small kernel takes to compile and launch."""
    cupy: Any = import_module("cupy")
    nvrtc: Any = import_module("cupy_backends.cuda.libs.nvrtc")
    text = 'extern "C" __global__ void mark(long long* out) { out[threadIdx.x] = threadIdx.x; }'
    out = cupy.zeros(32, "int64")
    begin_s = time.perf_counter()
    cupy.RawModule(code=text, options=("-std=c++17",)).get_function("mark")((1,), (32,), (out,))
    assert out.get().tolist() == list(range(32))
    return {"nvrtc": nvrtc.getVersion(), "small_kernel_s": time.perf_counter() - begin_s}


def peers() -> Facts:
    """Return what the driver reports of access between GPUs; ranks of one GPU need none.

    Whether ranks really reach each other's memory is what ``shardopt doctor`` tries.
    """
    runtime: Any = import_module("cupy").cuda.runtime
    count = runtime.getDeviceCount()
    return {
        "deviceCanAccessPeer": [
            [
                one == other or bool(runtime.deviceCanAccessPeer(one, other))
                for other in range(count)
            ]
            for one in range(count)
        ]
    }


def pinned_memory() -> Facts:
    """Pin memory as shardopt does: shared with other processes, by one call."""
    runtime: Any = import_module("cupy").cuda.runtime
    file = os.memfd_create("pinned")
    os.ftruncate(file, _PINNED_NBYTES)
    memory = mmap.mmap(file, _PINNED_NBYTES)
    os.close(file)
    buffer = (ctypes.c_char * _PINNED_NBYTES).from_buffer(memory)
    address = ctypes.addressof(buffer)
    begin_s = time.perf_counter()
    runtime.hostRegister(address, _PINNED_NBYTES, _PORTABLE_AND_MAPPED)
    spent_s = time.perf_counter() - begin_s
    runtime.hostUnregister(address)
    del buffer
    memory.close()
    return {"pinned_GB": _PINNED_NBYTES / 1e9, "GB/s": _PINNED_NBYTES / 1e9 / spent_s}


def torch() -> Facts:
    """Return whether autograd adds gradients to memory that PyTorch did not allocate."""
    torch: Any = import_module("torch")
    cupy: Any = import_module("cupy")
    param = torch.from_dlpack(cupy.ones(8, "float32")).requires_grad_()
    param.grad = torch.from_dlpack(cupy.zeros(8, "float32"))
    before = param.grad.data_ptr()
    (param * 3).sum().backward()
    torch.cuda.synchronize()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "stays_in_place": param.grad.data_ptr() == before,
        "grad": param.grad[0].item(),
        "stream": torch.cuda.current_stream().cuda_stream,
        "bfloat16": str(torch.from_dlpack(cupy.zeros(8, _bfloat16())).dtype),
    }


def nccl() -> Facts:
    """Return which NCCL torch has loaded, and whether it takes several ranks on a GPU."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({line.split()[-1] for line in lines if "libnccl" in line})
    return {
        "libraries": paths,
        "several_ranks_a_gpu": any(b"MULTI_RANK_GPU" in Path(p).read_bytes() for p in paths),
    }


def _bfloat16() -> Any:
    return import_module("ml_dtypes").bfloat16


def _cupy_packages() -> list[str]:
    return [name for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy") if _version(name)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
