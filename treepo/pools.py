"""The two pools of segmented rollout (UloRL, arXiv 2507.19766, Algorithm 1), and their rules.

A step grows {unfinished pool + new prompts} by one segment. Trees that end are judged and go to the
experience pool; the others go back to the unfinished pool and on in the next step, under the
weights of then. Each update trains on the experience pool. The rules that the paper leaves open are
named settings (``treepo/segment_settings.py``). Everything here is a frozen record or a pure
function; ``treepo/segmented.py`` puts them together.

The *staleness* of a tree is the number of versions since its oldest weights: its prompt was begun
under policy version o, so under version v it is v - o. It is what ``max_staleness`` caps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rewards.records import RewardResult
from rollout.growth import Growth
from rollout.length_statistics import LengthStatistics
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from treepo.advantages import ScoredTree, has_spread, scored_tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.data import Problem
from treepo.overlong import overlong_in_loss
from treepo.saved_record import Layout
from treepo.segment_settings import SegmentSettings

POOLS_FILE = "pools.pkl"  # in a checkpoint's folder


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unfinished:
    """A tree that goes on in the next step.

    Attributes:
        work: the tree so far; the prompt, if it is new.
        begun: the step in which its prompt was begun.
        oldest_version: the policy version in force then.
        num_segments: steps that have grown it.
        verdicts: on its finished responses, by the path key of their last segment (with the group
            policy 'finished_part').
        handed_on: path keys of those of them that are in the experience pool or trained on.
    """

    problem: Problem
    work: Prompt | Growth
    begun: int
    oldest_version: int
    num_segments: int = 0
    verdicts: Mapping[int, RewardResult] = field(default_factory=dict)
    handed_on: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Group:
    """A prompt's judged responses, to train on: all of them, or those finished so far.

    Attributes:
        tree: of the finished responses.
        verdicts: in the order of ``tree.leaves``.
        begun, oldest_version, num_segments: as in :class:`Unfinished`.
        handed_on: path keys of responses that an earlier part trained on. They count in the
            baseline and spread of this one, and are not trained on again.
        is_whole: no response of the prompt is missing.
    """

    problem: Problem
    tree: Tree
    verdicts: tuple[RewardResult, ...]
    begun: int
    oldest_version: int
    num_segments: int
    handed_on: frozenset[int] = frozenset()
    is_whole: bool = True

    @property
    def is_new(self) -> np.ndarray:
        """Which leaves no part has trained on yet, bool [L]."""
        return np.array([key not in self.handed_on for key in leaf_keys(self.tree)], dtype=bool)

    def scored(self, overlong: str) -> ScoredTree:
        """For the estimators. ``overlong``: the rule for responses that were cut."""
        in_loss = self.is_new
        if (uncut := overlong_in_loss(self.tree, overlong)) is not None:
            in_loss &= uncut
        return scored_tree(self.tree, self.verdicts, in_loss)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pools:
    """What waits between two steps.

    Attributes:
        unfinished: oldest first.
        experience: judged groups with a signal that no update took yet, oldest first.
        num_grown, num_finished: trees that the last step grew, and that it finished.
        lengths: of responses that are over, for predictions.
    """

    unfinished: tuple[Unfinished, ...] = ()
    experience: tuple[Group, ...] = ()
    num_grown: int = 0
    num_finished: int = 0
    lengths: LengthStatistics = LengthStatistics(capacity=16384)

    @property
    def problems(self) -> list[Problem]:
        """All that are in flight, each once: none of them may be begun again before it is done."""
        waiting: list[Unfinished | Group] = [*self.unfinished, *self.experience]
        return list({entry.problem.id: entry.problem for entry in waiting}.values())


def leaf_keys(tree: Tree) -> list[int]:
    """Path keys of the leaves' last segments: names that stay when the tree grows on."""
    return [tree.segments[leaf].path_key for leaf in tree.leaves]


def begin_trees(
    problems: Sequence[Problem], prompts: Sequence[Prompt], step: int, version: int
) -> list[Unfinished]:
    """New trees, of which nothing is grown yet."""
    return [
        Unfinished(problem=problem, work=prompt, begun=step, oldest_version=version)
        for problem, prompt in zip(problems, prompts, strict=True)
    ]


def finished_group(
    entry: Unfinished, tree: Tree | None, verdicts: Mapping[int, RewardResult], *, is_whole: bool
) -> Group | None:
    """The responses that a tree has finished after one segment more; None if there are none.

    Args:
        tree: of them.
        verdicts: on them, by path key.
    """
    if tree is None or not tree.num_leaves:
        return None
    return Group(
        problem=entry.problem,
        tree=tree,
        verdicts=tuple(verdicts[key] for key in leaf_keys(tree)),
        begun=entry.begun,
        oldest_version=entry.oldest_version,
        num_segments=entry.num_segments + 1,
        handed_on=entry.handed_on,
        is_whole=is_whole,
    )


def hands_on(group: Group, floor: int, settings: AdvantageSettings) -> bool:
    """Whether the group goes to the experience pool now. It must have a signal, if groups without
    are filtered, and a response that no part handed on; a part needs ``floor`` such responses. A
    part without a signal waits: its responses go with a later one.
    """
    if settings.filter_groups:
        if not has_spread(group.scored(settings.overlong), settings.filter_groups_metric):
            return False
    return int(group.is_new.sum()) >= (1 if group.is_whole else floor)


def put_aside(
    entry: Unfinished,
    growth: Growth,
    verdicts: Mapping[int, RewardResult],
    handed: Group | None,
) -> Unfinished:
    """What goes on in the next step. ``handed``: the part that goes to the experience pool."""
    return replace(
        entry,
        work=growth,
        num_segments=entry.num_segments + 1,
        verdicts=verdicts,
        handed_on=frozenset(leaf_keys(handed.tree)) if handed else entry.handed_on,
    )


def num_new_prompts(pools: Pools, settings: SegmentSettings, size: int, num_problems: int) -> int:
    """How many prompts the step begins, by the rule ``refill`` (see the settings).

    'to_target' wants size - |experience| groups to finish, of which the share p that finished in
    the last step does: (size - |experience|) / p trees to grow, rounded up.

    Args:
        size: ``trainer.train_batch_size``.
        num_problems: of the data; none is in flight twice.
    """
    free = num_problems - len(pools.problems)
    if settings.refill == "keep_in_flight":
        wanted = settings.in_flight(size) - len(pools.unfinished)
    elif settings.refill == "to_target":
        missing = max(size - len(pools.experience), 0)
        wanted = size
        if pools.num_finished:
            grown = -(-missing * pools.num_grown // pools.num_finished)
            wanted = min(grown - len(pools.unfinished), size)
    else:
        assert settings.refill == "constant", settings.refill
        wanted = size
    return max(0, min(wanted, free))


def drop_stale(
    pools: Pools, settings: SegmentSettings, version: int
) -> tuple[Pools, list[Unfinished | Group]]:
    """Under ``on_stale='drop'``: the pools without what is too old to be trained on under
    ``version``, and that.
    """
    if not settings.max_staleness or settings.on_stale != "drop":
        return pools, []

    def is_fresh(entry: Unfinished | Group) -> bool:
        return version - entry.oldest_version <= settings.max_staleness

    everything: list[Unfinished | Group] = [*pools.unfinished, *pools.experience]
    dropped = [entry for entry in everything if not is_fresh(entry)]
    kept = replace(
        pools,
        unfinished=tuple(filter(is_fresh, pools.unfinished)),
        experience=tuple(filter(is_fresh, pools.experience)),
    )
    return kept, dropped


def untouched(dropped: Sequence[Unfinished | Group]) -> list[Problem]:
    """The problems of what was dropped of which no response was trained on: they are begun anew.
    The others count as trained on.
    """
    handed_on = {e.problem.id: e.handed_on for e in dropped if isinstance(e, Unfinished)}
    # A part that was still waiting knows what was really trained on.
    handed_on |= {e.problem.id: e.handed_on for e in dropped if isinstance(e, Group)}
    problems = {e.problem.id: e.problem for e in dropped}
    return [problem for name, problem in problems.items() if not handed_on[name]]


def must_finish(oldest_version: int, settings: SegmentSettings, version: int) -> bool:
    """Under ``on_stale='finish'``: whether this is the last step in which a tree is not too old."""
    if not settings.max_staleness or settings.on_stale != "finish":
        return False
    return version - oldest_version >= settings.max_staleness


def take_batch(
    experience: Sequence[Group], settings: SegmentSettings, size: int, version: int
) -> tuple[list[Group], list[Group]]:
    """What the update trains on, by the rule ``train_on``, and what stays. Groups that must train
    now (see :func:`must_finish`) are taken in any case, and then no full batch is waited for.
    """
    oldest_first = sorted(experience, key=lambda group: group.oldest_version)
    if settings.train_on == "all":
        return oldest_first, []
    due = sum(must_finish(group.oldest_version, settings, version) for group in experience)
    if len(experience) < size and not due:
        return [], oldest_first
    count = max(size, due)
    return oldest_first[:count], oldest_first[count:]


def add_group(experience: Sequence[Group], group: Group) -> tuple[Group, ...]:
    """The pool with one group more. A part of the same prompt that still waits becomes one with it:
    the later group holds its responses too.
    """
    waiting = [other for other in experience if other.problem.id == group.problem.id]
    others = [other for other in experience if other.problem.id != group.problem.id]
    assert len(waiting) <= 1 and not any(other.is_whole for other in waiting)
    return (*others, replace(group, handed_on=(waiting or [group])[0].handed_on))


_LAYOUT = Layout(name="pools", version=2, kinds=(Pools,))
dump_pools, load_pools = _LAYOUT.dump, _LAYOUT.load
