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

DCP = "torch DCP async_save"
DCP_KEPT = "torch DCP async_save, stager kept"
TORCH_SAVE = "torch.save + fsync"
SYNCHRONOUS = "shardopt, asynchronous=False"
MEMCPY = "memcpy"
DIRECT_WRITE = "direct write + fsync"
BARE_READ = "preadv, nothing verified"
STEP, COMPUTE = "step", "compute"

# What is measured of a contender, in seconds.
STALL = "{}: stall"
WRITTEN = "{}: durable after the stall"
DURABLE = "{}: durable after the call"
CPU = "{}: CPU of a rank"
LOAD = "{}: load"
LOAD_OVER = "{}: load over a state"
BESIDE = "{}: {} meanwhile"
GROWTH = "{}: {} takes beyond, MB"

CHECKPOINT_NBYTES = 1 << 30

# Between nodes.
NODES_NUMEL = 1 << 24
NARROW_WIRE = "shardopt, wire_dtype=bfloat16"
NARROW = "shardopt, bfloat16 parameters and wire"
UPDATE_ALONE = "update alone, nothing sent"
WIRE = "its bytes over bare TCP"
BACKWARD = "backward"
STEP_BEHIND = "step of what backward left"
IN_TURN = "backward, then step: overlap=False"
OVERLAPPED = "backward and step: overlap=True"
HIDDEN = "exchange of gradients, share behind backward"
SENT_MB = "MB sent by a node in a step"
SENT_ALONE_MB = "MB sent by a node of 1 rank"
BUCKET_MIB = "MiB in a bucket"
HIDDEN_BUCKET_MIB = "MiB in a bucket that leaves while backward runs"
