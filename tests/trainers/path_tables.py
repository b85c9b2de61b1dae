"""Random trees whose tokens' log-probs, versions and the like are functions of their paths, read
from tables, so that leaves as separate rows have the same ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from token_trees import flat_trees, random_tree, token_tree, weighted_as

from trainers.batch import PackedBatch, TokenTree

NEWEST = 7  # policy version


@dataclass
class Tables:
    """Over all paths of all trees, float64 [P]."""

    rows: dict[tuple[int, ...], int]
    logprobs: torch.Tensor  # with gradient
    entropy: torch.Tensor  # with gradient
    old: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    versions: torch.Tensor  # int64


def token_paths(tree: TokenTree | PackedBatch) -> list[tuple[int, ...]]:
    """Of every token, the tokens from the root to it; the root's first says which tree it is."""
    found: list[tuple[int, ...]] = []
    for token, before in zip(tree.token_ids.tolist(), tree.predictor.tolist(), strict=True):
        found.append((*(found[before] if before >= 0 else ()), token))
    return found


def tables_of(trees: list[TokenTree], seed: int) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple[int, ...], int] = {}
    for tree in trees:
        for path in token_paths(tree):
            rows.setdefault(path, len(rows))

    def uniform(low: float, high: float) -> torch.Tensor:
        share = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        return low + (high - low) * share

    logprobs = uniform(-1.2, 0.0)
    old = logprobs + uniform(-0.4, 0.4)
    return Tables(
        rows=rows,
        logprobs=logprobs.requires_grad_(),
        entropy=uniform(0.0, 0.6).requires_grad_(),
        old=old,
        behaviour=old + uniform(-0.9, 0.9),
        reference=uniform(-1.2, 0.0),
        versions=torch.randint(NEWEST - 3, NEWEST + 1, (len(rows),), generator=generator),
    )


def with_tables(tree: TokenTree, tables: Tables) -> TokenTree:
    """The tree with the tables' versions and behaviour log-probs, and rewards by leaf path."""
    paths = token_paths(tree)
    index = torch.tensor([tables.rows[path] for path in paths])
    rewards = [
        random.Random(str(paths[end])).choice([0.0, 0.5, 1.0, 1.5]) for end in tree.leaf_token
    ]
    return replace(
        tree,
        behaviour_logprobs=tables.behaviour[index],
        policy_version=tables.versions[index],
        leaf_reward=torch.tensor(rewards, dtype=torch.float64),
    )


def trees_and_sequences(
    seed: int, loss_weighting: str, count: int = 3
) -> tuple[list[TokenTree], list[TokenTree], Tables]:
    """Trees of leaves of both signs and different length, and their leaves one by one; weighted by
    ``token_mean`` or ``sequence_mean``.
    """
    rng = random.Random(seed)
    roots = [weighted_as(random_tree(rng, vocab=1000), loss_weighting) for _ in range(count)]
    trees = [token_tree(root, dtype=torch.float64) for root in roots]
    sequences = [one for root in roots for one in flat_trees(root, dtype=torch.float64)]
    tables = tables_of(trees, seed)
    return (
        [with_tables(tree, tables) for tree in trees],
        [with_tables(sequence, tables) for sequence in sequences],
        tables,
    )
