"""Trained tokens without their shares of the responses that they are left out of.

Exact on trees: a token that a masked response shares with others keeps the others' share of A+, A-
and weight, which is summed over the leaves below. A loss with one term a response takes such tokens
out of that response: its ratio and its length are those of the tokens that are left.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trainers.losses import LeftOut, TrainedTokens
from trainers.path_sums import sums_over_leaves_below


def without(tokens: TrainedTokens, left_out: LeftOut) -> TrainedTokens:
    """The tokens without the shares of the responses that they are left out of."""
    batch = tokens.batch
    weighted = batch.leaf_weight.double() * batch.leaf_advantage.double()
    gone = torch.zeros_like(tokens.weight).masked_fill(left_out.tokens, 1.0)
    every = torch.arange(len(left_out.leaves), device=gone.device)
    masked = tokens.path_sums(gone, every).round().long()
    return replace(
        tokens,
        advantage_pos=_share(tokens, tokens.advantage_pos, weighted.clamp(min=0), left_out),
        advantage_neg=_share(tokens, tokens.advantage_neg, weighted.clamp(max=0), left_out),
        left_out=left_out,
        batch=replace(
            batch,
            leaf_num_tokens=batch.leaf_num_tokens - torch.where(left_out.leaves, masked, 0),
        ),
    )


def weight_without(tokens: TrainedTokens, left_out: LeftOut) -> torch.Tensor:
    """``weight`` [M] without the shares of the responses that a token is left out of."""
    return _share(tokens, tokens.weight, tokens.batch.leaf_weight.double(), left_out)


def _share(
    tokens: TrainedTokens, total: torch.Tensor, of_leaves: torch.Tensor, left_out: LeftOut
) -> torch.Tensor:
    """``total`` [M], and for tokens that are left out the sum over the other leaves below of
    ``of_leaves`` [L]; exactly 0 where there is none.
    """
    batch = tokens.batch
    others = (~left_out.leaves & (batch.leaf_weight > 0)).double()
    below = [
        sums_over_leaves_below(values, batch.leaf_token, batch.visible_until)[tokens.index]
        for values in (of_leaves * others, others)
    ]
    share = torch.where(below[1] > 0.5, below[0], 0.0).to(total.dtype)
    return torch.where(left_out.tokens, share, total)
