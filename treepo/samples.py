"""From a scored tree to the trainer's tensors.

:func:`token_tree` lays a tree out in depth-first preorder, each token once.
:func:`flat_token_trees` repeats shared tokens once per leaf; both train to the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rollout.tree import Segment, Tree
from trainers.batch import TokenTree
from treepo.advantages import ScoredTree, TreeAdvantages, leaf_num_tokens


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layout:
    """Where the segments of a tree stand in depth-first preorder; arrays over the S segments of the
    arena, those left out keep zeros.
    """

    order: list[int]  # arena indices in preorder, without those left out
    start: np.ndarray  # int64 [S], index of the segment's first token
    end: np.ndarray  # int64 [S], end (exclusive) of its subtree
    depth: np.ndarray  # int64 [S], tokens above it on its path
    last: np.ndarray  # int64 [S], index of the last token on the path to its end
    above: np.ndarray  # int64 [S], index of the token before its first on the path; -1 at the root


def token_trees(
    groups: Sequence[ScoredTree],
    advantages: Sequence[TreeAdvantages],
    *,
    drop_untrained: bool = False,
) -> list[TokenTree]:
    """:func:`token_tree` of each group; with ``drop_untrained`` without those in which nothing
    trains.
    """
    return [
        token_tree(group, values, drop_untrained=drop_untrained)
        for group, values in zip(groups, advantages, strict=True)
        if not drop_untrained or (values.leaf_weight > 0).any()
    ]


def token_tree(
    group: ScoredTree, advantages: TreeAdvantages, *, drop_untrained: bool = False
) -> TokenTree:
    """One prompt's tree in depth-first preorder, children in arena order.

    Args:
        drop_untrained: leave out leaves of weight 0 (failed verdicts) and the segments that only
            they use. They have no part in the loss; leaving them out saves the forward pass and
            their rows in the leaf table.
    """
    rows = np.arange(group.tree.num_leaves)
    if drop_untrained:
        rows = rows[advantages.leaf_weight > 0]
    return _lay_out(group, advantages, rows)


def flat_token_trees(
    group: ScoredTree, advantages: TreeAdvantages, *, drop_untrained: bool = False
) -> list[TokenTree]:
    """One sequence per leaf, prompt and shared tokens repeated, as flat training has it. At node
    level each takes the advantages of the segments on its path.
    """
    tree = group.tree
    sampled = np.array([segment.sampled for segment in tree.segments], dtype=np.float64)
    sequences = []
    for row, weight in enumerate(advantages.leaf_weight):
        if drop_untrained and weight == 0:
            continue
        by_segment = advantages.segment_advantage
        if by_segment is None:
            by_segment = np.full(len(tree.segments), advantages.leaf_advantage[row])
        of_leaf = replace(
            advantages,
            advantage_pos=sampled * weight * np.maximum(by_segment, 0.0),
            advantage_neg=sampled * weight * np.minimum(by_segment, 0.0),
            weight=sampled * weight,
        )
        sequences.append(_lay_out(group, of_leaf, np.array([row])))
    return sequences


def _lay_out(group: ScoredTree, advantages: TreeAdvantages, rows: np.ndarray) -> TokenTree:
    """The part of the tree that the leaves ``rows`` (positions in ``tree.leaves``) use."""
    tree = group.tree
    leaves = np.array(tree.leaves, dtype=np.int64)[rows]
    layout = _preorder(tree, leaves.tolist())
    segments = [tree.segments[i] for i in layout.order]
    counts = np.array([segment.num_tokens for segment in segments])
    owner = np.repeat(layout.order, counts)  # [n], the arena index of each token's segment
    index = np.arange(len(owner))
    start = layout.start[owner]
    return TokenTree(
        token_ids=_tensor(_concatenate(segments, "token_ids"), np.int64),
        position_ids=_tensor(index - start + layout.depth[owner], np.int64),
        visible_until=_tensor(layout.end[owner], np.int64),
        predictor=_tensor(np.where(index == start, layout.above[owner], index - 1), np.int64),
        advantage_pos=_tensor(advantages.advantage_pos[owner], np.float32),
        advantage_neg=_tensor(advantages.advantage_neg[owner], np.float32),
        weight=_tensor(advantages.weight[owner], np.float32),
        behaviour_logprobs=_tensor(_concatenate(segments, "logprobs"), np.float32),
        sampling_logprobs=_tensor(_concatenate(segments, "sampling_logprobs"), np.float32),
        temperature=torch.full((len(owner),), logprob_temperature(tree)),
        policy_version=_tensor(_concatenate(segments, "policy_versions"), np.int64),
        leaf_token=_tensor(layout.last[leaves], np.int64),
        leaf_advantage=_tensor(advantages.leaf_advantage[rows], np.float32),
        leaf_weight=_tensor(advantages.leaf_weight[rows], np.float32),
        leaf_num_tokens=_tensor(leaf_num_tokens(tree)[rows], np.int64),
        leaf_reward=_tensor(group.rewards[rows], np.float32),
    )


def logprob_temperature(tree: Tree) -> float:
    """The temperature under which the tree's ``logprobs`` were recorded: greedy decoding (0)
    records those of the plain softmax.
    """
    return tree.temperature if tree.temperature > 0 else 1.0


def _preorder(tree: Tree, leaves: Sequence[int]) -> _Layout:
    """Lay out the prompt and all segments on paths to ``leaves``."""
    size = len(tree.segments)
    wanted = np.zeros(size, dtype=bool)
    wanted[[0, *leaves]] = True
    children: list[list[int]] = [[] for _ in range(size)]
    for index in range(size - 1, 0, -1):  # descending: each list ends up in reverse arena order
        if wanted[index]:
            parent = tree.segments[index].parent
            wanted[parent] = True
            children[parent].append(index)
    counts = [segment.num_tokens for segment in tree.segments]
    start, end, depth, last, above = ([0] * size for _ in range(5))
    order: list[int] = []
    position, stack = 0, [0]
    while stack:
        index = stack.pop()
        parent = tree.segments[index].parent
        order.append(index)
        start[index] = position
        above[index] = last[parent] if parent >= 0 else -1
        depth[index] = depth[parent] + counts[parent] if parent >= 0 else 0
        position += counts[index]
        last[index] = position - 1 if counts[index] else above[index]
        stack += children[index]
    for index in reversed(order):  # a subtree ends where its last child's does
        own_end = start[index] + counts[index]
        end[index] = end[children[index][0]] if children[index] else own_end
    return _Layout(
        order=order,
        start=np.array(start),
        end=np.array(end),
        depth=np.array(depth),
        last=np.array(last),
        above=np.array(above),
    )


def _concatenate(segments: Sequence[Segment], name: str) -> np.ndarray:
    return np.concatenate([getattr(segment, name) for segment in segments])


def _tensor(values: np.ndarray, dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))
