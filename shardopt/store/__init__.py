"""The arrays that parameters, gradients and optimizer state live in."""
