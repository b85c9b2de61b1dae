"""From the engine's trees to the trainer's loss: what one room records the next one recomputes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.engine import Engine
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies import FlatSettings, Prompt, TreePOSettings
from rollout.strategies.base import STRATEGIES
from trainers import attention
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.model import PolicyModel
from trainers.objective import objective
from trainers.packing import pack_row, total_weight
from trainers.settings import PolicyLossSettings
from treepo.advantages import ScoredTree, estimate
from treepo.algorithm_settings import AdvantageSettings
from treepo.samples import flat_token_trees, token_trees

SAMPLING = dict(temperature=0.85, top_p=0.95, max_response_length=20, stop_token_ids=[1, 4, 5, 6])
STRATEGY_SETTINGS = {
    "flat": FlatSettings(n=6, **SAMPLING),
    "treepo": TreePOSettings(n=8, segment_length=5, max_depth=4, **SAMPLING),
    "treepo cut in segments": TreePOSettings(
        n=16, segment_length=5, max_depth=4, fallback_cut="misaligned", fallback_block_length=2,
        **{**SAMPLING, "stop_token_ids": list(range(1, 10))},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sampled(tiny_model_path):
    """Trees of both strategies, served in order and at random."""
    engine = Engine(tiny_model_path, EngineSettings(num_kv_slots=4096, max_running_requests=16))
    prompts = [
        Prompt(problem_id=str(i), token_ids=np.arange(2, 9 + i, dtype=np.int32), root_key=100 + i)
        for i in range(4)
    ]
    trees = {}
    for name, settings in STRATEGY_SETTINGS.items():
        strategy = STRATEGIES.get(name.split()[0])(settings)
        trees[name] = generate_all(engine, strategy, prompts)
        for seed in range(2):
            again = generate_all(engine, strategy, prompts, order_seed=seed)
            assert all(a.same_tokens(b) for a, b in zip(trees[name], again, strict=True))
        engine.check_integrity()
    return trees


@pytest.fixture(scope="module")
def policy(tiny_model_path):
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    model.set_attn_implementation(attention.NAME)
    return PolicyModel(model)


def scored(trees):
    rng = np.random.default_rng(0)
    groups = []
    for tree in trees:
        rewards = rng.integers(0, 2, tree.num_leaves).astype(float)
        valid = rng.random(tree.num_leaves) < 0.9
        groups.append(ScoredTree(tree=tree, rewards=rewards * valid, valid=valid, correct=valid))
    return groups


def loss_of(policy, samples, denominator, settings):
    row = pack_row(samples, denominator)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, entropy = policy(row, index)
    # an older policy, so that some ratios are clipped, and a reference that differs as well
    shift = torch.sin(row.token_ids[index].float())
    recorded = row.behaviour_logprobs[index]
    tokens = trained_tokens(row, index, logprobs, entropy, ref_logprobs=recorded - 0.3 * shift)
    tokens = replace(tokens, old_logprobs=recorded + 0.5 * shift)
    return objective(tokens, POLICY_LOSSES.get(settings.name), settings).loss


@pytest.mark.parametrize("name", STRATEGY_SETTINGS)
def test_the_trainer_recomputes_the_log_probs_that_the_engine_recorded(sampled, policy, name):
    groups = scored(sampled[name])
    row = pack_row(token_trees(groups, estimate(groups, AdvantageSettings())))
    index = torch.nonzero(row.weight > 0).squeeze(1)
    with torch.no_grad():
        logprobs, _ = policy(row, index)
    assert len(index) > 100
    recorded = row.behaviour_logprobs[index]
    assert (logprobs.exp() - recorded.exp()).abs().max() < 1e-5  # the metric that runs log
    assert (logprobs - recorded).abs().max() < 1e-4  # rounding of logits of some tens, in float32
    # top-p has cut something, so that the true behaviour policy differs
    assert (row.sampling_logprobs[index] - logprobs).max() > 0.01


LOSSES = {
    "ppo_clip": PolicyLossSettings(),
    "gspo": PolicyLossSettings(
        name="gspo", clip_ratio_low=0.1, clip_ratio_high=0.1, kl_loss_coef=0.2
    ),
    "cispo": PolicyLossSettings(name="cispo"),
}


@pytest.mark.parametrize(
    ("estimator", "objective"),
    [*(("treepo", name) for name in LOSSES), ("treerl", "ppo_clip"), ("sibling", "cispo")],
)
@pytest.mark.parametrize("weighting", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", STRATEGY_SETTINGS)
def test_sampled_trees_have_the_loss_and_gradient_of_their_responses(
    sampled, policy, name, weighting, estimator, objective
):
    settings = LOSSES[objective]
    groups = scored(sampled[name])
    algorithm = AdvantageSettings(adv_estimator=estimator, loss_weighting=weighting)
    advantages = estimate(groups, algorithm)
    trees = token_trees(groups, advantages, drop_untrained=True)
    flat = [
        sequence
        for group, values in zip(groups, advantages, strict=True)
        for sequence in flat_token_trees(group, values)
    ]
    denominator = total_weight(trees)
    assert denominator == pytest.approx(total_weight(flat), rel=1e-6)
    gradients = []
    for samples in (trees, flat):
        policy.zero_grad()
        loss = loss_of(policy, samples, denominator, settings)
        loss.backward()
        gradients.append((loss.item(), [p.grad.clone() for p in policy.parameters()]))
    (tree_loss, of_trees), (flat_loss, of_flat) = gradients
    assert tree_loss == pytest.approx(flat_loss, rel=1e-4, abs=1e-6)
    largest = max(g.abs().max() for g in of_flat)
    assert largest > 1e-4
    for a, b in zip(of_trees, of_flat, strict=True):
        assert (a - b).abs().max() < 1e-4 * largest
