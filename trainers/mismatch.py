"""How far the sampler's log-probabilities are from the learner's, and how old the tokens are.

With d = log pi_train - log pi_rollout of a sampled token (rho = exp d), the metrics
``training/rollout_...`` are

- ``logprob_diff_{mean,p99,max}``: of |d| over tokens, each once; p99 exact over all ranks.
  ``logprob_diff_mean/depth_A_B``: of tokens with A to B trained tokens before them in the response
- ``kl``: mean of -d (k1), ``k3_kl``: mean of rho - 1 - d; of KL(rollout || train), weighted as the
  loss is (a shared token counts once a response). Verl has both under ``rollout_corr/``
- ``is_mean``, ``is_eff_sample_size``: of the correction's weights; of rho itself without one, which
  is what a full correction would cost

``training/staleness/{mean,max}``: versions between the weights in force and those that drew a
token, each token once.
"""

from __future__ import annotations

import torch

from trainers.kl import LARGEST_LOG_RATIO
from trainers.losses import TrainedTokens, trained_leaves
from trainers.metrics import MetricSums
from trainers.off_policy import Correction
from trainers.path_sums import path_sums

NAME = "training/rollout"
# Trained tokens before a token in its response: buckets from each number to below the next.
DEPTHS = (0, 128, 1024, 8192)


def add_mismatch(sums: MetricSums, tokens: TrainedTokens, correction: Correction | None) -> None:
    """Add a row of a step's first update, whose log-probs are of the weights before the step."""
    train = tokens.logprobs.detach()
    rollout = tokens.batch.behaviour_logprobs[tokens.index]
    difference = train - rollout
    sums.add_difference(f"{NAME}_probs_diff", (train.exp() - rollout.exp()).abs())
    sums.add_difference(f"{NAME}_logprob_diff", difference.abs())
    sums.add_quantile(f"{NAME}_logprob_diff_p99", difference.abs(), 0.99)
    _add_by_depth(sums, tokens, difference.abs())
    clamped = difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    estimates = {f"{NAME}_kl": -difference, f"{NAME}_k3_kl": clamped.expm1() - clamped}
    sums.add_weighted(estimates, tokens.weight, "rollout_kl")

    weights, measure = clamped.exp(), tokens.weight
    if correction is not None:
        weights = correction.weights
        if correction.of_responses:
            leaves, batch = trained_leaves(tokens.batch), tokens.batch
            weights = weights[leaves]
            measure = batch.leaf_weight[leaves] * batch.leaf_num_tokens[leaves]
    sums.add_eff_sample_size(f"{NAME}_is_eff_sample_size", weights, measure)
    sums.add_weighted({f"{NAME}_is_mean": weights}, measure, "rollout_is")


def add_ages(sums: MetricSums, versions: torch.Tensor, policy_version: int) -> None:
    """Add the policy versions [K] of a row's tokens, those masked for their age included."""
    sums.add_difference("training/staleness", (policy_version - versions).double(), "/")


def _add_by_depth(sums: MetricSums, tokens: TrainedTokens, values: torch.Tensor) -> None:
    ones = torch.ones_like(values)
    until = tokens.batch.visible_until
    before = path_sums(ones, tokens.index, until, tokens.index).round().long() - 1
    for low, high in zip(DEPTHS, (*DEPTHS[1:], None), strict=True):
        within = (before >= low) & (before < (high or torch.iinfo(torch.int64).max))
        name = f"depth_{low}_{high - 1}" if high else f"depth_{low}_up"
        sums.add_weighted(
            {f"{NAME}_logprob_diff_mean/{name}": values},
            within.to(values.dtype),
            f"rollout_{name}",
            where_any=True,
        )
