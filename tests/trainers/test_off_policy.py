"""Corrections and masks of old tokens: weights by hand, what a learner's update does with them."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from path_tables import token_paths
from rank_program import drawn_trees
from test_learner import rows_of, sgd, state_of
from token_trees import flat_trees, random_tree, save_tiny_model, token_tree

from trainers.learner import Learner
from trainers.mpt_settings import MPTSettings
from trainers.off_policy import token_weights, trained_index
from trainers.off_policy_settings import AlarmSettings, OffPolicySettings
from trainers.packing import pack_row
from trainers.settings import LearnerSettings, PolicyLossSettings


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2")


RATIOS = [0.25, 0.5, 1.0, 1.9, 2.5, 5.0, 6.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 7),
        ({"correction": "decoupled"}, RATIOS),
        ({"correction": "decoupled", "cap": 2.0}, [0.25, 0.5, 1.0, 1.9, 0, 0, 0]),
        ({"correction": "tis"}, [0.25, 0.5, 1.0, 1.9, 2.0, 2.0, 2.0]),
        ({"correction": "tis", "cap": 5.5}, [0.25, 0.5, 1.0, 1.9, 2.5, 5.0, 5.5]),
        ({"correction": "icepop"}, [0, 0.5, 1.0, 1.9, 2.5, 5.0, 0]),
        ({"correction": "icepop", "band": [0.2, 2.0]}, [0.25, 0.5, 1.0, 1.9, 0, 0, 0]),
    ],
)
def test_each_correction_s_weights_of_a_few_ratios(settings, expected):
    log_ratio = torch.tensor(RATIOS, dtype=torch.float64).log()
    # the bounds of a band belong to it; logarithms of 0.5 and 5 lie beside them by rounding
    log_ratio = log_ratio + torch.tensor([0, 1e-12, 0, 0, 0, -1e-12, 0], dtype=torch.float64)
    weights = token_weights(log_ratio, OffPolicySettings(**settings))
    assert weights.tolist() == pytest.approx(expected)


def test_a_ratio_beyond_all_numbers_has_a_finite_weight():
    log_ratio = torch.tensor([-300.0, 300.0])
    for correction in ("decoupled", "tis", "icepop"):
        weights = token_weights(log_ratio, OffPolicySettings(correction=correction))
        assert weights.isfinite().all()


def trees_of(count, newest=9, seed=0):
    """With versions from newest - 3 to newest and behaviour around what the model says."""
    generator = torch.Generator().manual_seed(seed)
    return [
        dataclasses.replace(
            tree,
            policy_version=torch.randint(
                newest - 3, newest + 1, (tree.num_tokens,), generator=generator
            ),
        )
        for tree in drawn_trees(count, seed)
    ]


def step_of(model_path, rows, policy_version=9, **settings):
    """Weights' change by one SGD update, and its metrics."""
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(), **settings))
    before = state_of(learner)
    metrics = learner.update([rows], policy_version=policy_version)
    after = state_of(learner)
    return {name: before[name] - after[name] for name in before}, metrics


def assert_same(a, b):
    assert max(float(t.abs().max()) for t in b.values()) > 1e-3
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


def weighted_by(model_path, rows, weight_of):
    """The rows with A+ and A- multiplied by a function of the log of new over sampled probability
    of the learner's first weights."""
    learner = Learner(model_path, LearnerSettings(optimizer=sgd()))
    result = []
    for row, logprobs in zip(rows, learner.logprobs(rows), strict=True):
        weights = weight_of(logprobs - row.behaviour_logprobs)
        result.append(
            dataclasses.replace(
                row,
                advantage_pos=row.advantage_pos * weights,
                advantage_neg=row.advantage_neg * weights,
            )
        )
    return result


@pytest.mark.parametrize(
    ("correction", "weight_of"),
    [
        ({"correction": "decoupled"}, torch.exp),
        ({"correction": "tis"}, lambda log_ratio: log_ratio.exp().clamp(max=2.0)),
        (
            {"correction": "icepop"},
            lambda d: d.exp() * ((d >= math.log(0.5)) & (d <= math.log(5.0))),
        ),
    ],
)
@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "reinforce"])
def test_a_corrected_update_is_that_of_weighted_advantages(model_path, correction, weight_of, name):
    """One update: u = 1, so a correction is a weight on the policy gradient."""
    rows = rows_of(trees_of(3), 200)
    loss = PolicyLossSettings(name=name)
    own, metrics = step_of(
        model_path,
        rows,
        policy_loss=loss,
        old_logprobs="recomputed",
        off_policy=OffPolicySettings(**correction),
    )
    plain = {"old_logprobs": "recomputed"} if name != "reinforce" else {}
    expected, _ = step_of(
        model_path, weighted_by(model_path, rows, weight_of), policy_loss=loss, **plain
    )
    assert_same(own, expected)
    assert metrics["actor/ratio_mean"] == 1 and metrics["training/rollout_is_mean"] != 1
    assert 0 < metrics["training/rollout_is_eff_sample_size"] < 1


def test_in_a_second_update_decoupled_ppo_clips_around_the_weights_before_the_step(model_path):
    """AReaL's loss: rho min(u A, clip(u) A) with u = pi_theta / pi_prox. Against autograd."""
    trees = trees_of(4, seed=3)
    updates = [rows_of(trees[:2]), rows_of(trees[2:])]
    bounds = PolicyLossSettings(clip_ratio_low=0.05, clip_ratio_high=0.04, clip_ratio_c=1.5)
    settings = LearnerSettings(
        optimizer=sgd(0.3),
        policy_loss=bounds,
        old_logprobs="recomputed",
        off_policy=OffPolicySettings(correction="decoupled"),
    )
    learner = Learner(model_path, settings)
    (prox,) = learner.logprobs(updates[1])
    learner.update(updates[:1])
    middle = state_of(learner)
    told = Learner(model_path, settings)
    told.update(updates)
    moved = {name: middle[name] - tensor for name, tensor in state_of(told).items()}

    (row,) = updates[1]
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, _ = learner.policy(row, index)
    u = (logprobs - prox[index]).exp()
    assert ((u > 1.04) | (u < 0.95)).float().mean() > 0.05
    rho = (prox - row.behaviour_logprobs)[index].exp()
    gain = u.clamp(max=1.04) * row.advantage_pos[index]
    gain = gain + u.clamp(0.95, 1.5) * row.advantage_neg[index]
    (-(rho * gain).sum() / row.denominator).backward()
    for name, parameter in learner.policy.model.named_parameters():
        expected = parameter.grad
        torch.testing.assert_close(moved[name] / 0.3, expected, rtol=1e-3, atol=2e-5, msg=name)


def test_a_correction_of_a_loss_of_responses_weights_them_by_their_geometric_mean(model_path):
    """Against rows whose leaves' advantages are multiplied by the capped mean ratio."""
    rows = rows_of(trees_of(3), 200)
    loss = PolicyLossSettings(name="gspo")
    settings = dict(policy_loss=loss, old_logprobs="recomputed")
    own, metrics = step_of(
        model_path,
        rows,
        **settings,
        off_policy=OffPolicySettings(correction="tis", cap=1.5),
    )
    learner = Learner(model_path, LearnerSettings(optimizer=sgd()))
    told, weights = [], []
    for row, logprobs in zip(rows, learner.logprobs(rows), strict=True):
        d = (logprobs - row.behaviour_logprobs) * (row.weight > 0)
        means = []
        for token in row.leaf_token.tolist():
            path = []
            while token >= 0:
                path += [token] if row.weight[token] > 0 else []
                token = int(row.predictor[token])
            means.append(float(d[path].mean()) if path else 0.0)
        weight = torch.tensor(means).exp().clamp(max=1.5)
        weights += weight[row.leaf_weight > 0].tolist()
        told.append(dataclasses.replace(row, leaf_advantage=row.leaf_advantage * weight))
    assert max(weights) == 1.5 and min(weights) < 1
    assert_same(own, step_of(model_path, told, **settings)[0])
    assert metrics["training/rollout_is_eff_sample_size"] < 1


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_old_tokens_have_no_part_in_any_term(model_path, name):
    """Policy loss, KL and entropy of an update, against rows whose old tokens have weight 0."""
    trees = trees_of(3)
    rows = rows_of(trees, 200)
    loss = PolicyLossSettings(name=name, kl_loss_coef=0.2, entropy_coeff=0.1)
    own, metrics = step_of(
        model_path, rows, policy_loss=loss, off_policy=OffPolicySettings(mask_older_than=1)
    )
    told = []
    for row in rows:
        keep = row.policy_version >= 8
        lengths = []
        for token in row.leaf_token.tolist():
            length = 0
            while token >= 0:
                length += int(row.weight[token] > 0 and keep[token])
                token = int(row.predictor[token])
            lengths.append(length)
        told.append(
            dataclasses.replace(
                row,
                weight=row.weight * keep,
                advantage_pos=row.advantage_pos * keep,
                advantage_neg=row.advantage_neg * keep,
                leaf_num_tokens=torch.tensor(lengths),
            )
        )
    assert_same(own, step_of(model_path, told, policy_loss=loss)[0])
    whole = sum(float(row.weight.sum()) for row in rows)
    left = sum(float(row.weight.sum()) for row in told)
    assert 0.2 < left / whole < 0.8
    assert metrics["actor/old_masked_frac"] == pytest.approx(1 - left / whole, rel=1e-6)
    assert metrics["actor/masked_frac"] == pytest.approx(1 - left / whole, rel=1e-6)
    assert metrics["training/staleness/max"] == 3
    every = torch.cat([9 - row.policy_version[row.weight > 0] for row in rows]).double()
    assert metrics["training/staleness/mean"] == pytest.approx(float(every.mean()))


def test_which_tokens_are_old_is_counted_from_the_version_in_force():
    row = pack_row(trees_of(2))
    trained = row.weight > 0
    for oldest, newest in ((0, 9), (2, 9), (0, 11)):
        _, index = trained_index(row, OffPolicySettings(mask_older_than=oldest), newest)
        expected = trained & (row.policy_version >= newest - oldest)
        assert index.tolist() == torch.nonzero(expected)[:, 0].tolist()
    batch, index = trained_index(row, OffPolicySettings(mask_older_than=0), 99)
    assert len(index) == 0 and not batch.leaf_weight.any() and not batch.leaf_num_tokens.any()


def test_an_update_whose_tokens_are_all_too_old_changes_nothing(model_path):
    moved, metrics = step_of(
        model_path,
        rows_of(trees_of(2)),
        policy_version=40,
        off_policy=OffPolicySettings(mask_older_than=2, masked_in_denominator=False),
    )
    assert all(not tensor.any() for tensor in moved.values())
    assert metrics["actor/masked_frac"] == 1 and metrics["actor/pg_loss"] == 0


@pytest.mark.parametrize("inside", [True, False])
def test_masked_tokens_leave_the_denominator_where_asked(model_path, inside):
    """The same direction, longer by what is masked."""
    rows = rows_of(trees_of(3), 200)
    own, metrics = step_of(
        model_path,
        rows,
        off_policy=OffPolicySettings(mask_older_than=1, masked_in_denominator=inside),
    )
    kept, _ = step_of(model_path, rows, off_policy=OffPolicySettings(mask_older_than=1))
    longer = 1.0 if inside else 1 / (1 - metrics["actor/old_masked_frac"])
    assert_same(own, {name: tensor * longer for name, tensor in kept.items()})


@pytest.mark.parametrize("number", [0, 1])
def test_the_batch_gate_opens_at_the_mean_entropy_of_the_update_itself(model_path, number):
    """Of the second update under the weights that the first one left; of all rows together."""
    trees = trees_of(4, seed=3)
    updates = [rows_of(trees[:2], 150), rows_of(trees[2:], 150)]
    assert len(updates[number]) > 1

    def update(**mpt):
        learner = Learner(model_path, LearnerSettings(optimizer=sgd(0.3)))
        for rows in updates[:number]:
            learner.update([rows])
        learner.settings = LearnerSettings(optimizer=sgd(0.3), mpt=MPTSettings(**mpt))
        return learner.update([updates[number]])

    entropy = update()["actor/entropy"]
    if number == 0:
        assert all(abs(entropy_of(model_path, row) - entropy) > 1e-3 for row in updates[0])
    for change, is_open in ((1e-5, True), (-1e-5, False)):
        metrics = update(gate="batch", min_prob=0.2, max_entropy=entropy + change)
        assert (metrics["actor/mpt_masked_frac"] > 0) == is_open
        assert (metrics["actor/masked_frac"] > 0) == is_open


def entropy_of(model_path, row):
    """Mean entropy of a row by itself, under the first weights."""
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(0.0)))
    return learner.update([[row]])["actor/entropy"]


EVERYTHING = dict(
    policy_loss=PolicyLossSettings(
        name="gspo", clip_ratio_low=0.4, clip_ratio_high=0.28, kl_loss_coef=0.3, entropy_coeff=0.1
    ),
    old_logprobs="recomputed",
    off_policy=OffPolicySettings(
        correction="icepop", band=[0.3, 3.0], mask_older_than=2, masked_in_denominator=False
    ),
    mpt=MPTSettings(gate="batch", min_prob=0.3, max_entropy=3.0, masked_in_denominator=False),
)


def test_with_every_mask_a_learner_trains_a_tree_as_its_leaves_one_by_one(model_path):
    """Two updates: facts of an update, recomputed log-probs and masks together."""
    roots = [random_tree(random.Random(seed)) for seed in (1, 2, 3)]

    def with_versions(tree):
        versions = [random.Random(str(path)).randint(5, 9) for path in token_paths(tree)]
        return dataclasses.replace(tree, policy_version=torch.tensor(versions))

    trees = [with_versions(token_tree(root)) for root in roots]
    leaves = [[with_versions(one) for one in flat_trees(root)] for root in roots]
    settings = LearnerSettings(optimizer=sgd(0.3), **EVERYTHING)
    of_trees, of_leaves = Learner(model_path, settings), Learner(model_path, settings)
    tree_rows = [rows_of(trees[:2], 150), rows_of(trees[2:])]
    flat_rows = [rows_of(leaves[0] + leaves[1], 400), rows_of(leaves[2])]
    metrics = of_trees.update(tree_rows, policy_version=9)
    flat_metrics = of_leaves.update(flat_rows, policy_version=9)
    assert 0.2 < metrics["actor/masked_frac"] < 0.95
    for name in ("masked_frac", "old_masked_frac", "correction_masked_frac", "mpt_masked_frac"):
        assert 0 < metrics[f"actor/{name}"] < 1, name
        assert metrics[f"actor/{name}"] == pytest.approx(flat_metrics[f"actor/{name}"], rel=1e-4)
    for name in ("kl", "k3_kl", "is_mean", "is_eff_sample_size"):
        name = f"training/rollout_{name}"
        assert metrics[name] == pytest.approx(flat_metrics[name], rel=1e-4), name
    tree, flat = state_of(of_trees), state_of(of_leaves)
    start = state_of(Learner(model_path, LearnerSettings()))
    assert max(float((tree[name] - start[name]).abs().max()) for name in tree) > 1e-2
    for name, tensor in tree.items():
        torch.testing.assert_close(tensor, flat[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correction": "clip"}, "correction='clip': must be one of none, decoupled, tis, icepop"),
        ({"correction": "icepop", "cap": 2.0}, "cap=2.0 is not used.*'icepop'.*tis or decoupled"),
        ({"correction": "tis", "band": [0.5, 5.0]}, "band=.*is not used.*'tis'.*choose icepop"),
        ({"correction": "tis", "cap": 0.5}, "off_policy.cap=0.5: must be >= 1"),
        ({"correction": "icepop", "band": [1.5, 5.0]}, r"0 <= low <= 1 <= high"),
        ({"correction": "icepop", "band": [0.5]}, r"\[low, high\]"),
        ({"mask_older_than": -1}, "mask_older_than=-1: must be >= 0"),
        ({"correction": "tis", "masked_in_denominator": False}, "mask nothing.*icepop"),
    ],
)
def test_off_policy_settings_that_do_not_fit_say_which_do(settings, message):
    with pytest.raises(ValueError, match=message):
        OffPolicySettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": -1.0}, "alarms.max_kl=-1.0: must be >= 0"),
        ({"min_eff_sample_size": 1.5}, r"alarms.min_eff_sample_size=1.5: must be in \[0, 1\]"),
    ],
)
def test_thresholds_that_nothing_can_reach_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlarmSettings(**settings)


NLL = PolicyLossSettings(name="nll")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"off_policy": OffPolicySettings(correction="tis")},
            "correction='tis'.*old_logprobs='sampled'.*set old_logprobs='recomputed'",
        ),
        (
            {"policy_loss": NLL, "off_policy": OffPolicySettings(mask_older_than=1)},
            "mask_older_than=1 is not used with policy_loss.name='nll'",
        ),
        ({"policy_loss": NLL, "mpt": MPTSettings(gate="always")}, "mpt.gate='always'.*'nll'"),
    ],
)
def test_combinations_that_do_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnerSettings(**settings)
