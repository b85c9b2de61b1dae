"""A packed tree has the log-probs, the loss and the gradients of its leaves as separate rows."""

from __future__ import annotations

import random

import pytest
import torch
from token_trees import flat_trees, random_tree, tiny_model, token_tree

from trainers import attention
from trainers.losses import POLICY_LOSSES, TrainedTokens
from trainers.model import PolicyModel
from trainers.packing import pack_row, total_weight
from trainers.settings import PolicyLossSettings

attention.register()
SETTINGS = PolicyLossSettings(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)


def policy_of(model, implementation=attention.NAME) -> PolicyModel:
    model.set_attn_implementation(implementation)
    return PolicyModel(model)


def loss_of(policy, row, loss_name="ppo_clip"):
    index = torch.nonzero(row.weight > 0).squeeze(1)
    logprobs, entropy = policy(row, index)
    return losses_of(row, index, logprobs, entropy, loss_name)


def losses_of(row, index, logprobs, entropy, loss_name="ppo_clip"):
    tokens = TrainedTokens(
        logprobs=logprobs,
        entropy=entropy,
        old_logprobs=row.behaviour_logprobs[index].to(logprobs.dtype),
        advantage_pos=row.advantage_pos[index].to(logprobs.dtype),
        advantage_neg=row.advantage_neg[index].to(logprobs.dtype),
        weight=row.weight[index].to(logprobs.dtype),
        index=index,
        batch=row,
    )
    return POLICY_LOSSES.get(loss_name)(tokens, SETTINGS).loss.sum() / row.denominator


def plain_loss_of(model, sequence, denominator):
    """The loss of one sequence through transformers' own attention and logits."""
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    logits = model(sequence.token_ids[None], use_cache=False).logits[0]
    all_logprobs = torch.log_softmax(logits / sequence.temperature[0], -1)
    index = torch.nonzero(sequence.weight > 0).squeeze(1)
    logprobs = all_logprobs[sequence.predictor[index], sequence.token_ids[index]]
    row = pack_row([sequence], denominator)
    return losses_of(row, index, logprobs, torch.zeros_like(logprobs))


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


EAGER = {"gemma2", "gpt_oss"}  # soft caps and sinks, which sdpa has not
FAMILIES = [
    ("gpt2", {}, torch.float64, 1e-10),
    ("gpt_neox", {}, torch.float64, 1e-10),
    ("qwen3", {}, torch.float64, 1e-6),
    ("llama", {}, torch.float64, 1e-6),
    ("mistral", {"sliding_window": 8}, torch.float64, 1e-6),
    ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}, torch.float64, 1e-5),
    ("cohere", {}, torch.float64, 1e-6),
    ("granite", {"logits_scaling": 3.0}, torch.float64, 1e-6),
    (
        "gpt_oss",
        {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        torch.float32,
        2e-4,
    ),
]


@pytest.mark.parametrize(("family", "changes", "dtype", "tolerance"), FAMILIES)
def test_packed_trees_have_the_loss_and_gradients_of_flat_sequences_in_plain_transformers(
    family, changes, dtype, tolerance
):
    rng = random.Random(3)
    roots = [random_tree(rng, depth=3, segment=7) for _ in range(2)]
    trees = [token_tree(root, temperature=0.8) for root in roots]
    sequences = [s for root in roots for s in flat_trees(root, temperature=0.8)]
    assert max(s.num_tokens for s in sequences) > 16  # longer than twice the window
    flat_tokens = sum(s.num_tokens for s in sequences)
    assert flat_tokens > 1.5 * sum(t.num_tokens for t in trees)
    model = tiny_model(family, **changes).to(dtype).train()
    denominator = total_weight(trees)
    assert denominator == pytest.approx(total_weight(sequences))

    policy = policy_of(model)
    loss = loss_of(policy, pack_row(trees))
    loss.backward()
    tree_gradients = gradients(model)
    flat_loss = sum(plain_loss_of(model, s, denominator) for s in sequences)
    flat_loss.backward()
    flat_gradients = gradients(model)

    assert loss.item() == pytest.approx(flat_loss.item(), rel=tolerance, abs=tolerance)
    largest = max(g.abs().max() for g in flat_gradients.values())
    assert largest > 1e-3
    for name, expected in flat_gradients.items():
        error = (tree_gradients[name] - expected).abs().max() / largest
        assert error < tolerance, f"{name}: {error:.2e}"


def test_shared_tokens_serve_leaves_of_both_signs_and_of_different_length():
    rng = random.Random(3)
    trees = [token_tree(random_tree(rng)) for _ in range(2)]
    both = sum(int(((t.advantage_pos > 0) & (t.advantage_neg < 0)).sum()) for t in trees)
    lengths = {int(n) for t in trees for n in t.leaf_num_tokens}
    assert both > 10 and len(lengths) > 5


def test_one_row_of_many_trees_equals_many_rows():
    rng = random.Random(5)
    trees = [token_tree(random_tree(rng)) for _ in range(4)]
    model = tiny_model("gpt2").double()
    policy = policy_of(model)
    denominator = total_weight(trees)
    loss_of(policy, pack_row(trees)).backward()
    together = gradients(model)
    for tree in trees:
        loss_of(policy, pack_row([tree], denominator)).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-9, atol=1e-12)


def test_prompt_forced_and_padding_tokens_have_exactly_zero_gradient():
    rng = random.Random(7)
    tree = token_tree(random_tree(rng, forced=0.5))
    row = pack_row([tree])
    assert row.num_tokens > tree.num_tokens
    logprobs = torch.randn(row.num_tokens, requires_grad=True)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    losses_of(row, index, logprobs[index], torch.zeros(len(index))).backward()
    untrained = row.weight == 0
    assert untrained[tree.num_tokens :].all() and untrained[:5].all()
    assert untrained[5 : tree.num_tokens].any() and not untrained.all()
    assert (logprobs.grad[untrained] == 0).all() and (logprobs.grad[~untrained] != 0).any()


def test_what_padding_holds_changes_no_gradient():
    rng = random.Random(9)
    tree = token_tree(random_tree(rng))
    row = pack_row([tree])
    model = tiny_model("llama").double()
    policy = policy_of(model)
    loss_of(policy, row).backward()
    before = gradients(model)
    assert row.num_tokens > tree.num_tokens
    row.token_ids[tree.num_tokens :] = 13
    loss_of(policy, row).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name


@pytest.mark.parametrize("loss_name", ["reinforce", "nll"])
def test_the_other_losses_are_equal_on_trees_and_sequences_too(loss_name):
    rng = random.Random(9)
    root = random_tree(rng)
    model = tiny_model("gpt2").double()
    policy = policy_of(model)
    sequences = flat_trees(root)
    tree_loss = loss_of(policy, pack_row([token_tree(root)]), loss_name)
    flat_loss = loss_of(policy, pack_row(sequences), loss_name)
    assert tree_loss.item() == pytest.approx(flat_loss.item(), rel=1e-9)
