"""Packing: nothing lost, balanced, equally many rows a rank, one denominator."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from token_trees import random_tree, token_tree

from trainers.packing import check_leaf_advantages, pack, pack_row, total_weight


def trees_of(count, seed=0):
    rng = random.Random(seed)
    return [token_tree(random_tree(rng, branch=rng.randint(1, 3))) for _ in range(count)]


def test_a_row_keeps_every_field_of_its_trees_with_indices_moved():
    trees = trees_of(3)
    row = pack_row(trees)
    start = leaf = 0
    for tree in trees:
        end, leaf_end = start + tree.num_tokens, leaf + len(tree.leaf_token)
        for field in dataclasses.fields(tree):
            own = getattr(tree, field.name)
            packed = getattr(row, field.name)
            packed = packed[leaf:leaf_end] if field.name[:4] == "leaf" else packed[start:end]
            if field.name in ("visible_until", "leaf_token"):
                own = own + start
            elif field.name == "predictor":
                own = torch.where(own < 0, own, own + start)
            assert packed.dtype == own.dtype and torch.equal(packed, own), field.name
        start, leaf = end, leaf_end
    assert row.num_tokens % 8 == 0 and leaf == len(row.leaf_token)


def test_padding_sees_itself_alone_predicts_nothing_and_weighs_nothing():
    tree = next(tree for tree in trees_of(9) if tree.num_tokens % 8)
    row = pack_row([tree])
    padding = slice(tree.num_tokens, None)
    index = torch.arange(row.num_tokens)
    assert torch.equal(row.visible_until[padding], index[padding] + 1)
    assert (row.predictor[padding] == -1).all() and (row.weight[padding] == 0).all()
    assert (row.visible_until[: tree.num_tokens] <= tree.num_tokens).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [200, 500, 10_000])
def test_every_tree_is_in_one_row_and_ranks_have_equally_many_rows(num_ranks, max_tokens):
    trees = trees_of(11)
    ranks = pack(trees, max_tokens, num_ranks)
    assert len(ranks) == num_ranks and len({len(rows) for rows in ranks}) == 1
    rows = [row for rank in ranks for row in rank]
    assert all(row.num_tokens <= max_tokens for row in rows)
    assert {row.denominator for row in rows} == {total_weight(trees)}
    assert sum(len(row.leaf_token) for row in rows) == sum(len(t.leaf_token) for t in trees)
    assert sum(float(row.weight.sum()) for row in rows) == pytest.approx(total_weight(trees))
    per_rank = [sum(row.num_tokens for row in rows) for rows in ranks]
    assert max(per_rank) - min(per_rank) <= max(t.num_tokens for t in trees) + 8 * len(rows)


def test_fewer_trees_than_ranks_are_filled_up_with_rows_of_zero_weight():
    ranks = pack(trees_of(1), 1000, 3)
    weights = sorted(float(rows[0].weight.sum()) for rows in ranks)
    assert weights[:2] == [0, 0] and weights[2] > 0
    empty = next(rows[0] for rows in ranks if not rows[0].weight.any())
    assert empty.num_tokens == 8 and empty.token_ids.dtype == torch.int64
    assert empty.denominator == ranks[0][0].denominator


def test_packing_is_deterministic():
    one, other = pack(trees_of(7), 300, 2), pack(trees_of(7), 300, 2)
    for rows, same in zip(one, other, strict=True):
        assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(rows, same, strict=True))


def test_a_tree_larger_than_a_row_names_the_field_to_raise():
    trees = trees_of(3)
    with pytest.raises(ValueError, match=r"max_tokens_per_micro_batch=16: tree \d .* at least \d+"):
        pack(trees, 16, 1)


def test_an_update_without_trained_tokens_has_denominator_one():
    tree = trees_of(1)[0]
    tree.weight.zero_()
    assert pack([tree], 1000, 1)[0][0].denominator == 1.0


def test_advantages_that_differ_within_a_response_are_refused_for_a_loss_of_responses():
    tree, setting = trees_of(1)[0], "policy_loss.name='gspo' has one term a response"
    check_leaf_advantages([tree], setting)
    trained = torch.nonzero(tree.weight > 0).squeeze(1)
    tree.advantage_pos[trained[3]] += 0.5
    with pytest.raises(
        ValueError, match="learner.policy_loss.name='gspo' has one term.*adv_estimator"
    ):
        check_leaf_advantages([tree], setting)
