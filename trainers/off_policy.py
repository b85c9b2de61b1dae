"""Corrections of the policy loss for tokens that the sampler drew under other probabilities.

Three policies: pi_behav drew a token (the engine, under the weights of the token's own version),
pi_prox are the weights before the step's first update, pi_theta those being trained. With
rho = pi_prox / pi_behav a correction multiplies the token's policy-loss terms by

- ``decoupled``: rho (AReaL, arXiv 2505.24298: (pi_prox / pi_behav) min(u A, clip(u) A) with
  u = pi_theta / pi_prox); 0 where rho is above the cap, if there is one
- ``tis``: min(rho, cap) (truncated importance sampling; Yao et al. 2025, verl)
- ``icepop``: rho where low <= rho <= high, else 0 (Ring-1T, arXiv 2510.18855)

The weight is a token's own, so leaves that share the token share it: A+ and A- are multiplied, and
the tree equals the flat batch. A loss with one term a response takes the same functions of the
response's geometric mean of rho, as its ratio is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trainers.batch import PackedBatch
from trainers.losses import LeftOut, TrainedTokens, ratio_of, trained_leaves
from trainers.off_policy_settings import OffPolicySettings
from trainers.path_sums import path_sums


def token_weights(log_ratio: torch.Tensor, settings: OffPolicySettings) -> torch.Tensor:
    """The correction's weight for each log rho, of its shape; 1 without a correction."""
    ratio = ratio_of(log_ratio)
    cap = settings.largest_weight
    if settings.correction == "tis":
        return ratio.clamp(max=cap)
    if settings.correction == "decoupled":
        return ratio if cap is None else torch.where(ratio <= cap, ratio, 0.0)
    if settings.correction == "icepop":
        low, high = settings.kept_band
        return torch.where((low <= ratio) & (ratio <= high), ratio, 0.0)
    return torch.ones_like(ratio)


def trained_index(
    batch: PackedBatch, settings: OffPolicySettings, policy_version: int
) -> tuple[PackedBatch, torch.Tensor]:
    """The tokens that are trained on, and the row with its leaf table counted over them.

    Args:
        policy_version: in force. Tokens of versions below it by more than ``mask_older_than`` are
            not trained on by any term (slime's mask of tokens from earlier parts of a rollout).

    Returns:
        (row, int64 [M]). Leaves without a token left have weight 0.
    """
    trained = batch.weight > 0
    if settings.mask_older_than is None:
        return batch, torch.nonzero(trained).squeeze(1)
    oldest = policy_version - settings.mask_older_than
    index = torch.nonzero(trained & (batch.policy_version >= oldest)).squeeze(1)
    ones = torch.ones(len(index), device=index.device)
    length = path_sums(ones, index, batch.visible_until, batch.leaf_token).round().long()
    weight = torch.where(length > 0, batch.leaf_weight, 0.0)
    return replace(batch, leaf_num_tokens=length, leaf_weight=weight), index


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Correction:
    """A correction's weights of a row, a token or a response.

    Attributes:
        weights: [M] of the trained tokens, or [L] of the leaves' responses (1 where not trained).
        of_responses: which of the two.
        dropped: what has weight 0.
    """

    weights: torch.Tensor
    of_responses: bool
    dropped: LeftOut


def correction_of(
    tokens: TrainedTokens, settings: OffPolicySettings, *, of_responses: bool
) -> Correction | None:
    """The correction's weights, with the tokens' old log-probs as pi_prox; None with ``none``. A
    response's rho is the geometric mean over its trained tokens: a mean, so that long responses are
    not dropped or capped for their length.
    """
    if settings.correction == "none":
        return None
    batch = tokens.batch
    log_ratio = tokens.old_logprobs - batch.behaviour_logprobs[tokens.index]
    if not of_responses:
        weights = token_weights(log_ratio, settings)
        everyone = torch.ones_like(batch.leaf_token, dtype=torch.bool)
        dropped = LeftOut(tokens=weights == 0, leaves=everyone)
        return Correction(weights=weights, of_responses=False, dropped=dropped)
    leaves = trained_leaves(batch)
    mean = tokens.path_sums(log_ratio, leaves) / batch.leaf_num_tokens[leaves].clamp(min=1)
    weights = torch.ones(len(batch.leaf_token), dtype=mean.dtype, device=mean.device)
    weights[leaves] = token_weights(mean, settings)
    everywhere = torch.ones_like(tokens.index, dtype=torch.bool)
    dropped = LeftOut(tokens=everywhere, leaves=weights == 0)
    return Correction(weights=weights, of_responses=True, dropped=dropped)


def corrected(tokens: TrainedTokens, correction: Correction) -> TrainedTokens:
    """The tokens with their, or their responses', policy-loss terms multiplied by the weights."""
    if correction.of_responses:
        batch = tokens.batch
        advantage = batch.leaf_advantage * correction.weights.to(batch.leaf_advantage.dtype)
        return replace(tokens, batch=replace(batch, leaf_advantage=advantage))
    weights = correction.weights.to(tokens.advantage_pos.dtype)
    return replace(
        tokens,
        advantage_pos=tokens.advantage_pos * weights,
        advantage_neg=tokens.advantage_neg * weights,
    )
