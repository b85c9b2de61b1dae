"""Sums along paths and over leaves below, against walks through the tree."""

from __future__ import annotations

import random

import pytest
import torch
from token_trees import random_tree, token_tree

from trainers.packing import pack_row
from trainers.path_sums import path_sums, sums_over_leaves_below


def row_of(seed):
    rng = random.Random(seed)
    return pack_row([token_tree(random_tree(rng)) for _ in range(rng.randint(1, 4))])


def ancestors(row, token):
    """Of a token, itself included, by its predictors."""
    path = []
    while token >= 0:
        path.append(token)
        token = int(row.predictor[token])
    return path


@pytest.mark.parametrize("seed", range(5))
def test_a_path_sum_is_the_sum_over_the_walk_to_the_root(seed):
    row = row_of(seed)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    values = torch.randn(len(index), dtype=torch.float64, generator=torch.manual_seed(seed))
    full = torch.zeros(row.num_tokens, dtype=torch.float64)
    full[index] = values
    sums = path_sums(values, index, row.visible_until, row.leaf_token)
    for leaf, token in enumerate(row.leaf_token.tolist()):
        assert sums[leaf] == pytest.approx(float(full[ancestors(row, token)].sum()), abs=1e-13)


def test_a_path_sum_sends_its_gradient_to_the_tokens_of_its_path_alone():
    row = row_of(3)
    index = torch.nonzero(row.weight > 0).squeeze(1)
    upstream = torch.randn(len(row.leaf_token), dtype=torch.float64)
    values = torch.randn(len(index), dtype=torch.float64, requires_grad=True)
    (path_sums(values, index, row.visible_until, row.leaf_token) * upstream).sum().backward()
    expected = torch.zeros(row.num_tokens, dtype=torch.float64)
    for leaf, token in enumerate(row.leaf_token.tolist()):
        expected[ancestors(row, token)] += upstream[leaf]
    torch.testing.assert_close(values.grad, expected[index], rtol=0, atol=1e-13)


def test_path_sums_of_a_long_row_keep_float32_precision():
    """Values that cancel over a row do not cost digits: sums run in float64."""
    row = pack_row([token_tree(random_tree(random.Random(1), segment=200, depth=4))])
    index = torch.arange(row.num_tokens)
    values = torch.full((row.num_tokens,), 0.1)
    sums = path_sums(values, index, row.visible_until, row.leaf_token)
    assert row.num_tokens > 5000 and sums.dtype == torch.float32
    depth = row.position_ids[row.leaf_token] + 1
    torch.testing.assert_close(sums, depth * 0.1, rtol=1e-6, atol=0)


def test_a_leaf_above_another_leaf_has_the_sum_of_its_own_path():
    """A chain of four tokens with leaves at the second and the last."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    until = torch.full((4,), 4)
    sums = path_sums(values, torch.arange(4), until, torch.tensor([1, 3]))
    assert sums.tolist() == [3.0, 15.0]
    below = sums_over_leaves_below(torch.tensor([1.0, 10.0]), torch.tensor([1, 3]), until)
    assert below.tolist() == [11.0, 11.0, 10.0, 10.0]


@pytest.mark.parametrize("seed", range(5))
def test_a_sum_over_leaves_below_is_that_over_the_leaves_whose_paths_hold_the_token(seed):
    row = row_of(seed)
    leaf_values = torch.randn(len(row.leaf_token), generator=torch.manual_seed(seed))
    expected = torch.zeros(row.num_tokens, dtype=torch.float64)
    for leaf, token in enumerate(row.leaf_token.tolist()):
        expected[ancestors(row, token)] += leaf_values[leaf].double()
    sums = sums_over_leaves_below(leaf_values, row.leaf_token, row.visible_until)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
