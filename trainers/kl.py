"""Estimators of KL(policy || reference) from sampled tokens (J. Schulman, "Approximating KL
divergence", 2020).

With d = logprob - reference logprob of a sampled token:

- k1 = d: unbiased, and negative at times. As a loss it does nothing on average: the mean of its
  gradient over the policy's own samples is 0.
- k2 = d^2 / 2: never negative, biased. Its gradient, d * grad logprob, is on average that of the
  KL divergence.
- k3 = exp(-d) - 1 + d: unbiased, never negative, low variance. Its gradient,
  (1 - exp(-d)) * grad logprob, is on average that of KL(reference || policy).
"""

from __future__ import annotations

import torch

# Logarithms of ratios of probabilities are kept below: exp of more than 88 overflows in float32,
# and where a clip follows its gradient would be 0 times infinity.
LARGEST_LOG_RATIO = 20.0


def kl_terms(
    logprobs: torch.Tensor,  # [M], with gradient
    ref_logprobs: torch.Tensor,  # [M]
    kind: str,
) -> torch.Tensor:
    """The estimate [M] of each token, differentiable; ``kind`` is k1, k2 or k3."""
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    assert kind == "k3", kind
    return torch.expm1((-difference).clamp(max=LARGEST_LOG_RATIO)) + difference
