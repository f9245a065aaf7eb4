"""The CUDA backend: memory of GPUs, and kernels that compile when they are first needed."""
