"""The objective of plain sequences as the papers write it, through transformers' own attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainers.batch import TokenTree
from trainers.settings import PolicyLossSettings

EAGER = {"gemma2", "gpt_oss"}  # soft caps and sinks, which sdpa has not


@dataclass(frozen=True)
class Scored:
    """What a model says of one sequence's trained tokens; all [m]."""

    index: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor


def plain_scores(model, sequence: TokenTree) -> Scored:
    """Log-probabilities and entropies of the trained tokens of a tree with one leaf."""
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    logits = model(sequence.token_ids[None], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits / sequence.temperature[0], -1)
    index = torch.nonzero(sequence.weight > 0).squeeze(1)
    before = logprobs[sequence.predictor[index]]
    entropy = -(before.exp() * before).sum(-1)
    return Scored(index, before.gather(1, sequence.token_ids[index][:, None])[:, 0], entropy)


def flat_objective(
    sequence: TokenTree,
    scored: Scored,
    reference: Scored,
    settings: PolicyLossSettings,
    denominator: float,
) -> torch.Tensor:
    """One sequence's share of the objective, token by token and leaf by leaf."""
    (weight,), (advantage,) = sequence.leaf_weight, sequence.leaf_advantage
    new, old = scored.logprobs, sequence.behaviour_logprobs[scored.index]
    length, ratio = len(new), (new - old).exp()
    bounds = settings.bounds()
    if length == 0:
        return new.sum()

    def surrogate(ratio):
        return torch.minimum(ratio * advantage, ratio.clamp(bounds.low, bounds.high) * advantage)

    if settings.name == "ppo_clip":
        gain = surrogate(ratio)
        if advantage < 0:
            gain = torch.maximum(gain, bounds.dual * advantage)
        loss = -gain.sum()
    elif settings.name == "gspo":
        loss = -length * surrogate((new - old).mean().exp())
    elif settings.name == "cispo":
        loss = -(ratio.clamp(bounds.low, bounds.high).detach() * advantage * new).sum()
    elif settings.name == "reinforce":
        loss = -(advantage * new).sum()
    else:
        loss = -new.sum()
    apart = new - reference.logprobs
    estimate = {
        "k1": apart,
        "k2": apart**2 / 2,
        "k3": torch.exp(-apart) + apart - 1,
    }[settings.kl_loss_type]
    loss = loss + settings.kl_loss_coef * estimate.sum()
    loss = loss - settings.entropy_coeff * scored.entropy.sum()
    return weight * loss / denominator
