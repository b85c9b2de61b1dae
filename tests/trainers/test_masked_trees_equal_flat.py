"""Off-policy corrections, old-token masks and MPT masks on packed trees, against each leaf by
itself with the objective as the papers write it: token by token, in float64.

Log-probs and entropies are parameters read from tables by path, so that a gradient is one number a
path; that models give trees and sequences the same log-probs is tested beside the losses.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from path_tables import NEWEST, token_paths, trees_and_sequences

from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.mpt_settings import MPTSettings
from trainers.objective import objective
from trainers.off_policy import trained_index
from trainers.off_policy_settings import OffPolicySettings
from trainers.packing import pack_row, total_weight
from trainers.policy_view import facts_of_update, policy_view, ratio_logprobs
from trainers.settings import LearnerSettings, PolicyLossSettings

MAX_LENGTH = 40  # of the fixed-length normalisation
LOSSES = {
    "ppo_clip": PolicyLossSettings(
        clip_ratio_low=0.2, clip_ratio_high=0.15, clip_ratio_c=1.4, entropy_coeff=0.2
    ),
    "gspo": PolicyLossSettings(
        name="gspo", clip_ratio_low=0.05, clip_ratio_high=0.04, kl_loss_coef=0.3
    ),
    "cispo": PolicyLossSettings(name="cispo", clip_ratio_low=0.3, clip_ratio_high=0.2),
    "reinforce": PolicyLossSettings(name="reinforce"),
}
CORRECTIONS = [
    {},
    {"correction": "decoupled"},
    {"correction": "decoupled", "cap": 1.3},
    {"correction": "tis", "cap": 1.1},
    {"correction": "icepop", "band": [0.8, 1.4]},
]
GATES = ["never", "response", "batch", "always"]


def settings_of(loss, correction, gate, policy, oldest, in_denominator):
    """None where nothing would leave the denominator, which the settings refuse."""
    off = correction | {"mask_older_than": oldest}
    off_out, mpt_out = not in_denominator[0], not in_denominator[1]
    drops = correction.get("correction") == "icepop" or (
        correction.get("correction") == "decoupled" and "cap" in correction
    )
    if (off_out and not drops and oldest is None) or (mpt_out and gate == "never"):
        return None
    mpt = {}
    if gate != "never":
        mpt = {"min_prob": 0.6, "policy": policy, "masked_in_denominator": in_denominator[1]}
    if gate in ("response", "batch"):
        mpt |= {"max_entropy": 0.29}
    recomputed = bool(correction)
    return LearnerSettings(
        policy_loss=LOSSES[loss],
        old_logprobs="recomputed" if recomputed else "sampled",
        off_policy=OffPolicySettings(**off, masked_in_denominator=in_denominator[0]),
        mpt=MPTSettings(gate=gate, **mpt),
    )


def tree_objective(rows, tables, settings):
    """As the learner has it: facts of the update, then each row by itself."""
    loss = 0.0

    def read(name, batch, index):
        paths = token_paths(batch)
        at = torch.tensor([tables.rows[paths[i]] for i in index], dtype=torch.long)
        return getattr(tables, name)[at]

    def forward(batch, index):
        return read("logprobs", batch, index).detach(), read("entropy", batch, index).detach()

    def before(row):
        full = torch.zeros(row.num_tokens, dtype=torch.float64)
        index = torch.nonzero(row.weight > 0)[:, 0]
        full[index] = read("old", row, index)
        return full

    olds = [before(row) if settings.old_logprobs == "recomputed" else None for row in rows]
    facts = facts_of_update(rows, olds, settings, NEWEST, forward, torch.device("cpu"))
    for row, old in zip(rows, olds, strict=True):
        batch, index = trained_index(row, settings.off_policy, NEWEST)
        batch = replace(batch, denominator=row.denominator * facts.scale)
        logprobs = read("logprobs", batch, index)
        tokens = trained_tokens(
            batch,
            index,
            logprobs,
            read("entropy", batch, index),
            read("reference", batch, index),
            ratio_logprobs(settings, logprobs, old, index),
        )
        view = policy_view(tokens, settings, facts.entropy)
        seen = view.with_denominator(row.denominator * facts.policy_scale)
        name = settings.policy_loss.name
        loss = loss + objective(tokens, POLICY_LOSSES.get(name), settings.policy_loss, seen).loss
    return loss


def flat_objective(sequences, tables, settings, denominator):
    """The definitions, a leaf at a time."""
    off, mpt, loss = settings.off_policy, settings.mpt, settings.policy_loss
    bounds = loss.bounds()
    leaves = []
    for sequence in sequences:
        paths = token_paths(sequence)
        trained = [i for i, weight in enumerate(sequence.weight.tolist()) if weight > 0]
        at = torch.tensor([tables.rows[paths[i]] for i in trained], dtype=torch.long)
        recent = tables.versions[at] >= NEWEST - (
            99 if off.mask_older_than is None else off.mask_older_than
        )
        leaves.append((sequence, at, recent))
    weight_of = [float(sequence.leaf_weight) for sequence, _, _ in leaves]
    everything = sum(w * len(at) for w, (_, at, _) in zip(weight_of, leaves, strict=True))
    recent_weight = sum(w * int(r.sum()) for w, (_, _, r) in zip(weight_of, leaves, strict=True))
    entropy_sum = sum(
        w * float(tables.entropy[at[r]].detach().sum())
        for w, (_, at, r) in zip(weight_of, leaves, strict=True)
    )
    low_batch_entropy = entropy_sum / recent_weight < mpt.max_entropy

    policy, other, counted = 0.0, 0.0, 0.0
    for weight, (sequence, at, recent) in zip(weight_of, leaves, strict=True):
        kept = at[recent]
        if weight == 0 or len(at) == 0:
            continue
        if off.masked_in_denominator:
            counted += weight * (len(at) - len(kept))
        if len(kept) == 0:
            continue
        advantage = float(sequence.leaf_advantage)
        new, behaviour = tables.logprobs[kept], tables.behaviour[kept]
        old = tables.old[kept] if settings.old_logprobs == "recomputed" else behaviour
        rho = (old - behaviour).exp()
        if loss.name == "gspo":
            rho = (old - behaviour).mean().exp().expand(len(kept))
        omega = {
            "none": torch.ones_like(rho),
            "decoupled": rho if off.cap is None else rho * (rho <= off.cap),
            "tis": rho.clamp(max=off.cap or 2.0),
            "icepop": rho * (rho >= off.kept_band[0]) * (rho <= off.kept_band[1]),
        }[off.correction]
        decides = new.detach() if mpt.policy == "current" else old
        gate = {
            "never": False,
            "response": float(tables.entropy[kept].detach().mean()) < mpt.max_entropy,
            "batch": low_batch_entropy,
            "always": True,
        }[mpt.gate]
        positive = float(sequence.leaf_reward) >= mpt.min_reward
        masked = (decides.exp() >= mpt.min_prob) & bool(gate and positive)

        counts = torch.ones(len(kept))
        if not off.masked_in_denominator:
            counts = counts * (omega > 0)
        if not mpt.masked_in_denominator:
            counts = counts * ~masked
        counted += weight * float(counts.sum())

        ratio = (new - old).exp()
        if loss.name == "gspo":
            left = ~masked
            if left.any():
                ratio = (new - old)[left].mean().exp()
                gain = torch.minimum(
                    ratio * advantage, ratio.clamp(bounds.low, bounds.high) * advantage
                )
                policy = policy - weight * omega[0] * left.sum() * gain
        else:
            if loss.name == "ppo_clip":
                gain = torch.minimum(
                    ratio * advantage, ratio.clamp(bounds.low, bounds.high) * advantage
                )
                if advantage < 0:
                    gain = gain.clamp(min=bounds.dual * advantage)
            elif loss.name == "cispo":
                gain = ratio.clamp(bounds.low, bounds.high).detach() * advantage * new
            else:
                gain = advantage * new
            policy = policy - weight * (omega * gain)[~masked].sum()
        apart = new - tables.reference[kept]
        other = other + weight * loss.kl_loss_coef * (torch.exp(-apart) + apart - 1).sum()
        other = other - weight * loss.entropy_coeff * tables.entropy[kept].sum()
    # what is masked leaves the denominator in proportion to its weight
    scale = 1.0 if off.masked_in_denominator else recent_weight / everything
    return policy / (denominator * (counted / everything)) + other / (denominator * scale)


def gradients(loss, tables):
    found = torch.autograd.grad(loss, [tables.logprobs, tables.entropy], allow_unused=True)
    return [torch.zeros_like(tables.logprobs) if one is None else one for one in found]


def every_setting(loss):
    for correction, gate, oldest, policy, *inside in itertools.product(
        CORRECTIONS, GATES, (None, 1), ("current", "old"), (True, False), (True, False)
    ):
        if gate == "never" and policy == "old":
            continue
        settings = settings_of(loss, correction, gate, policy, oldest, inside)
        if settings is not None:
            yield settings


WEIGHTINGS = ["token_mean", "sequence_mean", "fixed_length"]


def check(loss, loss_weighting, chosen):
    """Objectives and gradients of the settings at the places ``chosen`` (a slice)."""
    weighting = "sequence_mean" if loss_weighting == "sequence_mean" else "token_mean"
    trees, sequences, tables = trees_and_sequences(5, weighting)
    denominator = total_weight(trees)
    if loss_weighting == "fixed_length":
        denominator = MAX_LENGTH * sum(int((tree.leaf_weight > 0).sum()) for tree in trees)
    rows = [pack_row(trees[:2], denominator), pack_row(trees[2:], denominator)]
    outcomes = []
    for settings in list(every_setting(loss))[chosen]:
        own = tree_objective(rows, tables, settings)
        expected = flat_objective(sequences, tables, settings, denominator)
        what = f"{settings.off_policy} {settings.mpt}"
        assert own.item() == pytest.approx(expected.item(), rel=1e-11, abs=1e-13), what
        for a, b in zip(gradients(own, tables), gradients(expected, tables), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=lambda t, w=what: w + t)
        outcomes.append(round(own.item(), 9))
    return outcomes


@pytest.mark.parametrize(
    ("place", "loss", "loss_weighting"),
    [(n, *case) for n, case in enumerate(itertools.product(LOSSES, WEIGHTINGS))],
)
def test_masked_and_corrected_trees_train_as_their_leaves_one_by_one(place, loss, loss_weighting):
    """A part of all settings, another for each loss and weighting."""
    outcomes = check(loss, loss_weighting, slice(3 * place, None, 37))
    assert len(outcomes) >= 4 and len(set(outcomes)) > 3


@pytest.mark.long
@pytest.mark.parametrize("loss_weighting", WEIGHTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_mask_with_every_correction_trains_trees_as_their_leaves_one_by_one(
    loss, loss_weighting
):
    outcomes = check(loss, loss_weighting, slice(None))
    assert len(outcomes) > 150 and len(set(outcomes)) > 60  # the settings differ in what they do


def test_the_compared_tokens_are_shared_by_leaves_of_both_signs_and_rewards_and_of_every_age():
    trees, _, tables = trees_and_sequences(5, "token_mean")
    both = sum(int(((t.advantage_pos > 0) & (t.advantage_neg < 0)).sum()) for t in trees)
    assert both > 10 and len({int(n) for t in trees for n in t.leaf_num_tokens}) > 5
    assert {float(r) for t in trees for r in t.leaf_reward} == {0.0, 0.5, 1.0, 1.5}
    assert set(tables.versions.tolist()) == set(range(NEWEST - 3, NEWEST + 1))
