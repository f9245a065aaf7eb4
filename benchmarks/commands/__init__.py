"""The commands of ``python -m benchmarks`` beside the cases, one in each module."""
