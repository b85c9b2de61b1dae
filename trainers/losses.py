"""Policy losses on token trees, by name.

A loss is a function of the trained tokens' log-probabilities that returns one term a token; the
update minimises their sum divided by the update's denominator. A token shared by several leaves
stands here once: where a flat batch has one term a leaf, the tree has their sum, through
``advantage_pos``, ``advantage_neg`` and ``weight`` (sums over the leaves below). The tree loss
*equals* the flat loss, because leaves that share a token share its ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainers.batch import PackedBatch
from trainers.settings import POLICY_LOSSES, PolicyLossSettings

__all__ = ["POLICY_LOSSES", "PolicyLoss", "TokenLosses", "TrainedTokens"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainedTokens:
    """The M tokens of a row that are trained on (weight > 0) and their row."""

    logprobs: torch.Tensor  # [M], of the policy being trained, with gradient
    entropy: torch.Tensor  # [M], nats; with gradient if an entropy bonus is asked for
    old_logprobs: torch.Tensor  # [M], as sampled
    advantage_pos: torch.Tensor  # [M], sum over leaves of w * max(A, 0)
    advantage_neg: torch.Tensor  # [M], sum over leaves of w * min(A, 0)
    weight: torch.Tensor  # [M], sum over leaves of w
    index: torch.Tensor  # int64 [M], of the token in the row
    batch: PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenLosses:
    """What a policy loss returns.

    Attributes:
        loss: [M], the tokens' terms, weights already in them.
        metrics: values a token [M] without gradient; reported as means weighted by ``weight``.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


PolicyLoss = Callable[[TrainedTokens, PolicyLossSettings], TokenLosses]


def ppo_clip(tokens: TrainedTokens, settings: PolicyLossSettings) -> TokenLosses:
    """Clipped policy gradient with separate bounds (DAPO, arXiv 2503.14476) and dual clip (Ye et
    al., arXiv 1912.09729).

    With ratio r = exp(logprob - old logprob), bounds low, high and c, a leaf of advantage A gives
    ``-min(r, 1 + high) A`` for A > 0 and ``-min(max(r, 1 - low), c) A`` for A < 0: both linear in
    A, so the sum over leaves needs only their sums A+ and A-:
    ``-[min(r, 1 + high) A+  +  min(max(r, 1 - low), c) A-]``.

    ``pg_clipfrac`` is the share of tokens whose term is clipped; in a token shared by leaves of
    both signs, the share of |A| that is.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    ratio = log_ratio.exp()
    low, high = 1 - settings.clip_ratio_low, 1 + settings.clip_ratio_high
    ratio_pos = ratio.clamp(max=high)
    ratio_neg = ratio.clamp(min=low, max=max(low, settings.clip_ratio_c))
    loss = -(ratio_pos * tokens.advantage_pos + ratio_neg * tokens.advantage_neg)
    with torch.no_grad():
        pos, neg = tokens.advantage_pos, -tokens.advantage_neg
        mass = (pos + neg).clamp(min=torch.finfo(pos.dtype).tiny)
        metrics = _ratio_metrics(log_ratio.detach(), ratio.detach()) | {
            "actor/pg_clipfrac": ((ratio > high) * pos + (ratio < low) * neg) / mass,
            "actor/pg_clipfrac_lower": (ratio > settings.clip_ratio_c) * neg / mass,
        }
    return TokenLosses(loss=loss, metrics=metrics)


def reinforce(tokens: TrainedTokens, settings: PolicyLossSettings) -> TokenLosses:
    """Plain policy gradient, ``-logprob * A`` (Williams 1992): no ratio, no clipping; unbiased on
    tokens that the current weights sampled.
    """
    loss = -tokens.logprobs * (tokens.advantage_pos + tokens.advantage_neg)
    log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
    return TokenLosses(loss=loss, metrics=_ratio_metrics(log_ratio, log_ratio.exp()))


def nll(tokens: TrainedTokens, settings: PolicyLossSettings) -> TokenLosses:
    """Negative log-likelihood ``-logprob * weight``: supervised training."""
    return TokenLosses(loss=-tokens.logprobs * tokens.weight, metrics={})


def _ratio_metrics(log_ratio: torch.Tensor, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"actor/ppo_kl": -log_ratio, "actor/ratio_mean": ratio}
