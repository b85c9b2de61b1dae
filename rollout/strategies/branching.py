"""How many paths leave each active path at the end of a level (TreePO, section 2.2).

A rule is a function ``rule(segments, active, budget) -> copies``: how many children each of the
``active`` arena indices gets. Every active path gets at least one and together they get ``budget``.
"""

from __future__ import annotations

from collections.abc import Sequence

from rollout.tree import Segment
from treepo.base.keys import Purpose, draw_word


def level_budget(*, active: int, finished: int, finished_this_step: int, width: int) -> int:
    """How many paths go on: every active path forks in two, and each path that ended in this step
    hands two more on, as far as the width ``w`` has room:

    B = max(active, min(w - finished, 2 * finished_this_step + 2 * active)).
    """
    return max(active, min(width - finished, 2 * finished_this_step + 2 * active))


def even(segments: Sequence[Segment], active: Sequence[int], budget: int) -> list[int]:
    """Split the budget evenly; what is left over goes one each to paths drawn by their keys."""
    share, left_over = divmod(budget, len(active))
    order = sorted(range(len(active)), key=lambda k: _lot(segments[active[k]]))
    copies = [share] * len(active)
    for k in order[:left_over]:
        copies[k] += 1
    return copies


def _lot(segment: Segment) -> tuple[int, int]:
    return draw_word(segment.path_key, 0, Purpose.BRANCH), segment.path_key
