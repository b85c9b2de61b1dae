"""Dynamic masking of well-mastered positive tokens (DMMPTs; UloRL, arXiv 2507.19766).

A positive token (of a response with reward >= ``min_reward``) is well mastered when the policy
gives it a probability of at least tau. Training it further only takes entropy away, so it is masked
in the policy loss while mean entropy H is below sigma:

    mask(i, t) = 1[R_i >= min_reward] * 1[p(o_it) >= tau] * 1[H < sigma],
    H = -(1 / |o_i|) sum over t, v of p(v) log p(v)

The paper's formula of H lacks the minus sign, with which it would always be below sigma. Its text
has the model's entropy, its formula the response's: gate ``batch`` and gate ``response``. What is
masked leaves a token that other responses share as :mod:`trainers.left_out` says.
"""

from __future__ import annotations

import math

import torch

from trainers.losses import LeftOut, TrainedTokens
from trainers.mpt_settings import MPTSettings


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
