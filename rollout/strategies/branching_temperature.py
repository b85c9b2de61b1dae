"""Temperature T of the branching rules that weigh paths, constant or changing over the levels.

Paths fork at the ends of levels 1 to d - 1 (d: ``max_depth``; at d they end). A schedule is a
function ``schedule(progress, temperatures) -> T``, where progress runs from 0 at level 1 to 1 at
level d - 1:

    t = (level - 1) / (d - 2), 0 where d <= 2.

After a fallback the active paths may stand at different levels; one T serves them all, at the mean
of their levels. The paper gives only the ranges of its schedules: the shapes are defined here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rollout.strategies.rule_settings import BRANCHING_SCHEDULES, PAPER_TEMPERATURES
from rollout.strategies.settings import TreePOSettings


def branching_temperature(levels: Sequence[int], settings: TreePOSettings) -> float:
    """T for active paths at these levels."""
    schedule = BRANCHING_SCHEDULES.get(settings.branching_schedule)
    default = PAPER_TEMPERATURES.get(settings.branching_schedule, [])
    temperatures = settings.branching_temperature or default
    temperature = schedule(progress(levels, settings.max_depth), temperatures)
    assert temperature > 0, f"{settings.branching_schedule} gave the temperature {temperature}"
    return temperature


def progress(levels: Sequence[int], max_depth: int) -> float:
    """t of the module, at the mean of ``levels``, each in 1..max_depth - 1."""
    if max_depth <= 2:
        return 0.0
    return (sum(levels) / len(levels) - 1) / (max_depth - 2)


def constant(progress: float, temperatures: Sequence[float]) -> float:
    """[T]: T at every level."""
    return temperatures[0]


def linear(progress: float, temperatures: Sequence[float]) -> float:
    """[first, last]: T = first + (last - first) * t."""
    first, last = temperatures
    return first + (last - first) * progress


def sinusoidal(progress: float, temperatures: Sequence[float]) -> float:
    """[ends, middle]: T = ends + (middle - ends) * sin(pi * t), half a wave over the tree."""
    ends, middle = temperatures
    return ends + (middle - ends) * math.sin(math.pi * progress)
