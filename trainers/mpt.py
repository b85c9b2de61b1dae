"""Dynamic masking of well-mastered positive tokens (DMMPTs; UloRL, arXiv 2507.19766).

A positive token (of a response with reward >= ``min_reward``) is well mastered when the policy
gives it a probability of at least tau. Training it further only takes entropy away, so it is masked
in the policy loss while mean entropy H is below sigma:

    mask(i, t) = 1[R_i >= min_reward] * 1[p(o_it) >= tau] * 1[H < sigma],
    H = -(1 / |o_i|) sum over t, v of p(v) log p(v)

The paper's formula of H lacks the minus sign, with which it would always be below sigma. Its text
has the model's entropy, its formula the response's: gate ``batch`` and gate ``response``.

Exact on trees: a token that a masked response shares with others keeps the others' share of A+ and
A-, which is summed over the leaves below. A loss with one term a response takes masked tokens out
of that response: its ratio and its length are those of the tokens that are left.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trainers.losses import LeftOut, TrainedTokens
from trainers.mpt_settings import MPTSettings
from trainers.path_sums import sums_over_leaves_below


def masks(
    tokens: TrainedTokens, settings: MPTSettings, batch_entropy: float | None
) -> LeftOut | None:
    """Which tokens are masked, and in which leaves' responses; None with gate ``never``.

    Args:
        batch_entropy: mean entropy of the whole update, for gate ``batch``.
    """
    if settings.gate == "never":
        return None
    logprobs = tokens.logprobs if settings.policy == "current" else tokens.old_logprobs
    mastered = logprobs.detach() >= math.log(settings.min_prob)
    batch = tokens.batch
    positive = (batch.leaf_reward >= settings.min_reward) & (batch.leaf_weight > 0)
    if settings.gate == "response":
        every = torch.arange(len(positive), device=positive.device)
        total = tokens.path_sums(tokens.entropy.detach(), every)
        positive &= total / batch.leaf_num_tokens.clamp(min=1) < settings.max_entropy
    elif settings.gate == "batch":
        assert batch_entropy is not None, "gate batch needs the update's entropy"
        positive &= batch_entropy < settings.max_entropy
    return LeftOut(tokens=mastered, leaves=positive)


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
