"""In which order a step's trees are submitted: as they come, or the longest first by what the run
has seen of lengths (``rollout/length_statistics.py``). It changes when a step ends, not what is
drawn.

A tree is expected to draw, in this step, the sum over its paths of E[min(rest, segment)]. Workers
get equal shares of that; each serves the trees first of which a single path draws the most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rollout.growth import Growth
from rollout.length_statistics import PAUSED, LengthStatistics, Observation, relative_error
from rollout.strategies.arena import response_length
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from treepo.advantages import leaf_num_tokens
from treepo.pools import Unfinished

_SAMPLING = "train"  # a run trains under one set of sampling settings


def of_tree(tree: Tree, cap: int) -> list[Observation]:
    """One of each response. ``cap``: ``rollout.max_response_length``."""
    return [
        Observation(
            prompt_id=tree.problem_id,
            policy_version=int(tree.segments[leaf].policy_versions[-1:].max(initial=0)),
            sampling=_SAMPLING,
            length=int(length),
            finish_reason=tree.segments[leaf].finish_reason,
            cap=cap,
        )
        for leaf, length in zip(tree.leaves, leaf_num_tokens(tree), strict=True)
    ]


def of_growth(growth: Growth, cap: int) -> list[Observation]:
    """One of each path that goes on: it is longer than this."""
    return [
        Observation(
            prompt_id=growth.problem_id,
            policy_version=int(partial.policy_versions[-1:].max(initial=0)),
            sampling=_SAMPLING,
            length=length,
            finish_reason=PAUSED,
            cap=cap,
        )
        for partial, length in zip(growth.partials, drawn(growth), strict=True)
        if length
    ]


def of_what_is_over(over: Sequence[Tree | Prompt | Growth], cap: int) -> list[Observation]:
    """Of trees that ended, and of others that were given up; of a prompt nothing was seen."""
    found: list[Observation] = []
    for work in over:
        if isinstance(work, Tree):
            found += of_tree(work, cap)
        elif isinstance(work, Growth):
            found += of_growth(work, cap)
    return found


def length_error(
    grown: Sequence[Tree | Growth], statistics: LengthStatistics, cap: int
) -> float | None:
    """How far predictions are off: sum over the trees that ended of the distance between the mean
    length of their responses and what ``statistics``, of the time before, said of it, over the sum
    of these means. None if none ended, or all were empty.
    """
    predictor = statistics.predictor(_SAMPLING)
    trees = [tree for tree in grown if isinstance(tree, Tree) and tree.num_leaves]
    actual = [float(leaf_num_tokens(tree).mean()) for tree in trees]
    predicted = [float(predictor.expected_remaining(t.problem_id, 0, cap)) for t in trees]
    return relative_error(predicted, actual) if sum(actual) else None


def drawn(growth: Growth) -> list[int]:
    """Tokens of the response on each path that goes on."""
    segments = growth.state.segments
    return [
        response_length(segments, partial.request.parent) + partial.num_tokens
        for partial in growth.partials
    ]


def expected_tokens(
    growing: Sequence[Unfinished],
    statistics: LengthStatistics,
    *,
    segment_length: int,
    rollout: Any,
    finished_part: Callable[[Growth], Tree] | None,
) -> list[float]:
    """What each tree is expected to draw in this step (see the module).

    Args:
        segment_length: 0: no limit.
        rollout: the settings of the rollout strategy. A new prompt counts as ``n`` paths: a tree
            that forks draws fewer tokens at first, but all new trees do alike.
        finished_part: for the lengths of siblings that are finished; None: they are not looked at.
    """
    cap = rollout.max_response_length
    growths = [entry.work for entry in growing if isinstance(entry.work, Growth)]
    seen = [observation for growth in growths for observation in of_growth(growth, cap)]
    if finished_part is not None:
        seen += [o for growth in growths for o in of_tree(finished_part(growth), cap)]
    predictor = statistics.predictor(_SAMPLING, seen)
    expected = []
    for entry in growing:
        lengths = [0] * rollout.n if isinstance(entry.work, Prompt) else drawn(entry.work)
        so_far = np.array(lengths, np.int64)
        ends = np.maximum(so_far, np.minimum(so_far + (segment_length or cap), cap))
        rest = predictor.expected_remaining(entry.problem.id, so_far, ends)
        expected.append(float(rest.sum()))
    return expected
