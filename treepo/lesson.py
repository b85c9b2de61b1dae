"""What an update is made of: advantages of the groups to train on, and the learner's batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.batch import PackedBatch, TokenTree
from treepo.advantages import ScoredTree, TreeAdvantages, estimate
from treepo.base.keys import root_key
from treepo.config import TrainConfig
from treepo.samples import token_trees
from treepo.step import has_gradient, mini_batches


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """See the module.

    Attributes:
        kept: the groups to train on.
        advantages: by group.
        trees: of the responses that are trained on.
        mini_batches: indexed [rank][update][micro-batch]; none, if there is nothing to follow.
    """

    kept: Sequence[ScoredTree]
    advantages: Sequence[TreeAdvantages]
    trees: Sequence[TokenTree]
    mini_batches: Sequence[Sequence[Sequence[PackedBatch]]]

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the learner once."""
        return sum(tree.num_tokens for tree in self.trees)

    @property
    def by_problem(self) -> dict[str, TreeAdvantages]:
        return {
            group.tree.problem_id: values
            for group, values in zip(self.kept, self.advantages, strict=True)
        }


def prepare_lesson(
    kept: Sequence[ScoredTree], config: TrainConfig, step: int, max_response_length: int
) -> Lesson:
    """
    Args:
        step: names the shuffle of the mini-batches.
        max_response_length: the rollout's, in tokens.
    """
    advantages = estimate(kept, config.algorithm)
    trees = token_trees(kept, advantages, drop_untrained=True)
    batches: list[list[list[PackedBatch]]] = []
    if has_gradient(trees, config):
        key = root_key(config.seed, "mini-batches", step)
        batches = mini_batches(trees, config, max_response_length, key)
    return Lesson(kept=kept, advantages=advantages, trees=trees, mini_batches=batches)
