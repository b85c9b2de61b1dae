"""Policy losses on token trees, by name.

A loss is a function of the trained tokens' log-probabilities that returns terms; the update
minimises their sum divided by the update's denominator. There are two kinds:

- Token losses have one term a token. A token shared by several leaves stands here once: where a
  flat batch has one term a leaf, the tree has their sum, through ``advantage_pos``,
  ``advantage_neg`` and ``weight`` (sums over the leaves below).
- Sequence losses (``LossTraits.is_sequence_level``) have one term a leaf, made of sums over its
  path and of the leaf table.

Both *equal* the flat loss and its gradient: leaves that share a token share its ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from trainers.batch import PackedBatch
from trainers.kl import LARGEST_LOG_RATIO
from trainers.path_sums import path_sums
from trainers.settings import POLICY_LOSSES, PolicyLossSettings

__all__ = ["POLICY_LOSSES", "PolicyLoss", "LossTerms", "TrainedTokens"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LeftOut:
    """Tokens that have no part in the responses of some of the leaves below them."""

    tokens: torch.Tensor  # bool [M], that are left out
    leaves: torch.Tensor  # bool [L], of whose responses


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainedTokens:
    """The M tokens of a row that are trained on (weight > 0), and their row."""

    logprobs: torch.Tensor  # [M], of the policy being trained, with gradient
    entropy: torch.Tensor  # [M], nats; with gradient if an entropy bonus is asked for
    old_logprobs: torch.Tensor  # [M], of the ratio: as sampled, or recomputed
    advantage_pos: torch.Tensor  # [M], sum over leaves of w * max(A, 0)
    advantage_neg: torch.Tensor  # [M], sum over leaves of w * min(A, 0)
    weight: torch.Tensor  # [M], sum over leaves of w
    index: torch.Tensor  # int64 [M], of the token in the row
    batch: PackedBatch
    ref_logprobs: torch.Tensor | None = None  # [M], of the reference, if there is one
    left_out: LeftOut | None = None

    def path_sums(self, values: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
        """Sum of ``values`` [M] over the trained tokens of the paths to ``leaves`` (int64 [N],
        rows of the leaf table), without those that are left out; [N], differentiable.
        """
        ends = self.batch.leaf_token[leaves]
        sums = path_sums(values, self.index, self.batch.visible_until, ends)
        if self.left_out is None:
            return sums
        kept = path_sums(values * ~self.left_out.tokens, self.index, self.batch.visible_until, ends)
        return torch.where(self.left_out.leaves[leaves], kept, sums)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LossTerms:
    """What a policy loss returns.

    Attributes:
        loss: the terms, weights already in them: [M], one a token, or [N], one a leaf.
        metrics: values a token [M] without gradient; reported as means weighted by ``weight``.
        sequence_metrics: values [N] of the trained leaves, without gradient; reported as plain
            means.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    sequence_metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


PolicyLoss = Callable[[TrainedTokens, PolicyLossSettings], LossTerms]


def trained_tokens(
    batch: PackedBatch,
    index: torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
) -> TrainedTokens:
    """The tokens ``index`` (int64 [M], those of weight > 0) of a row with what the policy says of
    them; the old log-probs are those of sampling unless given.

    ``index`` may lack tokens of weight > 0 that are masked: a leaf's ``leaf_num_tokens`` is then
    to be counted anew, see :func:`trainers.off_policy.trained_index`.
    """
    return TrainedTokens(
        logprobs=logprobs,
        entropy=entropy,
        old_logprobs=batch.behaviour_logprobs[index] if old_logprobs is None else old_logprobs,
        advantage_pos=batch.advantage_pos[index],
        advantage_neg=batch.advantage_neg[index],
        weight=batch.weight[index],
        index=index,
        batch=batch,
        ref_logprobs=ref_logprobs,
    )


def trained_leaves(batch: PackedBatch) -> torch.Tensor:
    """Rows of the leaf table that are trained on, int64 [N]."""
    return torch.nonzero(batch.leaf_weight > 0).squeeze(1)


def ppo_clip(tokens: TrainedTokens, settings: PolicyLossSettings) -> LossTerms:
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
    ratio, bounds = ratio_of(log_ratio), settings.bounds()
    ratio_pos = ratio.clamp(max=bounds.high)
    ratio_neg = ratio.clamp(min=bounds.low, max=bounds.dual)
    loss = -(ratio_pos * tokens.advantage_pos + ratio_neg * tokens.advantage_neg)
    with torch.no_grad():
        pos, neg = tokens.advantage_pos, -tokens.advantage_neg
        mass = (pos + neg).clamp(min=torch.finfo(pos.dtype).tiny)
        metrics = _ratio_metrics(log_ratio.detach(), ratio.detach()) | {
            "actor/pg_clipfrac": ((ratio > bounds.high) * pos + (ratio < bounds.low) * neg) / mass,
            "actor/pg_clipfrac_lower": (ratio > bounds.dual) * neg / mass,
        }
    return LossTerms(loss=loss, metrics=metrics)


def gspo(tokens: TrainedTokens, settings: PolicyLossSettings) -> LossTerms:
    """Group sequence policy optimisation (arXiv 2507.18071, Eqs. 5 and 7): the ratio of a response
    in place of its tokens'.

    With |y| trained tokens on the path of a leaf, s = exp(mean over them of logprob - old logprob),
    and the leaf's term is ``-w |y| min(s A, clip(s, 1 - low, 1 + high) A)``. w |y| is the leaf's
    share of the denominator: the paper's mean over responses is ``sequence_mean`` (w = 1 / |y|);
    with ``token_mean`` a response weighs as much as it has tokens. A response that is clipped has
    no gradient in any of its tokens. There is no dual clip.

    ``pg_clipfrac`` is the share of responses that are clipped.
    """
    batch, bounds = tokens.batch, settings.bounds()
    leaves = trained_leaves(batch)
    advantage, length = batch.leaf_advantage[leaves], batch.leaf_num_tokens[leaves]
    log_ratio = tokens.logprobs - tokens.old_logprobs
    ratio = ratio_of(tokens.path_sums(log_ratio, leaves) / length.clamp(min=1))
    clipped = torch.where(advantage > 0, ratio.clamp(max=bounds.high), ratio.clamp(min=bounds.low))
    loss = -batch.leaf_weight[leaves] * length * clipped * advantage
    with torch.no_grad():
        is_clipped = ((advantage > 0) & (ratio > bounds.high)) | (
            (advantage < 0) & (ratio < bounds.low)
        )
        sequence_metrics = {
            "actor/pg_clipfrac": is_clipped.to(ratio.dtype),
            "actor/sequence_ratio_mean": ratio.detach(),
        }
        metrics = _ratio_metrics(log_ratio.detach(), ratio_of(log_ratio.detach()))
    return LossTerms(loss=loss, metrics=metrics, sequence_metrics=sequence_metrics)


def cispo(tokens: TrainedTokens, settings: PolicyLossSettings) -> LossTerms:
    """Clipped importance sampling (MiniMax-M1, arXiv 2506.13585, Eqs. 4 and 5): the policy gradient
    of REINFORCE weighted by a clipped ratio without gradient, so that no token is left out:
    ``-sg(clip(r, 1 - low, 1 + high)) (A+ + A-) logprob``.

    The paper has no lower bound (clip_ratio_low = 1) and does not give its upper one.

    ``pg_clipfrac`` is the share of tokens whose ratio is clipped.
    """
    bounds = settings.bounds()
    log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
    ratio = ratio_of(log_ratio)
    clipped = ratio.clamp(min=bounds.low, max=bounds.high)
    loss = -clipped * (tokens.advantage_pos + tokens.advantage_neg) * tokens.logprobs
    metrics = _ratio_metrics(log_ratio, ratio) | {
        "actor/pg_clipfrac": (clipped != ratio).to(ratio.dtype)
    }
    return LossTerms(loss=loss, metrics=metrics)


def reinforce(tokens: TrainedTokens, settings: PolicyLossSettings) -> LossTerms:
    """Plain policy gradient, ``-logprob * A`` (Williams 1992): no ratio, no clipping; unbiased on
    tokens that the current weights sampled.
    """
    loss = -tokens.logprobs * (tokens.advantage_pos + tokens.advantage_neg)
    log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
    return LossTerms(loss=loss, metrics=_ratio_metrics(log_ratio, ratio_of(log_ratio)))


def nll(tokens: TrainedTokens, settings: PolicyLossSettings) -> LossTerms:
    """Negative log-likelihood ``-logprob * weight``: supervised training."""
    return LossTerms(loss=-tokens.logprobs * tokens.weight, metrics={})


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of the logarithms of ratios of probabilities, always finite."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def _ratio_metrics(log_ratio: torch.Tensor, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"actor/ppo_kl": -log_ratio, "actor/ratio_mean": ratio}
