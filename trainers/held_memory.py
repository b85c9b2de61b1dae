"""Every tensor that a learner holds between updates: weights, gradients, optimiser, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Objects that are looked into: those that hold an optimiser's state. Modules, process groups and
# configurations are not.
_LOOKED_INTO = ("deepspeed.runtime.", "deepspeed.utils.tensor_fragment", "torch.optim.")
_CONTAINERS = (list, tuple, set, frozenset)


def tensors_of_model(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, also the shard that ZeRO-3 keeps of a parameter in its place."""
    tensors: list[torch.Tensor] = list(model.buffers())
    for parameter in model.parameters():
        tensors.append(parameter.data)
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            tensors.append(shard.data)
    return tensors


def tensors_of_optimizer(optimizer: Any) -> list[torch.Tensor]:
    """All tensors that can be reached from an optimiser of torch or of DeepSpeed: states, float32
    weights, flat buffers of weights and gradients, buckets.
    """
    return list(_walk(optimizer))


def _walk(root: Any) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing.data
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
            waiting += vars(thing).values()  # what DeepSpeed hangs on a parameter
        elif isinstance(thing, dict):
            waiting += thing.keys()
            waiting += thing.values()
        elif isinstance(thing, _CONTAINERS):
            waiting += thing
        elif type(thing).__module__.startswith(_LOOKED_INTO) and not _is_module(thing):
            waiting += getattr(thing, "__dict__", {}).values()


def _is_module(thing: Any) -> bool:
    return isinstance(thing, torch.nn.Module | type)
