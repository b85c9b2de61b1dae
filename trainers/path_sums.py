"""Sums along root-to-leaf paths of a packed row, and sums over the leaves below a token.

Tokens stand in depth-first preorder and token k's subtree is the interval
``k <= q < visible_until[k]``. So a path's sum is a running sum in which every token's value enters
at the token and leaves again at the end of its subtree, and a sum over the leaves below is a
difference of running sums over leaves. Both take O(tokens), however deep the tree, and run in
float64: what entered is taken out again by subtraction.
"""

from __future__ import annotations

import torch


def path_sums(
    values: torch.Tensor,  # [M]
    index: torch.Tensor,  # int64 [M], the row's tokens that have the values; all others have 0
    visible_until: torch.Tensor,  # int64 [T]
    ends: torch.Tensor,  # int64 [L], last tokens of paths
) -> torch.Tensor:
    """Sum of the values on the path from the root to each of ``ends``, itself included; [L], of the
    values' dtype, differentiable.
    """
    wide = values.double()
    changes = wide.new_zeros(visible_until.shape[0] + 1)
    changes = changes.index_add(0, index, wide).index_add(0, visible_until[index], -wide)
    return changes.cumsum(0)[ends].to(values.dtype)


def sums_over_leaves_below(
    leaf_values: torch.Tensor,  # [L]
    leaf_token: torch.Tensor,  # int64 [L]
    visible_until: torch.Tensor,  # int64 [T]
) -> torch.Tensor:
    """Sum over the leaves at or below each token of the row; float64 [T]."""
    at_token = torch.zeros(
        visible_until.shape[0] + 1, dtype=torch.float64, device=leaf_values.device
    )
    # running[q]: over leaves whose last token stands before q
    running = at_token.index_add(0, leaf_token + 1, leaf_values.double()).cumsum(0)
    return running[visible_until] - running[:-1]
