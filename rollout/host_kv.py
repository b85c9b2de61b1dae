"""Keys and values of a node in the host's memory, while nobody reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rollout.kv_pool import KVPool


@dataclass(frozen=True, slots=True, eq=False)
class HostKV:
    """Of n tokens, by layer: ``keys`` [n, Hkv, Dk] and ``values`` [n, Hkv, Dv], on the host."""

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return len(next(iter(self.keys.values())))

    @property
    def num_bytes(self) -> int:
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def split(self, offset: int) -> tuple[HostKV, HostKV | None]:
        """Those of the first ``offset`` >= 1 tokens and those of the others; None if there are
        none.
        """
        upper, lower = slice(0, offset), slice(offset, None)
        return self._part(upper), self._part(lower) if offset < self.num_tokens else None

    def _part(self, part: slice) -> HostKV:
        # Copies: a part that goes gives its memory back.
        return HostKV(
            {layer: tensor[part].clone() for layer, tensor in self.keys.items()},
            {layer: tensor[part].clone() for layer, tensor in self.values.items()},
        )


def to_host(pool: KVPool, slots: np.ndarray) -> HostKV | None:
    """A copy of what the pool holds in ``slots``; None of no slot."""
    if not len(slots):
        return None
    index = torch.from_numpy(slots).to(pool.device)
    return HostKV(
        {layer: keys.index_select(0, index).cpu() for layer, keys in pool.keys.items()},
        {layer: values.index_select(0, index).cpu() for layer, values in pool.values.items()},
    )


@torch.inference_mode()
def from_host(pool: KVPool, slots: np.ndarray, kv: HostKV) -> None:
    """Write ``kv`` into ``slots``."""
    index = torch.from_numpy(slots).to(pool.device)
    for layer, keys in kv.keys.items():
        pool.write(layer, index, keys.to(pool.device), kv.values[layer].to(pool.device))
