"""The synchronous step of segmented rollout: {unfinished pool + new prompts} grow by one segment,
what ends is judged and goes to the experience pool, and the update's batch is taken from there. The
pools and their rules are in ``treepo/pools.py``.

A prompt is consumed when its last response is trained on, or its group has no signal and is
filtered. Until then it is in one of the pools, and a checkpoint holds these and the position in the
data together: so each prompt is consumed exactly once an epoch, over any crash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.records import RewardResult
from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from treepo.advantages import FilterCounts, ScoredTree, filter_groups
from treepo.config import TrainConfig
from treepo.data import Problem
from treepo.data_order import DataPosition, ProblemOrder
from treepo.dynamic_sampling import GenBatch
from treepo.pools import (
    Group,
    Pools,
    Unfinished,
    add_group,
    begin_trees,
    drop_stale,
    finished_group,
    hands_on,
    leaf_keys,
    must_finish,
    num_new_prompts,
    put_aside,
    take_batch,
    untouched,
)
from treepo.segment_settings import SegmentSettings
from treepo.step_metrics import version_metrics
from treepo.submission import length_error, of_what_is_over


@dataclass(frozen=True, kw_only=True, slots=True)
class Servants:
    """What the step has others do.

    Attributes:
        prompts: prompts of new problems, with the keys of their draws.
        grow: trees as far as the limits allow, in the order of the work, and the cost.
        judge: verdicts on the leaves of trees.
        finished_part: the responses that an unfinished tree has finished, as a tree; None: the
            strategy cannot tell.
    """

    prompts: Callable[[Sequence[Problem]], Sequence[Prompt]]
    grow: Callable[[Sequence[Unfinished], GrowthLimits], tuple[Sequence[Tree | Growth], CostLedger]]
    judge: Callable[[Sequence[Problem], Sequence[Tree]], Sequence[Sequence[RewardResult]]]
    finished_part: Callable[[Growth], Tree] | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentBatch:
    """What a step sampled and what it trains on.

    Attributes:
        sampled: the responses that were judged in this step, as trees.
        settled: the groups that are trained on or filtered in this step.
        kept: the groups to train on, for the estimators.
        counts: of the groups that were judged in this step.
        pools: after the step.
        after: the position in the data after it.
        num_new: prompts begun.
        num_dropped: prompts given up as too old.
        spans: metrics of how many steps and policies the batch's groups took.
    """

    sampled: GenBatch
    settled: GenBatch
    kept: list[ScoredTree]
    counts: FilterCounts
    pools: Pools
    after: DataPosition
    num_new: int
    num_dropped: int
    spans: dict[str, float]

    @property
    def why_nothing_is_kept(self) -> str:
        if self.pools.experience:
            return f"{len(self.pools.experience)} groups wait until a full batch is there"
        if self.counts.num_groups:
            return "the responses of every finished prompt score the same"
        return "no prompt's responses are done yet"

    def metrics(self) -> dict[str, float]:
        counts = {
            "training/num_groups": self.counts.num_groups,
            "training/num_informative_groups": self.counts.num_kept,
            "training/num_groups_without_verdict": self.counts.num_without_verdict,
            "rollout/num_new": self.num_new,
            "rollout/num_finished": self.pools.num_finished,
            "rollout/num_unfinished": len(self.pools.unfinished),
            "rollout/num_waiting": len(self.pools.experience),
            "rollout/num_dropped_stale": self.num_dropped,
        }
        return {name: float(count) for name, count in counts.items()} | self.spans


def segmented_step(
    pools: Pools,
    position: DataPosition,
    *,
    step: int,
    version: int,
    trains_at: int,
    order: ProblemOrder,
    config: TrainConfig,
    rollout: Any,
    servants: Servants,
) -> SegmentBatch:
    """Grow by one segment and take the update's batch (see the module).

    Args:
        step: its number, from 1.
        version: of the policy in force.
        trains_at: the version that the batch's update starts from; what is too old is so by it.
        rollout: the settings of the rollout strategy.
    """
    segments, algorithm = config.trainer.segments, config.algorithm
    size = config.trainer.train_batch_size
    pools, dropped = drop_stale(pools, segments, trains_at)
    position = order.give_back(position, untouched(dropped))
    problems: list[Problem] = []
    if wanted := num_new_prompts(pools, segments, size, len(order.problems)):
        problems, position = order.next_batch(position, wanted, besides=pools.problems)
    begun = begin_trees(problems, servants.prompts(problems), step, version)
    growing = [*pools.unfinished, *begun]
    grown, ledger = _grow(growing, segments, trains_at, servants)
    trees = [_finished(result, segments, servants) for result in grown]
    verdicts, sampled = _judge(growing, trees, ledger, servants)

    groups = [
        finished_group(entry, tree, of_leaves, is_whole=isinstance(result, Tree))
        for entry, result, tree, of_leaves in zip(growing, grown, trees, verdicts, strict=True)
    ]
    floor = segments.min_finished or -(-rollout.n // 2)
    handed = [g if g and hands_on(g, floor, algorithm) else None for g in groups]
    filtered = [
        g for g, taken in zip(groups, handed, strict=True) if g and g.is_whole and not taken
    ]
    unfinished = [
        put_aside(entry, result, of_leaves, group)
        for entry, result, of_leaves, group in zip(growing, grown, verdicts, handed, strict=True)
        if isinstance(result, Growth)
    ]
    experience = pools.experience
    for group in filter(None, handed):
        experience = add_group(experience, group)
    over: list[Tree | Prompt | Growth] = [tree for tree in grown if isinstance(tree, Tree)]
    over += [entry.work for entry in dropped if isinstance(entry, Unfinished)]
    batch, waiting = take_batch(experience, segments, size, trains_at)
    kept = [group.scored(algorithm.overlong) for group in batch]
    judged = [group.scored(algorithm.overlong) for group in (*filter(None, handed), *filtered)]
    return SegmentBatch(
        sampled=sampled,
        settled=gen_batch([*batch, *filtered]),
        kept=kept,
        counts=filter_groups(judged, algorithm.filter_groups_metric)[1],
        pools=Pools(
            unfinished=tuple(unfinished),
            experience=tuple(waiting),
            num_grown=len(grown),
            num_finished=sum(isinstance(result, Tree) for result in grown),
            lengths=pools.lengths.add(of_what_is_over(over, rollout.max_response_length)),
        ),
        after=position,
        num_new=len(begun),
        num_dropped=len({entry.problem.id for entry in dropped}),
        spans=version_metrics(kept) | num_segments(batch) | _length_error(grown, pools, rollout),
    )


def _grow(
    growing: Sequence[Unfinished], settings: SegmentSettings, trains_at: int, servants: Servants
) -> tuple[list[Tree | Growth], CostLedger]:
    """By one segment; those that would become too old to their end, and first: the longest."""
    due = [must_finish(entry.oldest_version, settings, trains_at) for entry in growing]
    results: list[Tree | Growth | None] = [None] * len(growing)
    ledger = CostLedger()
    for is_due, length in ((True, 0), (False, settings.segment_length)):
        indices = [i for i, entry_is_due in enumerate(due) if entry_is_due == is_due]
        if not indices:
            continue
        entries = [growing[i] for i in indices]
        enough = settings.stop_when_finished
        if enough:  # those that are due come in any case
            enough = 0 if is_due else max(1, enough - sum(due))
        limits = GrowthLimits(segment_length=length, stop_when_finished=enough)
        grown, cost = servants.grow(entries, limits)
        ledger = ledger + cost
        for index, result in zip(indices, grown, strict=True):
            results[index] = result
    assert not any(isinstance(r, Growth) for r, is_due in zip(results, due, strict=True) if is_due)
    return results, ledger  # type: ignore[return-value]


def _finished(result: Tree | Growth, settings: SegmentSettings, servants: Servants) -> Tree | None:
    """The tree of what may train: a whole one, or under 'finished_part' what is finished of it."""
    if isinstance(result, Tree):
        return result
    if settings.group_policy != "finished_part":
        return None
    assert servants.finished_part is not None, "the strategy was checked before the run"
    return servants.finished_part(result)


def _judge(
    growing: Sequence[Unfinished],
    trees: Sequence[Tree | None],
    ledger: CostLedger,
    servants: Servants,
) -> tuple[list[dict[int, RewardResult]], GenBatch]:
    """Verdicts on all finished responses by path key, and the responses that had none before."""
    found = [dict(entry.verdicts) for entry in growing]
    fresh: list[tuple[int, Tree]] = []
    for index, tree in enumerate(trees):
        if tree is not None:
            keys = zip(tree.leaves, leaf_keys(tree), strict=True)
            new = tuple(leaf for leaf, key in keys if key not in found[index])
            fresh += [(index, replace(tree, leaves=new).pruned())] if new else []
    problems, judged = [growing[i].problem for i, _ in fresh], [tree for _, tree in fresh]
    verdicts = servants.judge(problems, judged) if fresh else []
    for (index, tree), of_leaves in zip(fresh, verdicts, strict=True):
        found[index] |= zip(leaf_keys(tree), of_leaves, strict=True)
    sampled = GenBatch(
        problems=problems, trees=judged, verdicts=[list(v) for v in verdicts], ledger=ledger
    )
    return found, sampled


def gen_batch(groups: Sequence[Group]) -> GenBatch:
    """Judged groups as a batch; it cost nothing now."""
    return GenBatch(
        problems=[group.problem for group in groups],
        trees=[group.tree for group in groups],
        verdicts=[list(group.verdicts) for group in groups],
        ledger=CostLedger(),
    )


def _length_error(grown: Sequence[Tree | Growth], before: Pools, rollout: Any) -> dict[str, float]:
    error = length_error(grown, before.lengths, rollout.max_response_length)
    return {} if error is None else {"rollout/length_error": error}


def num_segments(batch: Sequence[Group]) -> dict[str, float]:
    """Metrics of how many pieces the groups were grown in."""
    counts = [group.num_segments for group in batch]
    if not counts:
        return {}
    return {
        "training/segments_per_group/mean": sum(counts) / len(counts),
        "training/segments_per_group/max": float(max(counts)),
    }
