"""The names of files, and of the tensors in them."""

from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY


def file_name(rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def tensor_name(param: str, key: str = PARAM_KEY, part: Span | None = None) -> str:
    """Return the name that a tensor, or a part of one, has in a file.

    Args:
        param: The name of the parameter.
        key: ``PARAM_KEY`` for the parameter itself, or the key of an array of its state.
        part: The elements that the name stands for; None for all. A file has each name once, but
            may hold several parts of a tensor.
    """
    name = param if key == PARAM_KEY else f"{param}::{key}"
    return name if part is None else f"{name}[{part.start}:{part.stop}]"


def extra_name(rank: int, index: int) -> str:
    """Return the name of an array of ``extra``, given its index in the file of a rank."""
    return f"extra/rank-{rank:05d}/{index}"


def plain_name(param: str) -> str:
    """Return a parameter's name without what torch's wrappers of modules put into it.

    torch.compile adds ``_orig_mod``, DistributedDataParallel ``module`` in front.
    """
    parts = [part for part in param.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)


def is_position(param: str, index: int) -> bool:
    """Whether a parameter is named by its position, as those are that have no other name."""
    return param == f"param{index}"
