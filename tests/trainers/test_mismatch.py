"""Metrics of the sampler's log-probs against the learner's, recomputed from their definitions."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from test_learner import rows_of, sgd
from token_trees import random_tree, save_tiny_model, token_tree

from trainers.learner import Learner
from trainers.metrics import MetricSums
from trainers.off_policy_settings import OffPolicySettings
from trainers.settings import LearnerSettings, PolicyLossSettings


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def measured(model_path, **settings):
    """Two updates' metrics, and of the first's trained tokens: learner's and sampler's log-probs,
    weights, and how many trained tokens stand before each."""
    rng = random.Random(2)
    trees = [token_tree(random_tree(rng, segment=70)) for _ in range(3)]
    updates = [rows_of(trees[:2], 4000), rows_of(trees[2:], 4000)]
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(0.1), **settings))
    first = learner.logprobs(updates[0])
    metrics = learner.update(updates)
    train, rollout, weight, depth = [], [], [], []
    for row, logprobs in zip(updates[0], first, strict=True):
        before = []  # trained tokens above
        for token, parent in enumerate(row.predictor.tolist()):
            above = before[parent] + int(row.weight[parent] > 0) if parent >= 0 else 0
            before.append(above)
            if row.weight[token] > 0:
                train.append(float(logprobs[token]))
                rollout.append(float(row.behaviour_logprobs[token]))
                weight.append(float(row.weight[token]))
                depth.append(above)
    return metrics, *map(np.array, (train, rollout, weight, depth))


def test_the_first_update_s_mismatch_is_what_the_definitions_say(model_path):
    metrics, train, rollout, weight, depth = measured(model_path)
    d = train - rollout
    name = "training/rollout"
    expected = {
        f"{name}_logprob_diff_mean": np.abs(d).mean(),
        f"{name}_logprob_diff_max": np.abs(d).max(),
        f"{name}_logprob_diff_p99": np.quantile(np.abs(d), 0.99, method="inverted_cdf"),
        f"{name}_probs_diff_mean": np.abs(np.exp(train) - np.exp(rollout)).mean(),
        f"{name}_kl": np.average(-d, weights=weight),
        f"{name}_k3_kl": np.average(np.exp(d) - 1 - d, weights=weight),
        f"{name}_is_mean": np.average(np.exp(d), weights=weight),
        f"{name}_is_eff_sample_size": np.average(np.exp(d), weights=weight) ** 2
        / np.average(np.exp(2 * d), weights=weight),
        f"{name}_logprob_diff_mean/depth_0_127": np.abs(d)[depth < 128].mean(),
        f"{name}_logprob_diff_mean/depth_128_1023": np.abs(d)[depth >= 128].mean(),
    }
    assert 128 < depth.max() < 1024
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4), key
    assert f"{name}_logprob_diff_mean/depth_1024_8191" not in metrics  # no token is so deep
    assert f"{name}_logprob_diff_mean/depth_8192_up" not in metrics


def test_with_a_correction_the_sample_size_is_of_its_weights(model_path):
    metrics, train, rollout, weight, _ = measured(
        model_path,
        old_logprobs="recomputed",
        off_policy=OffPolicySettings(correction="tis"),
    )
    capped = np.minimum(np.exp(train - rollout), 2)
    mean = np.average(capped, weights=weight)
    assert metrics["training/rollout_is_mean"] == pytest.approx(mean, rel=1e-4)
    assert metrics["training/rollout_is_eff_sample_size"] == pytest.approx(
        mean**2 / np.average(capped**2, weights=weight), rel=1e-4
    )


def test_the_effective_sample_size_is_1_for_equal_weights_and_the_share_that_has_any():
    sums = MetricSums()
    sums.add_eff_sample_size("equal", torch.full((10,), 0.3), torch.ones(10))
    sums.add_eff_sample_size("a_quarter", torch.tensor([2.0, 0, 0, 0]), torch.ones(4))
    sums.add_eff_sample_size("a_quarter", torch.tensor([0.0, 0, 2.0, 0]), torch.ones(4))
    sums.add_eff_sample_size("none", torch.zeros(3), torch.ones(3))
    measure = torch.tensor([3.0, 1.0])
    sums.add_eff_sample_size("measured", torch.tensor([1.0, 2.0]), measure)
    metrics = sums.reduce(1, torch.device("cpu"))
    # (3 * 1 + 1 * 2)^2 / (4 * (3 * 1 + 1 * 4))
    expected = {"equal": 1.0, "a_quarter": 0.25, "none": 0.0, "measured": 25 / 28}
    assert metrics == pytest.approx(expected)


def test_a_sampler_that_agrees_shows_nothing(model_path):
    trees = [token_tree(random_tree(random.Random(1)))]
    rows = rows_of(trees)
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(0.0)))
    (logprobs,) = learner.logprobs(rows)
    agreeing = [dataclasses.replace(rows[0], behaviour_logprobs=logprobs)]
    metrics = learner.update([agreeing])
    assert metrics["training/rollout_logprob_diff_max"] < 1e-5
    assert abs(metrics["training/rollout_kl"]) < 1e-6
    assert metrics["training/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-6)
    assert metrics["training/staleness/mean"] == 0


def test_supervised_tokens_were_drawn_by_nobody_so_there_is_no_mismatch(model_path):
    rows = rows_of([token_tree(random_tree(random.Random(1)))])
    settings = LearnerSettings(policy_loss=PolicyLossSettings(name="nll"))
    assert not any("rollout" in name for name in Learner(model_path, settings).update([rows]))
