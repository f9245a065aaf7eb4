"""The names of contenders, in results and on the command line."""

# A whole step.
SHARDOPT = "shardopt"
REDUCE_SCATTER = "MPI reduce-scatter + kernel + allgather"
ZERO_REDUNDANCY = "all_reduce + ZeroRedundancyOptimizer"
REPLICATED = "all_reduce + NAdam on every rank"
FOREACH = "torch.optim.NAdam(foreach=True)"
STEP_PEERS = (REDUCE_SCATTER, ZERO_REDUNDANCY, REPLICATED)

# The same through a framework.
THROUGH_TORCH = "shardopt.torch"
THROUGH_TORCH_BFLOAT16 = "shardopt.torch, bfloat16"
THROUGH_JAX = "shardopt.jax"
THROUGH_LUCID = "shardopt.lucid"
STAGE_2 = "shardopt.torch, stage=2"
STAGE_2_CLIPPED = "shardopt.torch, stage=2, max_grad_norm"
STAGE_2_UPDATED = "shardopt.torch, stage=2, update_in_backward"
ARRAYS = "gradients at hand, stage=1"
ARRAYS_STAGE_2 = "gradients at hand, stage=2"
ARRAYS_UPDATED = "gradients at hand, stage=2, update_in_backward"
CLAMPED = "shardopt.torch, weights clamped"
CLAMPED_REPLICA = "NAdam on every rank, weights clamped"
NEED_TORCH = (
    ZERO_REDUNDANCY,
    REPLICATED,
    THROUGH_TORCH,
    THROUGH_TORCH_BFLOAT16,
    CLAMPED,
    CLAMPED_REPLICA,
)

# Whole training.
DDP = "DDP + NAdam"
FSDP2 = "FSDP2 fully_shard + NAdam"

# A step whose gradients come from a backward that computes nothing, and steps by other rules.
BEHIND_BACKWARD = "shardopt.torch behind backward"
SHARDOPT_OPTAX = "shardopt, variant=optax"
OPTAX = "MPI all-reduce + optax.nadam under jit"
DEEPSPEED = "all_reduce + DeepSpeedCPUAdam (Adam)"

# On a GPU.
KERNEL = "kernel"
GRAPH = "torch.optim.NAdam(capturable=True) in a CUDA graph"
DEVICE_COPY = "copy on the device"
OFFLOADED = "shardopt, offload=cpu"

# Bare loops over memory.
TRIAD = "triad"
AXPY = "axpy"

# Checkpoints.
SYNCHRONOUS = "shardopt, asynchronous=False"
DCP = "torch DCP async_save"
DCP_KEPT = "torch DCP async_save, stager kept"
TORCH_SAVE = "torch.save + fsync"
MEMCPY = "memcpy"
DIRECT_WRITE = "direct write + fsync"
BARE_READ = "preadv, nothing verified"
