"""The parts a reward is made of, by name.

A part is a function of one response, ``part(item) -> PartResult``. The registry holds factories,
which take a part's options as keywords and are called once per process; the built-in ones are
imported at first use, so that looking up names costs no import of a verifier. User code goes in by
path, see :mod:`rewards.custom`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rewards.records import SCORED, RewardItem
from rewards.settings import RewardSettings
from treepo.base.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class PartResult:
    """What one part says about one response.

    Attributes:
        value: before weighting; None: the part does not apply to this item and is left out.
        outcome: one of ``rewards.records.OUTCOMES``.
        correct: a verdict of the part's own; None: ``value >= correct_threshold``.
        answer: the canonical answer that was read, if any.
        detail: what went wrong, for people.
        extras: further numbers to log beside the part's value.
    """

    value: float | None
    outcome: str = SCORED
    correct: bool | None = None
    answer: str | None = None
    detail: str = ""
    extras: Mapping[str, float] = field(default_factory=dict)


Part = Callable[[RewardItem], PartResult]

REWARDS: Registry[Callable[..., Part]] = Registry(
    "reward",
    builtin={
        "auto": "rewards.auto:make",
        "exact": "rewards.exact:make",
        "format": "rewards.format:make",
        "length": "rewards.length:make",
        "math": "rewards.math:make",
        "reasoning_gym": "rewards.reasoning_gym:make",
    },
)
SHAPING = frozenset({"format", "length"})  # parts that say nothing about the answer


def check_name(name: str) -> None:
    """Raise ``ValueError`` listing the known parts if ``name`` is neither one of them nor user code
    by path. Imports no part.
    """
    REWARDS.check(name)


def check_parts(settings: RewardSettings) -> None:
    """Look the configured parts up by name, importing nothing.

    Raises:
        ValueError: an unknown name (the known ones are listed), or no part that gives a verdict.
    """
    verdicts = 0
    for label, part in settings.parts_in_force().items():
        name = part.name or label
        check_name(name)
        verdicts += name not in SHAPING if part.verdict is None else part.verdict
    if not verdicts:
        raise ValueError(
            f"reward.parts={list(settings.parts)}: none of them says whether an answer is correct; "
            "add a verifier (e.g. auto), or set verdict=true for the part that decides"
        )


def make_part(name: str, options: Mapping[str, Any]) -> Part:
    """Build the part called ``name``.

    Raises:
        ValueError: unknown name, an option it does not have, an option's bad value, or user code
            that fits neither calling convention.
    """
    factory = REWARDS.get(name)
    if name not in REWARDS:
        from rewards.custom import make as make_custom

        return make_custom(factory, name=name, options=options)
    allowed = inspect.signature(factory).parameters
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"reward part {name!r} has no option {option!r}; it has {', '.join(allowed)}"
            )
    for option, parameter in allowed.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(
                f"reward part {name!r} needs its option {option!r}, e.g. "
                f"reward.parts.{name}.options.{option}=..."
            )
    return factory(**options)
