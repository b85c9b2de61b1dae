"""From a scored tree to the trainer's tensors.

:func:`to_token_tree` lays a tree out in depth-first preorder, each token once.
:func:`to_flat_token_trees` repeats shared tokens once per leaf; both train to the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.tree import Segment, Tree
from trainers.batch import TokenTree
from treepo.advantages import Group, TreeAdvantages, leaf_num_tokens


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


def to_token_trees(
    groups: Sequence[Group],
    advantages: Sequence[TreeAdvantages],
    *,
    drop_untrained: bool = False,
) -> list[TokenTree]:
    """:func:`to_token_tree` of each group; with ``drop_untrained`` without those in which nothing
    trains.
    """
    return [
        to_token_tree(group, values, drop_untrained=drop_untrained)
        for group, values in zip(groups, advantages, strict=True)
        if not drop_untrained or (values.leaf_weight > 0).any()
    ]


def to_token_tree(
    group: Group, advantages: TreeAdvantages, *, drop_untrained: bool = False
) -> TokenTree:
    """One prompt's tree in depth-first preorder, children in arena order.

    Args:
        drop_untrained: leave out leaves of weight 0 (failed verdicts) and the segments that only
            they use. They have no part in the loss; leaving them out saves the forward pass and
            their rows in the leaf table.
    """
    tree = group.tree
    kept = np.ones(tree.num_leaves, dtype=bool)
    if drop_untrained:
        kept = advantages.leaf_weight > 0
    leaves = np.array(tree.leaves, dtype=np.int64)[kept]
    layout = _preorder(tree, leaves.tolist())
    order = layout.order
    segments = [tree.segments[i] for i in order]
    counts = np.array([segment.num_tokens for segment in segments])
    num_tokens = int(counts.sum())
    index = np.arange(num_tokens)

    def per_token(values: np.ndarray) -> np.ndarray:
        return np.repeat(values[order], counts)

    start = per_token(layout.start)
    predictor = index - 1
    first = index == start
    predictor[first] = per_token(layout.above)[first]
    return TokenTree(
        token_ids=_tensor(_concatenate(segments, "token_ids"), torch.int64),
        position_ids=_tensor(index - start + per_token(layout.depth), torch.int64),
        visible_until=_tensor(per_token(layout.end), torch.int64),
        predictor=_tensor(predictor, torch.int64),
        advantage_pos=_tensor(per_token(advantages.advantage_pos), torch.float32),
        advantage_neg=_tensor(per_token(advantages.advantage_neg), torch.float32),
        weight=_tensor(per_token(advantages.weight), torch.float32),
        behaviour_logprobs=_tensor(_concatenate(segments, "logprobs"), torch.float32),
        sampling_logprobs=_tensor(_concatenate(segments, "sampling_logprobs"), torch.float32),
        temperature=torch.full((num_tokens,), logprob_temperature(tree)),
        policy_version=_tensor(
            np.repeat([segment.policy_version for segment in segments], counts), torch.int64
        ),
        leaf_token=_tensor(layout.last[leaves], torch.int64),
        leaf_advantage=_tensor(advantages.leaf_advantage[kept], torch.float32),
        leaf_weight=_tensor(advantages.leaf_weight[kept], torch.float32),
        leaf_num_tokens=_tensor(leaf_num_tokens(tree)[kept], torch.int64),
        leaf_reward=_tensor(group.rewards[kept], torch.float32),
    )


def to_flat_token_trees(
    group: Group, advantages: TreeAdvantages, *, drop_untrained: bool = False
) -> list[TokenTree]:
    """One sequence per leaf, prompt and shared tokens repeated, as flat training has it.

    Only for estimators that give a leaf one advantage for all of its tokens: it reads
    ``leaf_advantage`` and ``leaf_weight``.
    """
    tree = group.tree
    lengths = leaf_num_tokens(tree)
    sequences = []
    for row, leaf in enumerate(tree.leaves):
        weight, advantage = advantages.leaf_weight[row], advantages.leaf_advantage[row]
        if drop_untrained and weight == 0:
            continue
        segments = [tree.segments[i] for i in tree.path(leaf)]
        counts = [segment.num_tokens for segment in segments]
        trained = np.repeat([float(segment.sampled) for segment in segments], counts)
        n = len(trained)
        weighted = weight * advantage
        sequences.append(
            TokenTree(
                token_ids=_tensor(_concatenate(segments, "token_ids"), torch.int64),
                position_ids=torch.arange(n),
                visible_until=torch.full((n,), n),
                predictor=torch.arange(-1, n - 1),
                advantage_pos=_tensor(trained * max(weighted, 0.0), torch.float32),
                advantage_neg=_tensor(trained * min(weighted, 0.0), torch.float32),
                weight=_tensor(trained * weight, torch.float32),
                behaviour_logprobs=_tensor(_concatenate(segments, "logprobs"), torch.float32),
                sampling_logprobs=_tensor(
                    _concatenate(segments, "sampling_logprobs"), torch.float32
                ),
                temperature=torch.full((n,), logprob_temperature(tree)),
                policy_version=_tensor(
                    np.repeat([segment.policy_version for segment in segments], counts),
                    torch.int64,
                ),
                leaf_token=torch.tensor([n - 1]),
                leaf_advantage=_tensor(advantage[None], torch.float32),
                leaf_weight=_tensor(weight[None], torch.float32),
                leaf_num_tokens=_tensor(lengths[row, None], torch.int64),
                leaf_reward=_tensor(group.rewards[row, None], torch.float32),
            )
        )
    return sequences


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
    start, end, depth, last, above = (np.zeros(size, dtype=np.int64) for _ in range(5))
    order: list[int] = []
    position, stack = 0, [0]
    while stack:
        index = stack.pop()
        segment = tree.segments[index]
        parent = segment.parent
        order.append(index)
        start[index] = position
        above[index] = last[parent] if parent >= 0 else -1
        depth[index] = depth[parent] + tree.segments[parent].num_tokens if parent >= 0 else 0
        position += segment.num_tokens
        last[index] = position - 1 if segment.num_tokens else above[index]
        stack += children[index]
    for index in reversed(order):  # a subtree ends where its last child's does
        own_end = start[index] + tree.segments[index].num_tokens
        end[index] = end[children[index][0]] if children[index] else own_end
    return _Layout(order=order, start=start, end=end, depth=depth, last=last, above=above)


def _concatenate(segments: Sequence[Segment], name: str) -> np.ndarray:
    return np.concatenate([getattr(segment, name) for segment in segments])


def _tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(values).to(dtype)
