"""The attention function that transformers calls, and what it knows of the row.

``choose`` says which kernel serves a layer. With ``sdpa``, layers that see all of their path go to
``sequences`` where no token is shared, else on a CPU to ``nodes``; windows that cut a path, soft
caps, sinks and values of another size than keys go to ``chains``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from trainers.attention import nodes
from trainers.attention.chains import ChainPlans, chain_attention
from trainers.attention.choose import choose_attention
from trainers.attention.flash import SequenceEnds, varlen_attention
from trainers.attention.flex import FlexMasks, flex_tree_attention
from trainers.attention.sequences import sequence_attention, sequence_lengths
from trainers.attention.variant import Variant

NAME = "packed_tree"


@dataclass(eq=False)
class PackedTreeContext:
    """What attention needs to know of one row; made once a forward, shared by all layers."""

    visible_until: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    device: torch.device
    requested: str = "auto"  # trainer.learner.attention

    @cached_property
    def chains(self) -> ChainPlans:
        return ChainPlans(*self._arrays, self.device)

    @cached_property
    def flex_masks(self) -> FlexMasks:
        return FlexMasks(*self._arrays, self.device)

    @cached_property
    def sequence_ends(self) -> SequenceEnds:
        assert self.sequence_lengths is not None, "tokens are shared"
        return SequenceEnds.of(self.sequence_lengths, self.device)

    @cached_property
    def sequence_lengths(self) -> list[int] | None:
        return sequence_lengths(self._arrays[0])

    @cached_property
    def nodes(self) -> nodes.NodePlan:
        return nodes.make_plan(self._arrays[0])

    def binding(self, window: int | None) -> int | None:
        """The window, or None where no path of the row is as long."""
        if window is None or self._arrays[1].max() < window:
            return None
        return window

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.visible_until.cpu().numpy(), self.position_ids.cpu().numpy()


def register() -> None:
    """Make ``attn_implementation="packed_tree"`` known to transformers."""
    AttentionInterface.register(NAME, packed_tree_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Transformers' mask hook: the row's own structure is the mask."""
    return None


def packed_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    packed_tree: PackedTreeContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every token to its ancestors and itself (within the layer's window).

    Returns:
        The output [1, T, H, Dv] and no attention weights.
    """
    if packed_tree is None:
        raise ValueError(
            "attention 'packed_tree' needs the row: call the model with packed_tree=context(batch)"
        )
    if position_bias is not None or attention_mask is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias or a mask of its own to attention "
            "scores, which training on token trees doesn't support; choose another model"
        )
    assert dropout == 0.0, "attention dropout must be switched off"
    assert query.shape[0] == 1, f"one packed row at a time, got a batch of {query.shape[0]}"
    variant = Variant(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=packed_tree.binding(sliding_window),
        softcap=softcap,
        sinks=s_aux,
    )
    kernel = choose_attention(
        packed_tree.requested,
        query,
        value,
        is_shared=packed_tree.sequence_lengths is None,
        has_sinks=s_aux is not None,
    )
    if kernel == "flash":
        return varlen_attention(query, key, value, packed_tree.sequence_ends, variant), None
    if kernel == "flex":
        return flex_tree_attention(query, key, value, packed_tree.flex_masks, variant), None
    return _sdpa(query, key, value, packed_tree, variant), None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row: PackedTreeContext,
    variant: Variant,
) -> torch.Tensor:
    """[1, T, H, Dv], by torch's scaled_dot_product_attention in one of three ways."""
    if variant.window is None and variant.softcap is None and variant.sinks is None:
        if row.sequence_lengths is not None:
            return sequence_attention(query, key, value, row.sequence_lengths, variant.scaling)
        if _fits_nodes(query, value) and row.nodes.is_worthwhile:
            return nodes.node_attention(query, key, value, row.nodes, variant.scaling)
    return chain_attention(query, key, value, row.chains, variant)


def _fits_nodes(query: torch.Tensor, value: torch.Tensor) -> bool:
    return query.device.type == "cpu" and value.shape[3] == query.shape[3]
