"""Every test of the PyTorch face computes in float64, unless it says otherwise."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def float64_default() -> Iterator[None]:
    """Let float64 be the default, in which torch.optim.NAdam then keeps mu_product as well."""
    import torch  # here, as a file of tests says itself that it needs torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
