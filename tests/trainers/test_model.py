"""The policy as the learner loads it."""

from __future__ import annotations

import random

import pytest
import tiny_models
import torch
from token_trees import random_tree, token_tree

from trainers.model import load_policy
from trainers.packing import pack_row
from trainers.settings import LearnerSettings


# gpt2 and opt have dropout in their configuration, seed_oss under a name of its own, phimoe draws
# experts at random in training mode.
@pytest.mark.parametrize("family", ["gpt2", "opt", "seed_oss", "phimoe"])
def test_a_policy_is_one_function_of_its_weights_with_gradient_checkpointing_too(family, tmp_path):
    tiny_models.tiny_model(family).save_pretrained(tmp_path)
    row = pack_row([token_tree(random_tree(random.Random(1)))])
    index = torch.nonzero(row.weight > 0).squeeze(1)
    results = []
    for checkpointing in (False, False, True):
        policy = load_policy(tmp_path, LearnerSettings(gradient_checkpointing=checkpointing))
        calls = count_calls(policy.model.base_model)
        logprobs, _ = policy(row, index)
        forward_calls = len(calls)
        logprobs.sum().backward()
        gradient = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        assert (len(calls) > forward_calls) == checkpointing
        results.append((logprobs.detach(), gradient))
    for logprobs, gradient in results[1:]:
        assert torch.equal(logprobs, results[0][0])
        for name, tensor in gradient.items():
            assert torch.equal(tensor, results[0][1][name]), name


def count_calls(model):
    """A list that grows by one with each call of a module without parts below ``model``."""
    calls = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls
