"""A single rank of the learner: exact gradients, schedule, skipped updates, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
import transformers
from rank_program import drawn_trees
from token_trees import flat_trees, random_tree, save_tiny_model, token_tree

from trainers.learner import Learner
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.model import load_policy
from trainers.packing import pack
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings
from treepo.base.digest import manifest_of, tensor_digests

GSPO_WITH_KL = PolicyLossSettings(
    name="gspo", clip_ratio_low=0.4, clip_ratio_high=0.28, kl_loss_coef=0.3, entropy_coeff=0.1
)


def sgd(lr=1.0, **changes):
    return OptimizerSettings(name="sgd", lr=lr, weight_decay=0.0, grad_clip=0.0, **changes)


def rows_of(trees, max_tokens=10_000):
    return pack(trees, max_tokens, 1)[0]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


def state_of(learner):
    return {name: tensor.clone() for name, tensor in learner.state_tensors().items()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_sgd_moves_weights_by_the_gradient_of_the_sum_over_the_denominator(model_path, zero_stage):
    trees = drawn_trees(5)
    learner = Learner(model_path, LearnerSettings(zero_stage=zero_stage, optimizer=sgd()))
    reference = Learner(model_path, LearnerSettings(optimizer=sgd()))
    before = state_of(learner)
    rows = rows_of(trees, 200)
    assert len(rows) >= 3
    metrics = learner.update([rows])
    for row in rows_of(trees):
        index = torch.nonzero(row.weight > 0).squeeze(1)
        logprobs, _ = reference.policy(row, index)
        ratio = (logprobs - row.behaviour_logprobs[index]).exp()
        loss = -(
            ratio.clamp(max=1.28) * row.advantage_pos[index]
            + ratio.clamp(0.8, 10.0) * row.advantage_neg[index]
        )
        (loss.sum() / sum(float(t.weight.sum()) for t in trees)).backward()
    after = state_of(learner)
    total = 0.0
    for name, parameter in reference.policy.model.named_parameters():
        step = before[name] - after[name]
        torch.testing.assert_close(step, parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
        total += float(parameter.grad.square().sum())
    assert metrics["actor/grad_norm"] == pytest.approx(math.sqrt(total), rel=1e-4)


def test_the_number_of_rows_may_differ_from_update_to_update(model_path):
    trees = drawn_trees(6, seed=3)
    batches = [trees[:1], trees[1:5], trees[5:]]
    split = Learner(model_path, LearnerSettings(optimizer=sgd(0.1)))
    whole = Learner(model_path, LearnerSettings(optimizer=sgd(0.1)))
    rows = [rows_of(batch, 180) for batch in batches]
    assert len({len(row) for row in rows}) > 1
    metrics = split.update(rows)
    expected = whole.update([rows_of(batch) for batch in batches])
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in state_of(split).items():
        torch.testing.assert_close(tensor, state_of(whole)[name], rtol=1e-4, atol=1e-6)


def test_logprobs_are_those_of_plain_transformers_and_show_no_mismatch(model_path):
    trees = drawn_trees(2)
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(0.0)))
    row = rows_of(trees)[0]
    (logprobs,) = learner.logprobs([row])
    recorded = dataclasses.replace(row, behaviour_logprobs=logprobs)
    metrics = learner.update([[recorded]])
    assert metrics["training/rollout_probs_diff_max"] < 1e-6
    assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    path = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    logits = model(torch.from_numpy(path)[None].long()).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(path)[1:, None].long())
    for score in learner.score_paths([path, path])[:2]:
        np.testing.assert_allclose(score, expected[:, 0].detach().numpy(), rtol=1e-4, atol=1e-5)


def perturbed(trees):
    """The trees with other behaviour log-probs than any weights gave."""
    noise = torch.Generator().manual_seed(4)
    return [
        dataclasses.replace(
            tree,
            behaviour_logprobs=tree.behaviour_logprobs
            + torch.randn(tree.num_tokens, generator=noise),
        )
        for tree in trees
    ]


GSPO_NARROW_WITH_KL = PolicyLossSettings(name="gspo", kl_loss_coef=0.3, entropy_coeff=0.1)


@pytest.mark.parametrize("loss", [PolicyLossSettings(), GSPO_NARROW_WITH_KL])
def test_recomputed_old_logprobs_make_the_ratio_of_a_single_update_exactly_1(model_path, loss):
    trees = perturbed(drawn_trees(3))
    rows = rows_of(trees, 200)
    assert len(rows) > 1
    found = {}
    for old in ("sampled", "recomputed"):
        settings = LearnerSettings(optimizer=sgd(), policy_loss=loss, old_logprobs=old)
        found[old] = Learner(model_path, settings).update([rows])
    own, sampled = found["recomputed"], found["sampled"]
    assert own["actor/ratio_mean"] == 1 and own["actor/ppo_kl"] == 0
    assert own["actor/pg_clipfrac"] == 0 and own.get("actor/sequence_ratio_mean", 1) == 1
    assert sampled["actor/ratio_mean"] != 1 and sampled["actor/pg_clipfrac"] > 0.1
    # the mismatch is with what was sampled in both
    mismatch = "training/rollout_probs_diff"
    for name in (f"{mismatch}_mean", f"{mismatch}_max"):
        assert own[name] == sampled[name] > 0.01


def test_recomputed_old_logprobs_are_those_before_the_steps_first_update(model_path):
    """Two epochs of two updates, against a learner that is told before the step, as if sampled,
    what the first weights say. On ranks and under ZeRO-3: test_ranks.py.
    """
    trees = perturbed(drawn_trees(6))
    settings = LearnerSettings(optimizer=sgd(0.3), policy_loss=GSPO_WITH_KL)
    told = Learner(model_path, settings)
    recomputed = Learner(model_path, dataclasses.replace(settings, old_logprobs="recomputed"))
    halves = [rows_of(trees[:4], 200), rows_of(trees[4:], 200)]
    updates = halves + [rows_of(trees[1:3]), rows_of([trees[0], *trees[3:]])]
    assert len(halves[0]) > 1
    as_sampled = [
        [
            dataclasses.replace(row, behaviour_logprobs=logprobs)
            for row, logprobs in zip(rows, told.logprobs(rows), strict=True)
        ]
        for rows in updates
    ]
    metrics, expected = recomputed.update(updates), told.update(as_sampled)
    mismatch = "training/rollout"
    for kind in ("probs_diff_max", "probs_diff_mean", "logprob_diff_p99"):
        assert expected[f"{mismatch}_{kind}"] < 1e-5
        assert metrics[f"{mismatch}_{kind}"] > 0.01
    metrics, expected = (
        {name: value for name, value in of.items() if not name.startswith(mismatch)}
        for of in (metrics, expected)
    )
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(metrics["actor/ratio_mean"] - 1) > 1e-3
    for name, tensor in state_of(recomputed).items():
        torch.testing.assert_close(tensor, state_of(told)[name], rtol=1e-4, atol=1e-6)


def test_with_recomputed_old_logprobs_a_tree_trains_as_its_leaves_one_by_one(model_path):
    roots = [random_tree(random.Random(seed)) for seed in (1, 2, 3)]
    trees = [token_tree(root) for root in roots]
    leaves = [flat_trees(root) for root in roots]
    settings = LearnerSettings(
        optimizer=sgd(0.3), policy_loss=GSPO_WITH_KL, old_logprobs="recomputed"
    )
    of_trees, of_leaves = Learner(model_path, settings), Learner(model_path, settings)
    of_trees.update([rows_of(trees[:2]), rows_of(trees[2:])])
    of_leaves.update([rows_of(leaves[0] + leaves[1]), rows_of(leaves[2])])
    tree, flat = state_of(of_trees), state_of(of_leaves)
    start = state_of(Learner(model_path, LearnerSettings()))
    assert max(float((tree[name] - start[name]).abs().max()) for name in tree) > 1e-2
    for name, tensor in tree.items():
        torch.testing.assert_close(tensor, flat[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_skips_the_update_and_says_so(model_path, zero_stage):
    learner = Learner(
        model_path, LearnerSettings(zero_stage=zero_stage, optimizer=OptimizerSettings(lr=1e-2))
    )
    before = learner.digest()
    rows = rows_of(drawn_trees(2))
    bad = dataclasses.replace(rows[0], advantage_pos=rows[0].advantage_pos * math.inf)
    metrics = learner.update([[bad]])
    assert (metrics["actor/skipped_updates"], metrics["actor/num_updates"]) == (1, 0)
    assert learner.digest() == before and learner.num_optimizer_steps == 0
    metrics = learner.update([rows])
    assert (metrics["actor/skipped_updates"], metrics["actor/num_updates"]) == (0, 1)
    assert learner.digest() != before and math.isfinite(metrics["actor/grad_norm"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loaded_checkpoint_gives_the_identical_next_update(model_path, tmp_path, zero_stage):
    settings = LearnerSettings(
        zero_stage=zero_stage,
        optimizer=OptimizerSettings(lr=1e-2, lr_warmup_steps=5),
        policy_loss=GSPO_WITH_KL,
    )
    trees = drawn_trees(4)
    learner = Learner(model_path, settings)
    learner.update([rows_of(trees[:2]), rows_of(trees[2:])])
    learner.save(tmp_path)
    saved = learner.digest()
    metrics = learner.update([rows_of(trees)])
    final = learner.digest()

    resumed = Learner(model_path, settings)
    assert resumed.digest() != saved
    resumed.load(tmp_path)
    assert resumed.digest() == saved and resumed.num_optimizer_steps == 2
    assert resumed.update([rows_of(trees)]) == metrics
    assert resumed.digest() == final


def test_a_checkpoint_of_another_kind_is_refused_with_the_reason(model_path, tmp_path):
    learner = Learner(model_path, LearnerSettings())
    with pytest.raises(ValueError, match="not a learner checkpoint"):
        learner.load(tmp_path)
    learner.save(tmp_path)
    other = Learner(model_path, LearnerSettings(zero_stage=2))
    with pytest.raises(ValueError, match="written with zero_stage=0, this learner has 2"):
        other.load(tmp_path)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_an_export_is_a_plain_model_with_the_trained_weights(model_path, tmp_path, zero_stage):
    learner = Learner(
        model_path, LearnerSettings(zero_stage=zero_stage, optimizer=OptimizerSettings(lr=1e-2))
    )
    learner.update([rows_of(drawn_trees(2))])
    learner.export_hf(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    state = learner.state_tensors()
    assert manifest_of(state).tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert (tmp_path / "model.safetensors").is_file()


def model_that_loaded(learner, model_path):
    """A plain model with the learner's publication, whose digests are found in it."""
    sent = learner.publication("float32")
    assert sent.digest == learner.digest()
    engine = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    engine.load_state_dict(sent.tensors)
    assert tensor_digests(dict(engine.state_dict())) == sent.digests
    assert manifest_of(dict(engine.state_dict())) == sent.manifest
    return engine


def test_publication_digests_are_those_of_a_model_that_loaded_the_weights(model_path):
    learner = Learner(model_path, LearnerSettings(optimizer=OptimizerSettings(lr=1e-2)))
    learner.update([rows_of(drawn_trees(1))])
    model_that_loaded(learner, model_path)


def test_gradient_clipping_bounds_the_step(model_path):
    clipped = OptimizerSettings(name="sgd", lr=1.0, weight_decay=0.0, grad_clip=0.01)
    for zero_stage in (0, 2):
        learner = Learner(model_path, LearnerSettings(zero_stage=zero_stage, optimizer=clipped))
        before = state_of(learner)
        metrics = learner.update([rows_of(drawn_trees(2))])
        after = state_of(learner)
        names = [name for name, _ in learner.policy.model.named_parameters()]
        moved = sum(float((after[n] - before[n]).square().sum()) for n in names) ** 0.5
        assert moved == pytest.approx(0.01, rel=1e-2) and metrics["actor/grad_norm"] > 0.011


def test_an_entropy_bonus_raises_entropy(model_path):
    trees = drawn_trees(3)
    for tree in trees:
        tree.advantage_pos.zero_()
        tree.advantage_neg.zero_()
    learner = Learner(
        model_path,
        LearnerSettings(optimizer=sgd(0.5), policy_loss=PolicyLossSettings(entropy_coeff=1.0)),
    )
    first = learner.update([rows_of(trees)])["actor/entropy"]
    assert learner.update([rows_of(trees)])["actor/entropy"] > first + 1e-3


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_kl_penalty_is_towards_the_model_that_training_began_with(
    model_path, tmp_path, zero_stage
):
    """The second update, where policy and reference differ, against autograd on plain models."""
    loss = PolicyLossSettings(name="reinforce", kl_loss_coef=0.7)
    settings = LearnerSettings(zero_stage=zero_stage, optimizer=sgd(0.5), policy_loss=loss)
    learner = Learner(model_path, settings)
    trees = drawn_trees(3)
    first = learner.update([rows_of(trees, 200)])
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-9)
    assert first["actor/sequence_kl"] == pytest.approx(0, abs=1e-5)
    learner.export_hf(tmp_path)
    before = state_of(learner)
    second = learner.update([rows_of(trees, 200)])
    after = state_of(learner)

    policy, initial = load_policy(tmp_path, LearnerSettings()), learner.reference
    row = rows_of(trees)[0]
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, _ = policy(row, index)
    apart = logprobs - initial(row, index)[0].detach()
    kl_loss = (row.weight[index] * (torch.exp(-apart) - 1 + apart)).sum() / row.denominator
    advantages = (row.advantage_pos + row.advantage_neg)[index]
    (-(logprobs * advantages).sum() / row.denominator + 0.7 * kl_loss).backward()
    assert kl_loss > 1e-3
    assert second["actor/kl_loss"] == pytest.approx(kl_loss.item(), rel=1e-4)
    for name, parameter in policy.model.named_parameters():
        step = (before[name] - after[name]) / 0.5
        torch.testing.assert_close(step, parameter.grad, rtol=1e-3, atol=2e-5, msg=name)
    full = torch.zeros(row.num_tokens).index_put((index,), apart.detach())
    of_leaves = []
    for token, weight in zip(row.leaf_token.tolist(), row.leaf_weight, strict=True):
        path, at = [], token
        while at >= 0:
            path.append(at)
            at = int(row.predictor[at])
        of_leaves += [float(full[path].sum())] if weight > 0 else []
    assert second["actor/sequence_kl"] == pytest.approx(np.mean(of_leaves), rel=1e-4)


def test_the_reference_is_kept_only_for_a_penalty_and_stays_as_it_was(model_path):
    assert Learner(model_path, LearnerSettings()).reference is None
    learner = Learner(
        model_path, LearnerSettings(optimizer=OptimizerSettings(lr=1e-2), policy_loss=GSPO_WITH_KL)
    )
    initial = Learner(model_path, LearnerSettings())
    learner.update([rows_of(drawn_trees(2))])
    for name, tensor in learner.reference.model.state_dict().items():
        assert torch.equal(tensor, state_of(initial)[name]), name
    assert learner.digest() != initial.digest()


def test_a_resumed_run_refuses_another_reference(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    settings = LearnerSettings(policy_loss=GSPO_WITH_KL)
    Learner(model_path, settings).save(tmp_path / "checkpoint")
    Learner(model_path, settings).load(tmp_path / "checkpoint")
    save_tiny_model(tmp_path / "model", attention_bias=True)
    with pytest.raises(ValueError, match="another model.*kl_loss_coef=0"):
        Learner(model_path, settings).load(tmp_path / "checkpoint")


def test_a_gspo_update_reports_the_share_of_clipped_responses(model_path):
    trees = drawn_trees(3)
    learner = Learner(model_path, LearnerSettings(optimizer=sgd(), policy_loss=GSPO_WITH_KL))
    metrics = learner.update([rows_of(trees, 200)])
    row = rows_of(trees)[0]
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, _ = Learner(model_path, LearnerSettings()).policy(row, index)
    tokens = trained_tokens(row, index, logprobs.detach(), torch.zeros_like(logprobs))
    terms = POLICY_LOSSES.get("gspo")(tokens, GSPO_WITH_KL)
    clipped = terms.sequence_metrics["actor/pg_clipfrac"]
    assert len(clipped) == int((row.leaf_weight > 0).sum()) and 0 < clipped.mean() < 1
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(clipped.mean()))


def test_bfloat16_keeps_rotary_buffers_and_follows_the_float32_update(model_path):
    settings = OptimizerSettings(name="sgd", lr=0.5, weight_decay=0.0)
    with_kl = PolicyLossSettings(kl_loss_coef=0.1)
    learner = Learner(
        model_path, LearnerSettings(dtype="bfloat16", optimizer=settings, policy_loss=with_kl)
    )
    assert {p.dtype for p in learner.policy.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in learner.policy.buffers() if b.is_floating_point()} == {torch.float32}
    reference = Learner(model_path, LearnerSettings(optimizer=settings))
    before = state_of(reference)
    rows = rows_of(drawn_trees(4), 200)
    low, full = learner.update([rows]), reference.update([rows])
    assert low["actor/kl_loss"] == 0  # the reference rounds as the policy does
    assert low["actor/grad_norm"] == pytest.approx(full["actor/grad_norm"], rel=0.05)
    name = "model.layers.0.mlp.down_proj.weight"
    moved = (state_of(reference)[name] - before[name]).flatten()
    low_moved = (state_of(learner)[name].float() - before[name]).flatten()
    assert torch.nn.functional.cosine_similarity(moved, low_moved, dim=0) > 0.95
