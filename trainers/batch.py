"""The trainer's records: one prompt's tree as tensors, and a packed row of several of them.

Tokens stand in depth-first preorder, so a node's subtree is one interval, and "token k is seen by
query q" is ``k <= q < visible_until[k]``. A plain sequence is the tree with one leaf: flat and tree
batches are one code path.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenTree:
    """One prompt's tree (n tokens, l leaves). Indices are within the tree.

    ``w`` is a leaf's weight under the chosen normalisation (1 for the token mean, 1 / length for
    the sequence mean, 0 for a failed verdict or a filtered leaf) and ``A`` its advantage.
    """

    token_ids: torch.Tensor  # int64 [n], depth-first preorder
    position_ids: torch.Tensor  # int64 [n], depth in tokens from the root
    visible_until: torch.Tensor  # int64 [n], end (exclusive) of the token's subtree
    predictor: (
        torch.Tensor
    )  # int64 [n], the token before it on its path; -1 for the first token of the prompt
    advantage_pos: (
        torch.Tensor
    )  # float32 [n], sum over leaves below that train on it of w * max(A, 0)
    advantage_neg: torch.Tensor  # float32 [n], the same of w * min(A, 0)
    weight: (
        torch.Tensor
    )  # float32 [n], sum of w over leaves below that train on it; 0 = prompt, forced or masked
    behaviour_logprobs: (
        torch.Tensor
    )  # float32 [n], under softmax(logits / temperature), as sampled; 0 where not sampled
    sampling_logprobs: (
        torch.Tensor
    )  # float32 [n], under the behaviour policy (after top-p and the rest)
    temperature: torch.Tensor  # float32 [n], that the token was sampled with
    policy_version: torch.Tensor  # int64 [n]
    leaf_token: (
        torch.Tensor
    )  # int64 [l], index of the path's last token (several leaves may share one)
    leaf_advantage: torch.Tensor  # float32 [l]
    leaf_weight: torch.Tensor  # float32 [l]
    leaf_num_tokens: torch.Tensor  # int64 [l], trained tokens on the path
    leaf_reward: torch.Tensor  # float32 [l]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """Several trees in one row of T tokens with L leaves; same fields, indices within the row.

    Padding tokens (at the end) see themselves alone, have predictor -1 and weight 0.

    Attributes:
        denominator: what the summed loss is divided by: the same number for every micro-batch of an
            update, on all ranks (the update's total weight for the token mean).
    """

    token_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T]
    visible_until: torch.Tensor  # int64 [T]
    predictor: torch.Tensor  # int64 [T]
    advantage_pos: torch.Tensor  # float32 [T]
    advantage_neg: torch.Tensor  # float32 [T]
    weight: torch.Tensor  # float32 [T]
    behaviour_logprobs: torch.Tensor  # float32 [T]
    sampling_logprobs: torch.Tensor  # float32 [T]
    temperature: torch.Tensor  # float32 [T]
    policy_version: torch.Tensor  # int64 [T]
    leaf_token: torch.Tensor  # int64 [L]
    leaf_advantage: torch.Tensor  # float32 [L]
    leaf_weight: torch.Tensor  # float32 [L]
    leaf_num_tokens: torch.Tensor  # int64 [L]
    leaf_reward: torch.Tensor  # float32 [L]
    denominator: float

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The row with its tensors on ``device``."""
    if batch.token_ids.device == device:
        return batch
    moved: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return replace(batch, **moved)
