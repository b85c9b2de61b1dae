"""Where a tree goes on when all of its paths have ended before its width is reached (TreePO,
section 2.2).

A rule is a function ``rule(segments, candidates, missing, round) -> parents``: arena indices below
which new paths start (an index once for each new path), at most ``missing`` of them. ``round``
counts the tree's fallbacks from 0 and keeps their draws apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.strategies.arena import path
from rollout.tree import Segment
from treepo.base.keys import Purpose, draw_word, uniform

COPIES = 2  # paths that leave each cut


def random_segment(
    segments: Sequence[Segment], candidates: Sequence[int], missing: int, round: int
) -> list[int]:
    """Take the candidates in a random order; cut each at a uniformly random segment boundary
    (0: from the prompt) and let two paths go on from there, until nothing is missing.

    Each candidate is cut once in a round. If that doesn't fill the width, the new paths branch as
    any others do, and a further round follows when they have ended.
    """
    parents: list[int] = []
    order = sorted(candidates, key=lambda leaf: _lot(segments[leaf], round))
    for leaf in order[: -(-missing // COPIES)]:
        boundaries = path(segments, leaf)[:-1]  # the ends of the prompt and of inner segments
        draw = uniform(segments[leaf].path_key, 2 * round + 1, Purpose.FALLBACK)
        parents += [boundaries[int(draw * len(boundaries))]] * COPIES
    return parents[:missing]


def _lot(segment: Segment, round: int) -> tuple[int, int]:
    return draw_word(segment.path_key, 2 * round, Purpose.FALLBACK), segment.path_key
