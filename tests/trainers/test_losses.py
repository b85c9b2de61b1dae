"""Policy losses against hand-computed numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from trainers.kl import kl_terms
from trainers.losses import POLICY_LOSSES, TrainedTokens, trained_tokens
from trainers.packing import pack_row, path_tree
from trainers.settings import PolicyLossSettings, is_sequence_level

SETTINGS = {
    "ppo_clip": PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0),
    "cispo": PolicyLossSettings(name="cispo", clip_ratio_low=0.2, clip_ratio_high=0.3),
    "gspo": PolicyLossSettings(name="gspo", clip_ratio_low=0.2, clip_ratio_high=0.3),
    "reinforce": PolicyLossSettings(name="reinforce"),
    "nll": PolicyLossSettings(name="nll"),
}


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
    losses = POLICY_LOSSES.get(name)(tokens, SETTINGS[name])
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


def test_cispo_keeps_the_gradient_of_tokens_whose_ratio_is_clipped():
    losses, gradient = loss_of([0.5, 1.0, 2.0], [2.0, 2.0, 0.0], [0.0, -1.0, -3.0], name="cispo")
    # -clip(r) (A+ + A-), with r clipped to 0.8 and 1.3
    assert gradient.tolist() == pytest.approx([-1.6, -1.0, 3.9])
    logprobs = [-1 + math.log(0.5), -1.0, -1 + math.log(2)]
    expected = [g * logprob for g, logprob in zip([-1.6, -1.0, 3.9], logprobs, strict=True)]
    assert losses.loss.tolist() == pytest.approx(expected)
    assert losses.metrics["actor/pg_clipfrac"].tolist() == [1, 0, 1]


def two_leaves(advantages, weights):
    """A prompt of one token, a shared trained token, then a leaf of one more token and a leaf of a
    forced token and two more: responses of 2 and 3 trained tokens.
    """
    row = pack_row([path_tree(torch.zeros(6, dtype=torch.int64))])
    fields = {
        "visible_until": torch.tensor([6, 6, 3, 6, 6, 6, 7, 8]),
        "predictor": torch.tensor([-1, 0, 1, 1, 3, 4, -1, -1]),
        "leaf_token": torch.tensor([2, 5]),
        "leaf_advantage": torch.tensor(advantages, dtype=torch.float64),
        "leaf_weight": torch.tensor(weights, dtype=torch.float64),
        "leaf_num_tokens": torch.tensor([2, 3]),
    }
    return dataclasses.replace(row, **fields), torch.tensor([1, 2, 4, 5])


def gspo_of(ratios, advantages, weights=(1.0, 1.0)):
    """Of tokens' ratios: the shared one, the first leaf's own, the second leaf's own two."""
    row, index = two_leaves(advantages, weights)
    old = torch.full((4,), -2.0, dtype=torch.float64)
    logprobs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    zeros = torch.zeros(4, dtype=torch.float64)
    tokens = dataclasses.replace(
        trained_tokens(row, index, logprobs, zeros), old_logprobs=old, weight=zeros + 1
    )
    terms = POLICY_LOSSES.get("gspo")(tokens, SETTINGS["gspo"])
    terms.loss.sum().backward()
    return terms, logprobs.grad.tolist()


def test_gspo_clips_the_geometric_mean_of_a_response():
    # s = sqrt(1.2 * 1.2) = 1.2 and (1.2 * 0.9 * 1.0) ** (1 / 3) = 1.02599
    second = (1.2 * 0.9) ** (1 / 3)
    terms, gradient = gspo_of([1.2, 1.2, 0.9, 1.0], [1.0, -2.0])
    assert terms.loss.tolist() == pytest.approx([-2 * 1.2, 3 * 2 * second])
    # d/d logprob of -|y| s A is -s A in every token of the response
    assert gradient == pytest.approx([-1.2 + 2 * second, -1.2, 2 * second, 2 * second])
    assert terms.sequence_metrics["actor/pg_clipfrac"].tolist() == [0, 0]
    assert terms.sequence_metrics["actor/sequence_ratio_mean"].tolist() == pytest.approx(
        [1.2, second]
    )


def test_gspo_stops_the_gradient_of_a_whole_response_that_is_clipped():
    # 1.4 > 1.3 with a positive advantage; (1.4 * 0.5 * 0.5) ** (1 / 3) = 0.705 < 0.8, a negative
    terms, gradient = gspo_of([1.4, 1.4, 0.5, 0.5], [1.0, -2.0])
    assert terms.loss.tolist() == pytest.approx([-2 * 1.3, 3 * 2 * 0.8])
    assert gradient == pytest.approx([0, 0, 0, 0], abs=1e-15)
    assert terms.sequence_metrics["actor/pg_clipfrac"].tolist() == [1, 1]
    # with the signs exchanged neither is: the bound is on the side that a step would leave by
    terms, gradient = gspo_of([1.4, 1.4, 0.5, 0.5], [-1.0, 2.0])
    assert terms.sequence_metrics["actor/pg_clipfrac"].tolist() == [0, 0]
    assert gradient[1] == pytest.approx(1.4) and gradient[2] < 0


def test_gspo_leaves_out_responses_of_weight_0():
    terms, gradient = gspo_of([1.0, 1.0, 1.0, 1.0], [1.0, 5.0], weights=[0.5, 0.0])
    assert terms.loss.tolist() == pytest.approx([-1.0])
    assert gradient == pytest.approx([-0.5, -0.5, 0, 0])


def test_gspo_is_the_mean_over_responses_when_each_weighs_one_over_its_length():
    """arXiv 2507.18071, Eq. 5: (1 / G) sum of min(s A, clip(s) A); the denominator is G."""
    terms, _ = gspo_of([1.0, 1.0, 1.0, 1.0], [1.5, -0.5], weights=[1 / 2, 1 / 3])
    assert terms.loss.sum().item() == pytest.approx(-(1.5 - 0.5))


def test_an_unknown_loss_names_the_known_ones():
    with pytest.raises(ValueError, match="cispo, gspo, nll, ppo_clip, reinforce"):
        POLICY_LOSSES.get("ppo_clips")


def test_bounds_that_are_left_out_are_those_of_the_loss(tmp_path):
    (tmp_path / "theirs.py").write_text("def loss(tokens, settings): ...")
    for name, low, high, dual in [
        ("ppo_clip", 0.8, 1.28, 10.0),
        ("gspo", 1 - 3e-4, 1 + 4e-4, math.inf),
        ("cispo", 0.0, 1.28, math.inf),
        (f"{tmp_path}/theirs.py:loss", 0.8, 1.28, 10.0),
    ]:
        bounds = PolicyLossSettings(name=name).bounds()
        assert (bounds.low, bounds.high, bounds.dual) == pytest.approx((low, high, dual)), name
    assert PolicyLossSettings(name="gspo", clip_ratio_high=0.1).bounds().high == pytest.approx(1.1)


def test_which_losses_are_of_whole_responses_is_known_by_name():
    assert {name for name in POLICY_LOSSES if is_sequence_level(name)} == {"gspo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gspo", "clip_ratio_c": 3.0}, "clip_ratio_c=3.0 is not used.*'gspo'.*ppo_clip"),
        ({"name": "nll", "clip_ratio_high": 0.3}, "clip_ratio_high=0.3.*'nll'.*gspo or cispo"),
        ({"kl_loss_type": "k1"}, "kl_loss_type='k1' is not used with kl_loss_coef=0"),
        ({"kl_loss_coef": -0.1}, "kl_loss_coef=-0.1: must be >= 0"),
        ({"kl_loss_coef": 0.1, "kl_loss_type": "k4"}, "one of k1, k2, k3$"),
        ({"kl_loss_coef": 0.1, "kl_loss_type": "low_var_kl"}, r"k1, k2, k3 \(low_var_kl is k3\)"),
        ({"entropy_coeff": -1.0}, "entropy_coeff=-1.0: must be >= 0"),
    ],
)
def test_settings_that_do_not_fit_each_other_say_which_do(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossSettings(**changes)


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


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "reinforce"])
def test_a_ratio_beyond_all_numbers_gives_no_nan(name):
    old = torch.tensor([-200.0, -1.0])  # float32: exp(199) is infinite
    logprobs = torch.tensor([-1.0, -200.0], requires_grad=True)
    tokens = TrainedTokens(
        logprobs=logprobs,
        entropy=torch.zeros(2),
        old_logprobs=old,
        advantage_pos=torch.ones(2),
        advantage_neg=-torch.ones(2),
        weight=torch.ones(2),
        index=torch.arange(2),
        batch=None,
    )
    losses = POLICY_LOSSES.get(name)(tokens, SETTINGS[name])
    losses.loss.sum().backward()
    assert losses.loss.isfinite().all() and logprobs.grad.isfinite().all()
    assert all(values.isfinite().all() for values in losses.metrics.values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_token_that_the_policy_has_given_up_gives_a_finite_kl(kind):
    logprobs = torch.tensor([-200.0], requires_grad=True)
    term = kl_terms(logprobs, torch.tensor([-1.0]), kind)
    term.sum().backward()
    assert term.isfinite().all() and logprobs.grad.isfinite().all()
