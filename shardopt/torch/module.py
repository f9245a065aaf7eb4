"""Modules of PyTorch, as checkpoints and messages see them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import DataParallel, Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from shardopt.params.adapter import model_error
from shardopt.params.model import ModelContent, content_of
from shardopt.torch.tensors import as_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

COMPILED = "_orig_mod"  # the attribute under which torch.compile keeps the module


def unwrap(model: Module) -> Module:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif COMPILED in model._modules:
            model = getattr(model, COMPILED)
        else:
            return model


def named_parameters(module: Module, *, recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
    """Yield the parameters of a module with their names, as if nothing were wrapped."""
    for name, param in unwrap(module).named_parameters(recurse=recurse):
        yield _plain(name), param


def embedding_weights(module: Module) -> list[Tensor]:
    """Return the weights of embeddings.

    Most rows of one have no gradient in a step and others large ones, so that elements that share a
    scale are not alike. T. Dettmers et al., "8-bit optimizers via block-wise quantization", 2022,
    section 2.3, keep them in 32 bits, too.
    """
    kinds = torch.nn.Embedding, torch.nn.EmbeddingBag
    return [each.weight for each in module.modules() if isinstance(each, kinds)]


def names_behind(params: Any) -> dict[Tensor, str]:
    """Return the names of the parameters that a fresh ``module.parameters()`` is going to yield.

    The generator has the module among its local variables. Anything else has no names.
    """
    if not inspect.isgenerator(params) or params.gi_code is not Module.parameters.__code__:
        return {}
    found = inspect.getgeneratorlocals(params)
    if not isinstance(found.get("self"), Module):
        return {}
    named = unwrap(found["self"]) if found.get("recurse", True) else found["self"]
    pairs = named.named_parameters(recurse=bool(found.get("recurse", True)))
    return {param: _plain(name) for name, param in pairs}


def read_module(model: Any, params: Sequence[Tensor]) -> ModelContent:
    """Return what a checkpoint needs of a module; see ``Adapter.read_model``.

    Names are those of ``model.state_dict()``, so that it can load them.
    """
    if not isinstance(model, Module):
        raise model_error("a torch.nn.Module", model, "Pass the module itself")
    module = unwrap(model)
    state = module.state_dict(keep_vars=True)
    plain = {name: state[key] for name, key in _keys(state).items()}
    content = content_of(plain, params, Tensor, Parameter)
    names, values = list(content.names), dict(content.values)
    if None in names:  # a hook may have replaced a parameter by a copy
        name_of = {id(param): name for name, param in named_parameters(module)}
        for index, param in enumerate(params):
            if names[index] is None and id(param) in name_of:
                names[index] = name_of[id(param)]
                values.pop(name_of[id(param)], None)
    versions = {_plain(name): dict(each) for name, each in getattr(state, "_metadata", {}).items()}
    return replace(content, names=names, values=values, versions=versions)


def load_module(
    model: Module, content: ModelContent, values: Mapping[str, Any]
) -> tuple[Module, list[str]]:
    """Load values into a module in place; see ``Adapter.load_model``."""
    module = unwrap(model)
    keys = _keys(module.state_dict(keep_vars=True))
    tied = {alias: values[name] for alias, name in content.aliases.items() if name in values}
    state: OrderedDict[str, Any] = OrderedDict(
        (keys[name], as_tensor(value) if isinstance(value, np.ndarray) else value)
        for name, value in {**values, **tied}.items()
    )
    if isinstance(content.versions, dict):
        state._metadata = OrderedDict(content.versions)  # type: ignore[attr-defined]
    known = module.load_state_dict(state, strict=False)  # the optimizer has the rest
    return model, [_plain(key) for key in known.unexpected_keys]


def _keys(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a state dict by their plain names."""
    return {_plain(key): key for key in state}


def _plain(name: str) -> str:
    """Return a name without the wrappers of compiled submodules."""
    return ".".join(part for part in name.split(".") if part != COMPILED)
