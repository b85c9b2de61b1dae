"""Prompts until enough of them have a signal (dynamic sampling of DAPO, arXiv 2503.14476).

A step samples a batch of ``size`` prompts. With ``algorithm.filter_groups`` those whose responses
all score the same are dropped; as long as fewer than ``size`` are left, further batches are
sampled, ``algorithm.max_num_gen_batches`` in all. A further batch is as large as the share of
prompts with a signal so far makes necessary, at most ``size``, and never repeats a prompt of the
step. If more than ``size`` prompts end up with a signal, the first ones in the order of sampling
are trained on and the others given back: their trees are thrown away, since the next step has other
weights, and they come first in its batch. So each prompt is trained on or filtered exactly once an
epoch, and where the data stand after a step is one position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rewards.records import RewardResult
from rollout.metrics import CostLedger
from rollout.tree import Tree
from treepo.advantages import FilterCounts, ScoredTree, filter_groups, scored_tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.data import Problem
from treepo.data_order import DataPosition, ProblemOrder
from treepo.overlong import overlong_in_loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GenBatch:
    """Prompts with their judged trees, in one order.

    Attributes:
        verdicts: by tree, then in the order of its leaves.
        ledger: what sampling cost.
    """

    problems: list[Problem]
    trees: list[Tree]
    verdicts: list[list[RewardResult]]
    ledger: CostLedger

    def __add__(self, other: GenBatch) -> GenBatch:
        return GenBatch(
            problems=self.problems + other.problems,
            trees=self.trees + other.trees,
            verdicts=self.verdicts + other.verdicts,
            ledger=self.ledger + other.ledger,
        )

    def groups(self, overlong: str) -> list[ScoredTree]:
        """For the estimators. ``overlong``: the rule for responses that were cut."""
        pairs = zip(self.trees, self.verdicts, strict=True)
        return [
            scored_tree(tree, verdicts, overlong_in_loss(tree, overlong))
            for tree, verdicts in pairs
        ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepBatch:
    """What a step sampled and what it trains on.

    Attributes:
        sampled: all of it.
        kept: the groups to train on; without the filter, all.
        counts: of all groups.
        returned: problems given back to the next step.
        num_gen_batches: how many batches were sampled.
        after: the position in the data when this is trained on.
    """

    sampled: GenBatch
    kept: list[ScoredTree]
    counts: FilterCounts
    returned: list[Problem]
    num_gen_batches: int
    after: DataPosition

    @property
    def settled(self) -> GenBatch:
        """The groups that are trained on, filtered or given back: all."""
        return self.sampled

    @property
    def why_nothing_is_kept(self) -> str:
        return "the responses of every prompt score the same"

    def metrics(self) -> dict[str, float]:
        return {
            "training/num_groups": float(self.counts.num_groups),
            "training/num_informative_groups": float(self.counts.num_kept),
            "training/num_groups_without_verdict": float(self.counts.num_without_verdict),
            "training/num_gen_batches": float(self.num_gen_batches),
            "training/num_returned_groups": float(len(self.returned)),
        }


def gather(
    draw: Callable[[int, list[Problem]], GenBatch],
    order: ProblemOrder,
    position: DataPosition,
    size: int,
    settings: AdvantageSettings,
) -> StepBatch:
    """Sample batches until ``size`` groups have a signal (see the module).

    Args:
        draw: samples and judges the trees of some problems; is told how many batches came before.
    """
    metric = settings.filter_groups_metric
    problems, position = order.next_batch(position, size)
    sampled, batches = draw(0, problems), 1
    while True:
        groups = sampled.groups(settings.overlong)
        informative, counts = filter_groups(groups, metric)
        wanted = further_prompts(counts.num_kept, counts.num_groups, size)
        wanted = min(wanted, len(order.problems) - len(groups))
        if wanted < 1 or batches == settings.max_num_gen_batches:
            break
        problems, position = order.next_batch(position, wanted, besides=sampled.problems)
        sampled, batches = sampled + draw(batches, problems), batches + 1
    surplus = {id(group) for group in informative[size:]} if settings.filter_groups else set()
    returned = [p for p, g in zip(sampled.problems, groups, strict=True) if id(g) in surplus]
    return StepBatch(
        sampled=sampled,
        kept=informative[:size] if settings.filter_groups else groups,
        counts=counts,
        returned=returned,
        num_gen_batches=batches,
        after=order.give_back(position, returned),
    )


def further_prompts(num_informative: int, num_sampled: int, size: int) -> int:
    """How many more prompts are likely to bring ``size`` informative ones, at most ``size``: as
    many as are missing, over the share of informative ones so far.
    """
    missing = max(size - num_informative, 0)
    if num_informative == 0:
        return size
    return min(-(-missing * num_sampled // num_informative), size)
