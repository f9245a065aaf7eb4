"""Parameters whose gradients DistributedDataParallel averages."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Collection

_wrappers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_has_hook = False


def watch_wrappers() -> None:
    """Find the modules that wrap others in DistributedDataParallel, and note those to come."""
    global _has_hook
    if not _has_hook:
        _has_hook = True
        register_module_module_registration_hook(_note)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in gc.get_objects():
            if issubclass(type(module), DistributedDataParallel):
                _wrappers.add(module)


def wrapped_params() -> Collection[int]:
    """Return the ids of all parameters that are wrapped now."""
    if not _wrappers:
        return ()
    return {id(param) for module in list(_wrappers) for param in module.parameters()}


def _note(module: Any, name: str, submodule: Any) -> None:
    """See ``register_module_module_registration_hook``: a wrapper gets what it wraps."""
    if isinstance(module, DistributedDataParallel):
        _wrappers.add(module)
