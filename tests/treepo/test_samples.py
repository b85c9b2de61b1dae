import time
from dataclasses import fields

import numpy as np
import pytest
import torch

from rollout.tree import Segment, Tree
from treepo.advantages import ScoredTree, estimate
from treepo.algorithm_settings import ESTIMATOR_TRAITS, AdvantageSettings
from treepo.samples import flat_token_trees, token_tree, token_trees

PER_TOKEN = (
    "token_ids", "position_ids", "visible_until", "predictor", "advantage_pos", "advantage_neg",
    "weight", "behaviour_logprobs", "sampling_logprobs", "temperature", "policy_version",
)  # fmt: skip


def segment(parent, level, token_ids, *, sampled=True, version=4):
    """``version``: one for all tokens, or one a token."""
    token_ids = np.asarray(token_ids, np.int32)
    logprobs = -0.01 * token_ids.astype(np.float32) if sampled else np.zeros(len(token_ids))
    return Segment(
        parent=parent,
        level=level,
        path_key=0,
        token_ids=token_ids,
        logprobs=logprobs.astype(np.float32),
        sampling_logprobs=(logprobs / 2).astype(np.float32),
        sampled=sampled,
        policy_versions=np.broadcast_to(np.int32(version if sampled else 0), len(token_ids)),
    )


def make(segments, rewards, *, temperature=1.0, valid=None):
    parents = {s.parent for s in segments}
    leaves = tuple(i for i in range(1, len(segments)) if i not in parents)
    rewards = np.array(rewards, dtype=np.float64)
    valid = np.ones(len(rewards), bool) if valid is None else np.array(valid)
    tree = Tree(problem_id="p", segments=tuple(segments), leaves=leaves, temperature=temperature)
    return ScoredTree(tree=tree, rewards=rewards, valid=valid, correct=rewards > 0)


def advantages_of(*groups, **settings):
    return estimate(list(groups), AdvantageSettings(**settings))


def random_group(rng, num_segments=20, longest=4):
    parents = [-1, *(int(rng.integers(0, i)) for i in range(1, num_segments))]
    levels = [0]
    for parent in parents[1:]:
        levels.append(levels[parent] + 1)
    segments = [segment(-1, 0, [7, 8, 9], sampled=False)]
    for parent, level in zip(parents[1:], levels[1:], strict=True):
        length = int(rng.integers(0, longest + 1))
        segments.append(
            segment(
                parent,
                level,
                rng.integers(0, 3, length),
                sampled=rng.random() < 0.85,
                version=int(rng.integers(1, 4)),
            )
        )
    num_leaves = sum(i not in parents for i in range(1, num_segments))
    return make(
        segments,
        rng.integers(0, 2, num_leaves).astype(float),
        valid=rng.random(num_leaves) < 0.8,
    )


def path_indices(token_tree, token):
    indices, token = [], int(token)
    while token >= 0:
        indices.append(token)
        token = int(token_tree.predictor[token])
    return indices[::-1]


def example():
    """Prompt 5 6; segment [1 2] forks into [3] and [4 4]; a second path [9] from the prompt.
    In the arena the second path stands between the fork and its children.
    """
    segments = [
        segment(-1, 0, [5, 6], sampled=False),
        segment(0, 1, [1, 2]),
        segment(0, 1, [9]),
        segment(1, 2, [3]),
        segment(1, 2, [4, 4], version=[4, 5]),
    ]
    return make(segments, [0.0, 1.0, 0.0], temperature=0.5)  # leaves 2, 3, 4


def test_a_tree_by_hand():
    group = example()
    (advantages,) = advantages_of(group, adv_estimator="grpo", normalisation="none")
    tokens = token_tree(group, advantages)
    assert tokens.token_ids.tolist() == [5, 6, 1, 2, 3, 4, 4, 9]
    assert tokens.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5, 2]
    assert tokens.visible_until.tolist() == [8, 8, 7, 7, 5, 7, 7, 8]
    assert tokens.predictor.tolist() == [-1, 0, 1, 2, 3, 3, 5, 1]
    third = 1 / 3
    expected = torch.tensor([0, 0, 2 * third, 2 * third, 2 * third, 0, 0, 0])
    torch.testing.assert_close(tokens.advantage_pos, expected)
    expected = torch.tensor([0, 0, -third, -third, 0, -third, -third, -third])
    torch.testing.assert_close(tokens.advantage_neg, expected)
    assert tokens.weight.tolist() == [0, 0, 2, 2, 1, 1, 1, 1]
    assert tokens.temperature.tolist() == [0.5] * 8
    assert tokens.policy_version.tolist() == [0, 0, 4, 4, 4, 4, 5, 4]
    torch.testing.assert_close(
        tokens.behaviour_logprobs, -0.01 * torch.tensor([0.0, 0, 1, 2, 3, 4, 4, 9])
    )
    torch.testing.assert_close(tokens.sampling_logprobs, tokens.behaviour_logprobs / 2)
    assert tokens.leaf_token.tolist() == [7, 4, 6]
    torch.testing.assert_close(tokens.leaf_advantage, torch.tensor([-third, 2 * third, -third]))
    assert tokens.leaf_weight.tolist() == [1, 1, 1]
    assert tokens.leaf_num_tokens.tolist() == [1, 3, 4]
    assert tokens.leaf_reward.tolist() == [0, 1, 0]


def test_the_records_types_are_the_trainers():
    group = example()
    tokens = token_tree(group, *advantages_of(group))
    whole = {"token_ids", "position_ids", "visible_until", "predictor", "policy_version"}
    whole |= {"leaf_token", "leaf_num_tokens"}
    for field in fields(tokens):
        wanted = torch.int64 if field.name in whole else torch.float32
        assert getattr(tokens, field.name).dtype == wanted, field.name


@pytest.mark.parametrize("seed", range(30))
def test_depth_first_invariants_hold_on_random_trees(seed):
    group = random_group(np.random.default_rng(seed))
    tree = group.tree
    tokens = token_tree(group, *advantages_of(group))
    n = tokens.num_tokens
    assert n == sum(s.num_tokens for s in tree.segments), "a shared token stands once"
    until = tokens.visible_until.tolist()
    for k in range(n):
        ancestors = path_indices(tokens, k)
        assert int(tokens.position_ids[k]) == len(ancestors) - 1
        # a query sees exactly its path
        assert [q for q in range(n) if q <= k < until[q]] == ancestors
        for other in range(k + 1, n):  # subtrees nest or are apart
            assert other >= until[k] or until[other] <= until[k]
    for row, leaf in enumerate(tree.leaves):
        path = path_indices(tokens, int(tokens.leaf_token[row]))
        assert tokens.token_ids[path].tolist() == tree.path_token_ids(leaf).tolist()
        assert int(tokens.leaf_num_tokens[row]) == int(
            sum(s.num_tokens for s in map(tree.segments.__getitem__, tree.path(leaf)) if s.sampled)
        )


@pytest.mark.parametrize("weighting", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("estimator", sorted(set(ESTIMATOR_TRAITS) - {"dr_grpo"}))
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_token_carries_the_sum_of_its_flat_copies(seed, estimator, weighting):
    group = random_group(np.random.default_rng(100 + seed))
    (advantages,) = advantages_of(group, adv_estimator=estimator, loss_weighting=weighting)
    tokens = token_tree(group, advantages)
    flat = flat_token_trees(group, advantages)
    sums = {
        name: torch.zeros(tokens.num_tokens)
        for name in ("advantage_pos", "advantage_neg", "weight")
    }
    for row, sequence in enumerate(flat):
        path = path_indices(tokens, int(tokens.leaf_token[row]))
        assert len(path) == sequence.num_tokens
        for name, total in sums.items():
            total[path] += getattr(sequence, name)
        for name in ("token_ids", "position_ids", "behaviour_logprobs", "sampling_logprobs",
                     "temperature", "policy_version"):  # fmt: skip
            assert torch.equal(getattr(tokens, name)[path], getattr(sequence, name)), name
        assert sequence.predictor.tolist() == list(range(-1, len(path) - 1))
        assert sequence.visible_until.tolist() == [len(path)] * len(path)
        assert sequence.leaf_token.tolist() == [len(path) - 1]
        for name in ("leaf_advantage", "leaf_weight", "leaf_num_tokens", "leaf_reward"):
            assert torch.equal(getattr(tokens, name)[row : row + 1], getattr(sequence, name))
    for name, total in sums.items():
        torch.testing.assert_close(getattr(tokens, name), total, atol=1e-5, rtol=1e-5)


def test_at_node_level_a_flat_row_takes_its_segments_advantages():
    """V is 1/3 at the prompt, 1/2 at [1 2]: leaves 9, 3 and 4 4 by SPO."""
    group = example()
    (advantages,) = advantages_of(group, adv_estimator="spo")
    other, win, loss = flat_token_trees(group, advantages)
    third, sixth = 1 / 3, 1 / 6
    for row, expected in (
        (other, [0, 0, -third]),
        (win, [0, 0, sixth, sixth, 0.5]),
        (loss, [0, 0, sixth, sixth, -0.5, -0.5]),
    ):
        torch.testing.assert_close(row.advantage_pos + row.advantage_neg, torch.tensor(expected))
        assert (row.advantage_pos >= 0).all() and (row.advantage_neg <= 0).all()
    tree = token_tree(group, advantages)  # in order: 5 6, 1 2, 3, 4 4, 9
    torch.testing.assert_close(
        tree.advantage_pos + tree.advantage_neg,
        torch.tensor([0, 0, third, third, 0.5, -0.5, -0.5, -third]),
    )


def test_prompt_and_forced_tokens_carry_exactly_nothing():
    segments = [
        segment(-1, 0, [5, 6], sampled=False),
        segment(0, 1, [1, 2], sampled=False),
        segment(1, 2, [3]),
        segment(0, 1, [9]),
    ]
    group = make(segments, [1.0, 0.0])
    (advantages,) = advantages_of(group)
    for tokens in (token_tree(group, advantages), *flat_token_trees(group, advantages)):
        untrained = torch.isin(tokens.token_ids, torch.tensor([5, 6, 1, 2]))
        for name in ("advantage_pos", "advantage_neg", "weight", "behaviour_logprobs"):
            assert (getattr(tokens, name)[untrained] == 0).all()
        assert (tokens.weight[~untrained] > 0).all()


def test_a_zero_token_leaf_ends_at_the_last_token_of_its_path():
    segments = [
        segment(-1, 0, [5, 6], sampled=False),
        segment(0, 1, [1, 2]),
        segment(1, 2, []),
        segment(1, 2, [3]),
        segment(0, 1, []),
    ]
    group = make(segments, [1.0, 0.0, 1.0])
    (advantages,) = advantages_of(group)
    tokens = token_tree(group, advantages)
    assert tokens.token_ids.tolist() == [5, 6, 1, 2, 3]
    assert tokens.leaf_token.tolist() == [3, 4, 1]
    assert tokens.leaf_num_tokens.tolist() == [2, 3, 0]
    assert tokens.leaf_weight.tolist() == [1, 1, 0], "the last leaf has nothing to train"
    assert tokens.weight.tolist() == [0, 0, 2, 2, 1]


def test_equal_forks_stay_two_nodes():
    segments = [
        segment(-1, 0, [5], sampled=False),
        segment(0, 1, [1, 2]),
        segment(0, 1, [1, 2]),
    ]
    group = make(segments, [1.0, 0.0])
    tokens = token_tree(group, *advantages_of(group))
    assert tokens.token_ids.tolist() == [5, 1, 2, 1, 2]
    assert tokens.predictor.tolist() == [-1, 0, 1, 0, 3]


def test_a_tree_with_one_leaf_is_a_plain_sequence():
    segments = [segment(-1, 0, [5, 6], sampled=False), segment(0, 1, [1]), segment(1, 2, [2, 3])]
    group = make(segments, [1.0])
    (advantages,) = advantages_of(group)
    tokens = token_tree(group, advantages)
    (flat,) = flat_token_trees(group, advantages)
    for field in fields(tokens):
        assert torch.equal(getattr(tokens, field.name), getattr(flat, field.name)), field.name


def test_greedy_trees_report_the_temperature_of_their_logprobs():
    segments = [segment(-1, 0, [5], sampled=False), segment(0, 1, [1])]
    group = make(segments, [1.0], temperature=0.0)
    assert token_tree(group, *advantages_of(group)).temperature.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(10))
def test_dropping_what_does_not_train_changes_nothing_else(seed):
    group = random_group(np.random.default_rng(200 + seed))
    (advantages,) = advantages_of(group)
    whole = token_tree(group, advantages)
    lean = token_tree(group, advantages, drop_untrained=True)
    trains = advantages.leaf_weight > 0
    used = sorted(
        {i for row in np.flatnonzero(trains) for i in path_indices(whole, whole.leaf_token[row])}
        | set(range(3))  # the prompt
    )
    for name in ("token_ids", "position_ids", "advantage_pos", "advantage_neg", "weight"):
        assert torch.equal(getattr(lean, name), getattr(whole, name)[used]), name
    assert lean.leaf_reward.tolist() == group.rewards[trains].tolist()
    for row, old in enumerate(np.flatnonzero(trains)):
        mine = path_indices(lean, int(lean.leaf_token[row]))
        theirs = path_indices(whole, int(whole.leaf_token[old]))
        assert torch.equal(lean.token_ids[mine], whole.token_ids[theirs])
    assert len(flat_token_trees(group, advantages, drop_untrained=True)) == trains.sum()


def test_a_tree_in_which_nothing_trains_is_left_out_when_asked():
    failed = make([segment(-1, 0, [5], sampled=False), segment(0, 1, [1])], [0.0], valid=[False])
    groups = [failed, example()]
    advantages = advantages_of(*groups)
    assert len(token_trees(groups, advantages)) == 2
    (kept,) = token_trees(groups, advantages, drop_untrained=True)
    assert kept.num_tokens == 8
    assert token_trees([], []) == []


def test_a_batch_of_24_trees_of_16_leaves_converts_in_milliseconds():
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(24):
        segments = [segment(-1, 0, range(60), sampled=False)]
        frontier = [0]
        for level, width in enumerate([2, 4, 8, 16, 16, 16], start=1):
            parents = [frontier[k * len(frontier) // width] for k in range(width)]
            first = len(segments)
            segments += [segment(p, level, rng.integers(0, 99, 64)) for p in parents]
            frontier = list(range(first, len(segments)))
        groups.append(make(segments, rng.integers(0, 2, 16).astype(float)))
    advantages = advantages_of(*groups)
    best = min(_seconds(lambda: token_trees(groups, advantages)) for _ in range(5))
    assert best < 0.05


def _seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start
