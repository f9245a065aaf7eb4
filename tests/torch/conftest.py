"""Every test of the PyTorch front end computes in float64, unless it says otherwise."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def float64_default() -> Iterator[None]:
    """Make float64 the default, in which torch.optim.NAdam then keeps mu_product as well."""
    import torch  # here, because test files skip themselves if torch is missing

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
