"""What the policy loss sees of a row: trained tokens, corrected for the sampler and without those
that are masked. And what it is divided by.

The tokens' own records are left alone, since KL penalty and entropy bonus are of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from trainers import mpt, off_policy
from trainers.batch import PackedBatch, on_device
from trainers.left_out import weight_without, without
from trainers.losses import LeftOut, TrainedTokens, trained_leaves, trained_tokens
from trainers.metrics import MetricSums, all_reduced
from trainers.settings import LearnerSettings, is_sequence_level

# Log-probs and entropies [M] of a row's tokens ``index``, without gradient.
Forward = Callable[[PackedBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyView:
    """A row as the policy loss sees it.

    Attributes:
        tokens: advantages, lengths and paths without what is masked.
        seen_weight: [M], the part of the tokens' weight that has a part in the loss.
        counted_weight: [M], the part of it that counts in what the loss is divided by.
        correction: of the sampler's probabilities; None without one.
        metrics: shares a token [M] of the weight that each mask takes.
        sequence_metrics: [N], of the trained leaves.
    """

    tokens: TrainedTokens
    seen_weight: torch.Tensor
    counted_weight: torch.Tensor
    correction: off_policy.Correction | None = None
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sequence_metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def with_denominator(self, denominator: float) -> TrainedTokens:
        """The tokens as the policy loss takes them."""
        return replace(self.tokens, batch=replace(self.tokens.batch, denominator=denominator))


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateFacts:
    """What a row's loss must know of its whole update, over all ranks.

    Attributes:
        policy_version: of the weights in force before the step.
        entropy: mean over trained tokens, weighted as the loss is; None if nobody asks.
        scale: what the denominator of KL and entropy is multiplied by.
        policy_scale: the same of the policy loss.
    """

    policy_version: int
    entropy: float | None = None
    scale: float = 1.0
    policy_scale: float = 1.0


def policy_view(
    tokens: TrainedTokens, settings: LearnerSettings, batch_entropy: float | None = None
) -> PolicyView:
    """The row of ``tokens`` as the policy loss sees it."""
    off = settings.off_policy
    of_responses = is_sequence_level(settings.policy_loss.name)
    correction = off_policy.correction_of(tokens, off, of_responses=of_responses)
    mastered = mpt.masks(tokens, settings.mpt, batch_entropy)
    seen = tokens if mastered is None else without(tokens, mastered)
    seen = seen if correction is None else off_policy.corrected(seen, correction)

    dropped = correction.dropped if correction is not None and off.drops else None
    metrics = {
        f"actor/{name}_masked_frac": 1 - weight_without(tokens, mask) / tokens.weight
        for name, mask in (("correction", dropped), ("mpt", mastered))
        if mask is not None
    }
    sequence_metrics = {}
    if mastered is not None:
        gated = mastered.leaves[trained_leaves(tokens.batch)]
        sequence_metrics["actor/mpt_responses_frac"] = gated.to(tokens.weight.dtype)
    return PolicyView(
        tokens=seen,
        seen_weight=_weight_left(tokens, dropped, mastered),
        counted_weight=_weight_left(
            tokens,
            None if off.masked_in_denominator else dropped,
            None if settings.mpt.masked_in_denominator else mastered,
        ),
        correction=correction,
        metrics=metrics,
        sequence_metrics=sequence_metrics,
    )


def _weight_left(
    tokens: TrainedTokens, dropped: LeftOut | None, mastered: LeftOut | None
) -> torch.Tensor:
    """``weight`` [M] without what a correction drops (some tokens of all leaves, or all tokens of
    some) and what MPT masking takes (some tokens of some leaves).
    """
    if dropped is not None and bool(dropped.leaves.all()):
        return torch.where(dropped.tokens, 0.0, _weight_left(tokens, None, mastered))
    if dropped is not None:
        batch = tokens.batch
        kept = replace(batch, leaf_weight=torch.where(dropped.leaves, 0.0, batch.leaf_weight))
        weight = weight_without(tokens, dropped)
        return _weight_left(replace(tokens, weight=weight, batch=kept), None, mastered)
    return tokens.weight if mastered is None else weight_without(tokens, mastered)


def add_masked(
    sums: MetricSums, whole: PackedBatch, view: PolicyView, settings: LearnerSettings
) -> None:
    """Add the shares of a row's weight that are masked, where something masks: by each mask, and
    together (``actor/masked_frac``).

    Args:
        whole: the row before old tokens were taken out.
    """
    off, trained = settings.off_policy, view.tokens.index
    sums.add_weighted(view.metrics, whole.weight[trained], "masked")
    if off.masks or settings.mpt.gate != "never":
        sums.add_masked_share("actor/masked_frac", whole.weight, view.seen_weight)
    if off.mask_older_than is not None:
        sums.add_masked_share("actor/old_masked_frac", whole.weight, whole.weight[trained])


def facts_of_update(
    rows: Sequence[PackedBatch],
    old_logprobs: Sequence[torch.Tensor | None],
    settings: LearnerSettings,
    policy_version: int,
    forward: Forward,
    device: torch.device,
) -> UpdateFacts:
    """What the losses of this update's rows must know of all of them; see :func:`needs_forward`
    for what it costs. Collective.

    Args:
        rows: of this rank.
        old_logprobs: of each row, see :func:`ratio_logprobs`.
    """
    off = settings.off_policy
    if not needs_forward(settings) and (off.masked_in_denominator or off.mask_older_than is None):
        return UpdateFacts(policy_version=policy_version)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total, recent, entropy = zero, zero, zero
    scored: list[TrainedTokens] = []
    for row, old in zip(rows, old_logprobs, strict=True):
        batch, index = off_policy.trained_index(on_device(row, device), off, policy_version)
        total = total + batch.weight.double().sum()
        recent = recent + batch.weight[index].double().sum()
        if needs_forward(settings):
            logprobs, entropies = forward(batch, index)
            before = ratio_logprobs(settings, logprobs, old, index)
            tokens = trained_tokens(batch, index, logprobs, entropies, old_logprobs=before)
            entropy = entropy + (tokens.weight.double() * entropies).sum()
            scored.append(tokens)
    sums = all_reduced({"total": total, "recent": recent, "entropy": entropy}, device)
    mean_entropy = sums["entropy"] / sums["recent"] if sums["recent"] else 0.0
    counted, uncounted = recent, 0.0 if not off.masked_in_denominator else total - recent
    if scored:
        views = [policy_view(tokens, settings, mean_entropy) for tokens in scored]
        counted = torch.stack([view.counted_weight.double().sum() for view in views]).sum()
    (policy,) = all_reduced({"policy": counted + uncounted}, device).values()

    def scale(weight: float) -> float:
        return weight / sums["total"] if weight > 0 else 1.0  # without any, the loss is 0

    return UpdateFacts(
        policy_version=policy_version,
        entropy=mean_entropy,
        scale=1.0 if off.masked_in_denominator else scale(sums["recent"]),
        policy_scale=scale(policy),
    )


def ratio_logprobs(
    settings: LearnerSettings,
    logprobs: torch.Tensor,
    old: torch.Tensor | None,
    index: torch.Tensor,
) -> torch.Tensor | None:
    """The old log-probs [M] of a row's tokens ``index``; None: those of sampling.

    Args:
        logprobs: [M], of the policy being trained.
        old: with ``old_logprobs=recomputed``, the row's from before the step's first update [T];
            None in the first update, whose own they are.
    """
    if settings.old_logprobs == "sampled":
        return None
    return logprobs.detach() if old is None else old.to(logprobs.device)[index]


def needs_forward(settings: LearnerSettings) -> bool:
    """Whether an update's rows must go through the model once more before their losses: for its
    mean entropy, or to know what is masked where that is to leave the denominator.
    """
    off, masking = settings.off_policy, settings.mpt
    return (
        masking.gate == "batch"
        or (masking.gate != "never" and not masking.masked_in_denominator)
        or (off.drops and not off.masked_in_denominator)
    )
