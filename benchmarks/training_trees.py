"""What the benchmarks of training train on: trees of given levels, and their paths.

A workload is ``(number of nodes, tokens each)`` by level; all leaves' paths are equally long. With
``n_k`` nodes of ``s_k`` tokens at level k and w leaves, a tree has ``sum n_k s_k`` tokens and its
paths ``w sum s_k``: their quotient is the token ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.tree import EOS, Segment, Tree
from trainers.batch import PackedBatch, TokenTree
from trainers.packing import pack_row, total_weight
from treepo.advantages import ScoredTree, TreeAdvantages, spread_over_leaves
from treepo.samples import flat_token_trees, token_tree

IDS = 512  # that occur, so that rows fit every model


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """``num_trees`` trees in a row; ``levels``: (nodes of a tree, tokens of each). The first level
    is one node, whose first token is the prompt; all others are trained.
    """

    levels: tuple[tuple[int, int], ...]
    num_trees: int

    @property
    def path_length(self) -> int:
        return sum(tokens for _, tokens in self.levels)

    @property
    def num_leaves(self) -> int:
        return self.num_trees * self.levels[-1][0]

    @property
    def tree_tokens(self) -> int:
        return self.num_trees * sum(count * tokens for count, tokens in self.levels)

    @property
    def flat_tokens(self) -> int:
        return self.num_leaves * self.path_length

    @property
    def token_ratio(self) -> float:
        return self.flat_tokens / self.tree_tokens

    @property
    def tree_pairs(self) -> int:
        """Visible query-key pairs of a layer: a token at depth d sees d."""
        pairs = depth = 0
        for count, tokens in self.levels:
            pairs += count * (tokens * depth + tokens * (tokens + 1) // 2)
            depth += tokens
        return self.num_trees * pairs

    @property
    def flat_pairs(self) -> int:
        return self.num_leaves * self.path_length * (self.path_length + 1) // 2

    def trees(self) -> list[TokenTree]:
        return [token_tree(*self._scored(seed)) for seed in range(self.num_trees)]

    def paths(self) -> list[TokenTree]:
        """Every leaf's whole path as a tree with one leaf."""
        scored = map(self._scored, range(self.num_trees))
        return [path for each in scored for path in flat_token_trees(*each)]

    def row(self) -> PackedBatch:
        """All trees."""
        return pack_row(self.trees())

    def flat_rows(self) -> list[PackedBatch]:
        """All paths, as many to a row as the trees' row has tokens; the trees' denominator."""
        paths, denominator = self.paths(), total_weight(self.trees())
        each = max(1, self.tree_tokens // self.path_length)
        return [pack_row(paths[at : at + each], denominator) for at in range(0, len(paths), each)]

    def _scored(self, seed: int) -> tuple[ScoredTree, TreeAdvantages]:
        """One tree with random tokens and advantages."""
        rng = np.random.default_rng(seed)
        segments = [_segment(rng, parent=-1, level=0, tokens=1)]
        above = [0]
        for level, (count, tokens) in enumerate(self.levels):
            new = range(len(segments), len(segments) + count)
            parents = [parent for parent in above for _ in range(count // len(above))]
            is_last = level + 1 == len(self.levels)
            segments += [
                _segment(
                    rng, parent=parent, level=level + 1, tokens=tokens - (level == 0), ends=is_last
                )
                for parent in parents
            ]
            above = list(new)
        advantage = rng.standard_normal(len(above))
        group = ScoredTree(
            tree=Tree(
                problem_id=str(seed), segments=tuple(segments), leaves=tuple(above), temperature=1.0
            ),
            rewards=advantage,
            valid=np.ones(len(above), bool),
            correct=advantage > 0,
        )
        return group, spread_over_leaves(group, advantage, "token_mean")


def workloads(quick: bool) -> dict[str, Workload]:
    """By token ratio; paths of 512 tokens and about 4,096 tokens a row, an eighth if ``quick``."""
    full = {
        "1": Workload(num_trees=8, levels=((1, 512),)),
        "1.5": Workload(num_trees=6, levels=((1, 344), (2, 168))),
        "2": Workload(num_trees=4, levels=((1, 256), (2, 128), (4, 128))),
        "4": Workload(num_trees=2, levels=((1, 192), (2, 96), (4, 128), (8, 48), (16, 48))),
        "8": Workload(num_trees=4, levels=((1, 384), (2, 64), (4, 32), (8, 16), (16, 16))),
    }
    if not quick:
        return full
    return {
        name: Workload(
            num_trees=max(1, work.num_trees // 2),
            levels=tuple((count, tokens // 8) for count, tokens in work.levels),
        )
        for name, work in full.items()
    }


def _segment(
    rng: np.random.Generator, *, parent: int, level: int, tokens: int, ends: bool = False
) -> Segment:
    zeros = np.zeros(tokens, np.float32)
    return Segment(
        parent=parent,
        level=level,
        path_key=0,
        token_ids=rng.integers(IDS, size=tokens, dtype=np.int32),
        logprobs=zeros,
        sampling_logprobs=zeros,
        sampled=parent >= 0,
        policy_versions=np.zeros(tokens, np.int32),
        finish_reason=EOS if ends else "",
    )
