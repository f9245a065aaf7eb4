"""A memory fence, which Python does not have."""

from typing import Any

from numba import types
from numba.extending import intrinsic

from shardopt.compiling import compiled


@intrinsic
def fence(typing_context: Any) -> Any:
    """Order all loads and stores before it with all after it; for use in compiled functions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled(types.void())
def full_fence() -> None:
    """Order all loads and stores before it with all after it, as other processes see them."""
    fence()  # type: ignore[call-arg]  # Numba adds the context
