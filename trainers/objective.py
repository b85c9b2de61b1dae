"""What an update minimises: the policy loss, a KL penalty and an entropy bonus of one row.

    (sum of policy loss terms + kl_loss_coef * sum of weight * KL estimate
     - entropy_coeff * sum of weight * entropy) / denominator

KL and entropy are terms of tokens that all leaves below share, so that the sum over leaves is the
token's ``weight`` times the term: equal to the flat batch's, as the policy loss is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainers.kl import kl_terms
from trainers.losses import PolicyLoss, TrainedTokens, trained_leaves
from trainers.settings import PolicyLossSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objective:
    """A row's share of an update's objective.

    Attributes:
        loss: scalar with gradient.
        sums: the row's shares of values of the whole update, without gradient.
        token_metrics: [M], reported as means weighted by the tokens' weight.
        sequence_metrics: [N], of the trained leaves, reported as plain means.
    """

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]
    token_metrics: Mapping[str, torch.Tensor]
    sequence_metrics: Mapping[str, torch.Tensor]


def objective(
    tokens: TrainedTokens,
    policy_loss: PolicyLoss,
    settings: PolicyLossSettings,
    seen: TrainedTokens | None = None,
) -> Objective:
    """The objective of the row of ``tokens``; they need ``ref_logprobs`` for a KL penalty, and
    entropies with gradient for a bonus.

    Args:
        seen: what the policy loss sees of the tokens, with its own denominator, where that is not
            all (see :mod:`trainers.policy_view`); KL and entropy are of ``tokens``.
    """
    seen = tokens if seen is None else seen
    terms = policy_loss(seen, settings)
    loss = terms.loss.sum() / seen.batch.denominator
    denominator = tokens.batch.denominator
    sums = {"actor/pg_loss": loss.detach()}
    sequence_metrics = dict(terms.sequence_metrics)
    if settings.kl_loss_coef > 0:
        assert tokens.ref_logprobs is not None, "a KL penalty needs the reference's log-probs"
        estimates = kl_terms(tokens.logprobs, tokens.ref_logprobs, settings.kl_loss_type)
        kl_loss = (tokens.weight * estimates).sum() / denominator
        loss = loss + settings.kl_loss_coef * kl_loss
        sums["actor/kl_loss"] = kl_loss.detach()
        difference = tokens.logprobs.detach() - tokens.ref_logprobs
        of_paths = tokens.path_sums(difference, trained_leaves(tokens.batch))
        sequence_metrics["actor/sequence_kl"] = of_paths
    if settings.entropy_coeff > 0:
        bonus = (tokens.weight * tokens.entropy).sum() / denominator
        loss = loss - settings.entropy_coeff * bonus
    return Objective(
        loss=loss,
        sums=sums,
        token_metrics={"actor/entropy": tokens.entropy.detach(), **terms.metrics},
        sequence_metrics=sequence_metrics,
    )
