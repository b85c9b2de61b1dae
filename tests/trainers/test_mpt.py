"""MPT masks against numbers worked out by hand: a shared token and two responses of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_losses import two_leaves

from trainers import mpt
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.mpt_settings import MPTSettings
from trainers.policy_view import policy_view
from trainers.settings import LearnerSettings, PolicyLossSettings

# Tokens: shared, the first leaf's own, the second leaf's own two. Rewards 1 and 0.
PROBS = [0.995, 0.995, 0.995, 0.5]
ENTROPIES = [0.3, 0.05, 0.02, 0.6]  # means: 0.175 of the first response, 0.30667 of the second


def tokens_with(rewards=(1.0, 0.0), probs=PROBS, old_probs=None, weights=(1.0, 1.0)):
    row, index = two_leaves([2.0, -1.0], weights)
    row = replace(row, leaf_reward=torch.tensor(rewards))
    logprobs = torch.tensor(probs, dtype=torch.float64).log().requires_grad_()
    old = logprobs.detach() if old_probs is None else torch.tensor(old_probs).double().log()
    entropy = torch.tensor(ENTROPIES, dtype=torch.float64)
    tokens = trained_tokens(row, index, logprobs, entropy, old_logprobs=old)
    weight = torch.tensor([sum(weights), weights[0], weights[1], weights[1]]).double()
    pos = torch.tensor([2.0, 2.0, 0.0, 0.0]).double() * weights[0]
    neg = torch.tensor([-1.0, 0.0, -1.0, -1.0]).double() * weights[1]
    return replace(tokens, weight=weight, advantage_pos=pos, advantage_neg=neg), logprobs


def settings_with(gate, loss="ppo_clip", **changes):
    return LearnerSettings(
        policy_loss=PolicyLossSettings(name=loss), mpt=MPTSettings(gate=gate, **changes)
    )


def gradient_with(gate, loss="ppo_clip", batch_entropy=None, tokens=None, **changes):
    tokens, logprobs = tokens or tokens_with()
    settings = settings_with(gate, loss, **changes)
    view = policy_view(tokens, settings, batch_entropy)
    terms = POLICY_LOSSES.get(loss)(view.tokens, settings.policy_loss)
    terms.loss.sum().backward()
    return logprobs.grad.tolist(), view


def test_a_positive_response_with_low_entropy_loses_its_share_of_well_mastered_tokens():
    """At ratio 1 the gradient is -(A+ + A-): 2 - 1 on the shared token, of which only the negative
    response's -1 is left, and exactly 0 on the first response's own."""
    gradient, view = gradient_with("response")
    assert gradient == pytest.approx([1.0, 0.0, 1.0, 1.0])
    assert gradient[1] == 0
    assert view.seen_weight.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert view.counted_weight.tolist() == [2.0, 1.0, 1.0, 1.0]  # stay in the denominator
    assert view.metrics["actor/mpt_masked_frac"].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert view.sequence_metrics["actor/mpt_responses_frac"].tolist() == [1.0, 0.0]


def test_never_is_the_loss_as_it_is():
    gradient, view = gradient_with("never")
    assert gradient == pytest.approx([-1.0, -2.0, 1.0, 1.0])
    assert view.metrics == {} and view.seen_weight.tolist() == [2.0, 1.0, 1.0, 1.0]


def test_the_gate_is_the_response_s_own_mean_entropy_which_is_positive():
    """Without the minus sign of the entropy every response would be below sigma."""
    assert gradient_with("response", max_entropy=0.176)[0][1] == 0
    assert gradient_with("response", max_entropy=0.174)[0][1] == pytest.approx(-2.0)


def test_the_batch_gate_is_the_update_s_entropy_whatever_the_response_s():
    masked, open_ = [1.0, 0.0, 1.0, 1.0], [-1.0, -2.0, 1.0, 1.0]
    assert gradient_with("batch", batch_entropy=0.19)[0] == pytest.approx(masked)
    assert gradient_with("batch", batch_entropy=0.21)[0] == pytest.approx(open_)
    assert gradient_with("always")[0] == pytest.approx(masked)


def test_only_positive_responses_are_masked_and_only_tokens_of_at_least_tau():
    both = tokens_with(rewards=(1.0, 1.0))
    gradient, _ = gradient_with("always", tokens=both)
    assert gradient == pytest.approx([0, 0, 0, 1.0])  # the last has p = 0.5
    almost = dict(rewards=(0.99, 0.0))
    gradient, _ = gradient_with("always", tokens=tokens_with(**almost))
    assert gradient == pytest.approx([-1.0, -2.0, 1.0, 1.0])
    lower, _ = gradient_with("always", tokens=tokens_with(**almost), min_reward=0.9)
    assert lower == pytest.approx([1.0, 0, 1.0, 1.0])
    exactly = tokens_with(probs=[0.99, 0.9899, 0.5, 0.5])
    gradient, _ = gradient_with("always", tokens=exactly, min_prob=0.99)
    assert gradient[1] == pytest.approx(-2.0)


def test_whose_probability_decides_is_a_setting():
    apart = dict(probs=[0.995, 0.995, 0.5, 0.5], old_probs=[0.995, 0.9, 0.5, 0.5])
    assert gradient_with("always", tokens=tokens_with(**apart))[0][1] == 0
    ratio = 0.995 / 0.9
    old = gradient_with("always", tokens=tokens_with(**apart), policy="old")[0]
    assert old[1] == pytest.approx(-2.0 * ratio) and old[0] == pytest.approx(1.0)


def test_masked_tokens_can_leave_the_denominator():
    _, view = gradient_with("always", masked_in_denominator=False)
    assert view.counted_weight.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_a_response_s_ratio_and_length_are_of_the_tokens_that_are_left():
    """GSPO, ratios 1.0001 and 1.0002 on the first response's shared and own token: with the own
    one masked in the first response alone, s is 1.0001 with length 1; the second is untouched."""
    probs = [0.5, 0.995, 0.4, 0.3]
    old = [0.5 / 1.0001, 0.995 / 1.0002, 0.4, 0.3]
    tokens = tokens_with(probs=probs, old_probs=old)
    gradient, view = gradient_with("always", "gspo", tokens=tokens)
    second = 1.0001 ** (1 / 3)
    assert gradient == pytest.approx([-2 * 1.0001 + second, 0, second, second])
    assert view.tokens.batch.leaf_num_tokens.tolist() == [1, 3]
    # all of a response masked: no term, and nothing that is not a number
    tokens = tokens_with(probs=[0.995, 0.995, 0.4, 0.3])
    gradient, view = gradient_with("always", "gspo", tokens=tokens)
    assert gradient == pytest.approx([1.0, 0, 1.0, 1.0])
    assert view.tokens.batch.leaf_num_tokens.tolist() == [0, 3]


def test_weights_of_responses_are_in_the_shares():
    tokens = tokens_with(weights=(0.5, 0.25))
    gradient, view = gradient_with("always", tokens=tokens)
    assert gradient == pytest.approx([0.25, 0.0, 0.25, 0.25])
    assert view.seen_weight.tolist() == [0.25, 0.0, 0.25, 0.25]


def test_a_failed_verdict_masks_nothing():
    tokens = tokens_with(weights=(0.0, 1.0))[0]
    found = mpt.masks(tokens, MPTSettings(gate="always"), None)
    assert not found.leaves.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "sometimes"}, "mpt.gate='sometimes': must be one of never, response, batch"),
        ({"gate": "batch", "min_prob": 1.5}, r"mpt.min_prob=1.5: must be in \(0, 1\]"),
        ({"gate": "batch", "max_entropy": 0.0}, "mpt.max_entropy=0.0: must be > 0"),
        ({"min_prob": 0.9}, "mpt.min_prob=0.9 is not used with mpt.gate='never'"),
        ({"gate": "always", "max_entropy": 0.3}, "mpt.max_entropy=0.3 is not used.*'always'"),
        ({"gate": "batch", "policy": "new"}, "mpt.policy='new': must be one of current, old"),
    ],
)
def test_settings_that_do_not_fit_say_which_do(changes, message):
    with pytest.raises(ValueError, match=message):
        MPTSettings(**changes)


def test_tau_is_compared_with_the_probability_not_its_logarithm():
    assert math.log(0.99) == pytest.approx(-0.01005, abs=1e-5)
    tokens = tokens_with(probs=[0.9901, 0.9899, 0.5, 0.5])[0]
    found = mpt.masks(tokens, MPTSettings(gate="always"), None)
    assert found.tokens.tolist() == [True, False, False, False]
