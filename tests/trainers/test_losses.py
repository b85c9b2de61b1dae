"""Policy losses against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from trainers.losses import POLICY_LOSSES, TrainedTokens
from trainers.settings import PolicyLossSettings

SETTINGS = PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0)


def loss_of(ratios, pos, neg, name="ppo_clip", weight=None):
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    tokens = TrainedTokens(
        logprobs=logprobs,
        entropy=torch.zeros_like(old),
        old_logprobs=old,
        advantage_pos=torch.tensor(pos, dtype=torch.float64),
        advantage_neg=torch.tensor(neg, dtype=torch.float64),
        weight=torch.ones_like(old) if weight is None else torch.tensor(weight),
        index=torch.arange(len(ratios)),
        batch=None,
    )
    losses = POLICY_LOSSES.get(name)(tokens, SETTINGS)
    losses.loss.sum().backward()
    return losses, logprobs.grad


def test_positive_advantage_is_clipped_above_only():
    losses, gradient = loss_of([0.5, 1.0, 1.2, 1.5], [2.0] * 4, [0.0] * 4)
    assert losses.loss.tolist() == pytest.approx([-1.0, -2.0, -2.4, -2.6])
    assert gradient.tolist() == pytest.approx([-1.0, -2.0, -2.4, 0.0])
    assert losses.metrics["actor/pg_clipfrac"].tolist() == [0, 0, 0, 1]


def test_negative_advantage_is_clipped_below_and_by_the_dual_clip_above():
    losses, gradient = loss_of([0.5, 1.0, 2.0, 4.0], [0.0] * 4, [-2.0] * 4)
    assert losses.loss.tolist() == pytest.approx([1.6, 2.0, 4.0, 6.0])
    assert gradient.tolist() == pytest.approx([0.0, 2.0, 4.0, 0.0])
    assert losses.metrics["actor/pg_clipfrac"].tolist() == [1, 0, 0, 0]
    assert losses.metrics["actor/pg_clipfrac_lower"].tolist() == [0, 0, 0, 1]


def test_leaves_of_both_signs_add_up_in_a_shared_token():
    losses, gradient = loss_of([1.5], [3.0], [-1.0])
    assert losses.loss.item() == pytest.approx(-(1.3 * 3.0) + 1.5 * 1.0)
    assert gradient.item() == pytest.approx(1.5)  # the positive part is clipped
    assert losses.metrics["actor/pg_clipfrac"].item() == pytest.approx(0.75)


def test_the_tree_loss_is_the_sum_of_the_textbook_losses_of_its_leaves():
    """Against verl's formulation: max of both surrogates, bounded by -A c for negative A."""
    generator = torch.Generator().manual_seed(0)
    ratios = (torch.randn(200, generator=generator) * 0.8).exp().tolist()
    advantages = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(200, 5, generator=generator, dtype=torch.float64)
    pos = (weights * advantages.clamp(min=0)).sum(1).tolist()
    neg = (weights * advantages.clamp(max=0)).sum(1).tolist()
    losses, _ = loss_of(ratios, pos, neg)
    expected = []
    for ratio, leaf_advantages, leaf_weights in zip(ratios, advantages, weights, strict=True):
        total = 0.0
        for a, w in zip(leaf_advantages.tolist(), leaf_weights.tolist(), strict=True):
            clipped = max(-a * ratio, -a * min(max(ratio, 0.8), 1.3))
            total += w * (min(clipped, -a * 3.0) if a < 0 else clipped)
        expected.append(total)
    assert losses.loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_kl_and_ratio_metrics():
    losses, _ = loss_of([2.0, 0.5], [1.0, 1.0], [0.0, 0.0])
    assert losses.metrics["actor/ppo_kl"].tolist() == pytest.approx([-math.log(2), math.log(2)])
    assert losses.metrics["actor/ratio_mean"].tolist() == pytest.approx([2.0, 0.5])


def test_reinforce_and_nll():
    losses, gradient = loss_of([1.0, 2.0], [1.0, 0.0], [0.0, -3.0], name="reinforce")
    assert gradient.tolist() == pytest.approx([-1.0, 3.0])
    losses, gradient = loss_of([1.0], [0.0], [0.0], name="nll", weight=[2.5])
    assert losses.loss.item() == pytest.approx(2.5) and gradient.item() == pytest.approx(-2.5)


def test_an_unknown_loss_names_the_known_ones():
    with pytest.raises(ValueError, match="nll, ppo_clip, reinforce"):
        POLICY_LOSSES.get("ppo_clips")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_ratio_low", -0.1),
        ("clip_ratio_low", 1.1),
        ("clip_ratio_high", -1),
        ("clip_ratio_c", 1),
    ],
)
def test_impossible_bounds_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        PolicyLossSettings(**{field: value})
