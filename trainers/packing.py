"""Token trees into packed rows: balanced over ranks, equally many on each, one denominator.

A rank runs its micro-batches one after another; DeepSpeed's collectives need the same number of
them on every rank, so missing ones are rows of padding alone. The sum of the losses of all rows of
an update, each divided by the same global denominator, does not depend on how the trees were
packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.batch import PackedBatch, TokenTree
from trainers.path_sums import sums_over_leaves_below

# Rows are padded to a multiple of this many tokens: on CPU `linear` takes other code paths, with
# other rounding, for row counts that are not.
ROW_MULTIPLE = 8

# Per-token fields that are copied as they are, and the value padding tokens have.
_PLAIN_FIELDS = {
    "token_ids": 0,
    "position_ids": 0,
    "advantage_pos": 0.0,
    "advantage_neg": 0.0,
    "weight": 0.0,
    "behaviour_logprobs": 0.0,
    "sampling_logprobs": 0.0,
    "temperature": 1.0,
    "policy_version": 0,
}
_LEAF_FIELDS = ("leaf_advantage", "leaf_weight", "leaf_num_tokens", "leaf_reward")


def pack(
    mini_batch: Sequence[TokenTree],
    max_tokens: int,
    num_ranks: int,
    denominator: float | None = None,
) -> list[list[PackedBatch]]:
    """Distribute one update's trees over ranks and micro-batches.

    Args:
        mini_batch: all trees of one optimiser step, of all ranks.
        max_tokens: most tokens of a row.
        denominator: what the loss is divided by; the trees' total weight unless given.

    Returns:
        For each rank its rows; equally many on every rank, at least one. Deterministic.

    Raises:
        ValueError: a tree has more than ``max_tokens`` tokens.
    """
    sizes = [_padded(tree.num_tokens) for tree in mini_batch]
    limit = _padded(max_tokens)
    if max(sizes, default=0) > limit:
        index = max(range(len(sizes)), key=lambda i: sizes[i])
        raise ValueError(
            f"trainer.learner.max_tokens_per_micro_batch={max_tokens}: tree {index} of the "
            f"mini-batch has {mini_batch[index].num_tokens} tokens and a tree is not split; raise "
            "it to at least "
            f"{mini_batch[index].num_tokens}, or sample fewer or shorter responses"
        )
    denominator = total_weight(mini_batch) if denominator is None else denominator
    rows = _balance(sizes, limit, num_ranks)
    packed = [_row([mini_batch[i] for i in row], denominator) for row in rows]
    # Neighbours in the list are about equally heavy, so all ranks are busy at the same time.
    return [packed[rank::num_ranks] for rank in range(num_ranks)]


def total_weight(trees: Sequence[TokenTree]) -> float:
    """Sum of ``weight`` over all tokens of an update: the denominator of the token mean. An update
    without any trained token has denominator 1, and loss 0.
    """
    total = sum(float(tree.weight.sum(dtype=torch.float64)) for tree in trees)
    return total if total > 0 else 1.0


def pack_row(trees: Sequence[TokenTree], denominator: float | None = None) -> PackedBatch:
    """One row of all ``trees``, in order; the denominator is their total weight unless given."""
    return _row(trees, total_weight(trees) if denominator is None else denominator)


def path_tree(token_ids: torch.Tensor) -> TokenTree:
    """A plain sequence (int64 [n]) as the tree with one leaf; nothing in it is trained."""
    count = token_ids.shape[0]
    index = torch.arange(count)
    zeros = torch.zeros(count)
    return TokenTree(
        token_ids=token_ids,
        position_ids=index,
        visible_until=torch.full((count,), count),
        predictor=index - 1,
        advantage_pos=zeros,
        advantage_neg=zeros,
        weight=zeros,
        behaviour_logprobs=zeros,
        sampling_logprobs=zeros,
        temperature=torch.ones(count),
        policy_version=torch.zeros(count, dtype=torch.int64),
        leaf_token=torch.tensor([count - 1]),
        leaf_advantage=torch.zeros(1),
        leaf_weight=torch.zeros(1),
        leaf_num_tokens=torch.zeros(1, dtype=torch.int64),
        leaf_reward=torch.zeros(1),
    )


def check_leaf_advantages(trees: Sequence[TokenTree], setting: str) -> None:
    """Refuse trees whose tokens have other advantages than the leaves below them, for a loss or a
    mask that reads the leaves' alone.

    Args:
        setting: that asks for it, with its value and what it does.

    Raises:
        ValueError: which advantages fit the loss.
    """
    for tree in trees:
        weighted = tree.leaf_weight.double() * tree.leaf_advantage.double()
        trained = tree.weight > 0
        for own, of_leaves in (
            (tree.advantage_pos, weighted.clamp(min=0)),
            (tree.advantage_neg, weighted.clamp(max=0)),
        ):
            sums = sums_over_leaves_below(of_leaves, tree.leaf_token, tree.visible_until)
            error = (own - sums)[trained].abs()
            # The records are float32.
            if (error > 1e-5 * of_leaves.abs().sum()).any():
                raise ValueError(
                    f"trainer.learner.{setting}, but these advantages differ from token to token "
                    "of a response: choose an algorithm.adv_estimator that gives a response one "
                    "advantage (treepo, grpo, rloo)"
                )


def _balance(sizes: Sequence[int], limit: int, num_ranks: int) -> list[list[int]]:
    """Tree indices of each row, heaviest row first: longest-first into the lightest row, with the
    smallest number of rows a rank that this fits.
    """
    per_rank = max(1, -(-sum(sizes) // (limit * num_ranks)))
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    while True:
        rows: list[list[int]] = [[] for _ in range(per_rank * num_ranks)]
        loads = [0] * len(rows)
        for index in order:
            lightest = loads.index(min(loads))
            loads[lightest] += sizes[index]
            rows[lightest].append(index)
        if max(loads) <= limit:
            ranked = sorted(range(len(rows)), key=lambda row: (-loads[row], row))
            return [sorted(rows[row]) for row in ranked]
        per_rank += 1


def _row(trees: Sequence[TokenTree], denominator: float) -> PackedBatch:
    sizes = [tree.num_tokens for tree in trees]
    num_real = sum(sizes)
    num_tokens = max(_padded(num_real), ROW_MULTIPLE)
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    offset = torch.repeat_interleave(starts, torch.tensor(sizes, dtype=torch.int64))
    fields = {
        name: _joined([getattr(tree, name) for tree in trees], num_tokens, padding)
        for name, padding in _PLAIN_FIELDS.items()
    }
    # Padding tokens see themselves alone and predict nothing.
    visible_until = torch.arange(1, num_tokens + 1)
    predictor = torch.full((num_tokens,), -1)
    if trees:
        visible_until[:num_real] = torch.cat([tree.visible_until for tree in trees]) + offset
        local = torch.cat([tree.predictor for tree in trees])
        predictor[:num_real] = torch.where(local >= 0, local + offset, local)
    leaves = {
        name: torch.cat([getattr(tree, name) for tree in trees])
        if trees
        else torch.zeros(0, dtype=torch.int64 if name == "leaf_num_tokens" else torch.float32)
        for name in _LEAF_FIELDS
    }
    leaf_token = [tree.leaf_token + int(at) for tree, at in zip(trees, starts, strict=True)]
    return PackedBatch(
        **fields,
        **leaves,
        visible_until=visible_until,
        predictor=predictor,
        leaf_token=torch.cat(leaf_token) if trees else torch.zeros(0, dtype=torch.int64),
        denominator=denominator,
    )


def _joined(parts: Sequence[torch.Tensor], num_tokens: int, padding: float) -> torch.Tensor:
    if parts:
        dtype = parts[0].dtype
    else:
        dtype = torch.int64 if isinstance(padding, int) else torch.float32
    missing = num_tokens - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, torch.full((missing,), padding, dtype=dtype)])


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
