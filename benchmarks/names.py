"""Names that results are written and read under."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RESULTS_FOLDER = FOLDER / "results"

SHARDOPT = "shardopt"
REDUCE_SCATTER = "MPI reduce-scatter + kernel + allgather"
ZERO_REDUNDANCY = "all_reduce + ZeroRedundancyOptimizer"
REPLICATED = "all_reduce + NAdam on every rank"
THROUGH_TORCH = "shardopt.torch"
THROUGH_TORCH_BFLOAT16 = "shardopt.torch, bfloat16"
THROUGH_JAX = "shardopt.jax"
THROUGH_LUCID = "shardopt.lucid"
NEED_TORCH = (ZERO_REDUNDANCY, REPLICATED, THROUGH_TORCH, THROUGH_TORCH_BFLOAT16)

FOREACH = "torch.optim.NAdam(foreach=True)"
KERNEL = "kernel"
TRIAD = "triad"
AXPY = "axpy"
ALL_TRIADS = "triad on all ranks at once"
ALL_AXPYS = "axpy on all ranks at once"

# The sizes that claims are made for; other sizes are measured without a target.
KERNEL_NUMEL = 1 << 26
OVERHEAD_NUMEL = 10_000
STEP_NUMEL = 1 << 25
MEMORY_NUMEL = 1 << 26
BYTES_PER_PARAMETER = "{}, bytes/parameter"
LIMIT = "limit of memory, ns/parameter"
QUIET = 0.05
"""Other jobs may take this share of the cores; beyond it, times say more about them."""
