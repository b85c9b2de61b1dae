"""How attention over the tree reaches a transformers model.

The back end is registered once under the name ``tree``; the model's layers call it with the context
of the current forward as keyword ``tree``. The context stores the new keys and values in the pool
and answers each query row from its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from transformers import AttentionInterface

from rollout.kv_pool import KVPool
from rollout.radix_tree import TreeNode

NAME = "tree"


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Tokens ``start .. stop - 1`` of ``node`` as consecutive query rows of a forward.

    Attributes:
        token_ids: int32 [stop - start].
        writes: False when the pool holds their keys and values already and only the logits are
            wanted.
    """

    node: TreeNode
    start: int
    stop: int
    token_ids: np.ndarray
    writes: bool = True

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerVariant:
    """What a layer adds to plain attention.

    Attributes:
        scaling: factor of the scores.
        window: a query at position p sees positions > p - window; None sees all.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: [H], logits of one more, valueless key a head.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Plan(Protocol):
    """Which keys each query row sees, prepared once a forward and used by all its layers."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        """Attention of ``query [N, H, Dk]`` over the pool's ``keys [slots, Hkv, Dk]`` and
        ``values [slots, Hkv, Dv]``; returns [N, H, Dv].
        """
        ...


@runtime_checkable
class GrowingPlan(Plan, Protocol):
    """A plan that goes on from one token to the next while segments grow and end."""

    def advance(self) -> None:
        """Every row moves one token on in its open node."""
        ...

    def keep(self, mask: np.ndarray) -> None:
        """Forget the rows (bool [N]) whose segments ended; the others move up in order."""
        ...


@runtime_checkable
class ExtensiblePlan(GrowingPlan, Protocol):
    """A growing plan whose rows may get more slots."""

    def extend(self, slots: Mapping[int, np.ndarray]) -> None:
        """Append slots (int64 [n]) to the open nodes of some rows."""
        ...


class AttentionContext:
    """One forward: which slots its rows write and which plan answers them.

    Args:
        write_slots: int64 [padded rows]; rows that keep nothing write to the trash slot.
        num_rows: rows that are no padding; they come first.
    """

    def __init__(self, pool: KVPool, plan: Plan, write_slots: torch.Tensor, num_rows: int) -> None:
        self.pool = pool
        self.plan = plan
        self.write_slots = write_slots
        self.num_rows = num_rows
        self.calls = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        variant: LayerVariant,
    ) -> torch.Tensor:
        """``query [1, H, T, Dk]``, ``key [1, Hkv, T, Dk]``, ``value [1, Hkv, T, Dv]`` to
        [1, T, H, Dv].
        """
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.attend_rows(layer, query, key, value, variant).unsqueeze(0)

    def attend_rows(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        variant: LayerVariant,
    ) -> torch.Tensor:
        """``query [T, H, Dk]``, ``key [T, Hkv, Dk]``, ``value [T, Hkv, Dv]`` to [T, H, Dv]."""
        self.calls += 1
        keys, values = self.pool.write(layer, self.write_slots, key, value)
        out = self.plan.attend(query[: self.num_rows], keys, values, variant)
        if self.num_rows < query.shape[0]:
            out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[0] - self.num_rows))
        return out


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in each attention layer."""
    if tree is None:
        raise NotImplementedError(
            f"{type(module).__name__} gets no keyword arguments of the model's forward"
        )
    layer = getattr(module, "layer_idx", None)
    if query.shape[0] != 1 or not isinstance(layer, int):
        raise NotImplementedError(
            f"{type(module).__name__} calls attention in an unknown form (batch {query.shape[0]}, "
            f"layer_idx {layer})"
        )
    variant = LayerVariant(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return tree.attend(layer, query, key, value, variant), None


def register() -> None:
    """Make ``attn_implementation="tree"`` known to transformers.

    It gets no mask function: for attention without one transformers makes no mask. (With one it
    would look in each forward for sequences packed into the positions, for which the host waits.)
    """
    AttentionInterface.register(NAME, tree_attention)
