"""Does the response have the asked form? A pattern, or tags in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.records import RewardItem
from rewards.registry import Part, PartResult


def make(
    pattern: str = "",
    tags: Sequence[str] = (),
    full_match: bool = True,
    reward: float = 1.0,
    penalty: float = 0.0,
) -> Part:
    """A part worth ``reward`` where the form is met and ``penalty`` where it is not.

    Args:
        pattern: a regular expression (``.`` matches newlines).
        tags: e.g. ``[think, answer]``: each pair of tags exactly once, in this order, none inside
            another.
        full_match: whether the pattern must cover the response, less white space around it.
    """
    if bool(pattern) == bool(tags):
        raise ValueError("reward part 'format' needs exactly one of its options pattern and tags")
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"reward part 'format': pattern={pattern!r} is no regular expression: {error}"
        ) from error

    def format_part(item: RewardItem) -> PartResult:
        text = item.solution_str.strip()
        if tags:
            met = has_tags_in_order(text, tags)
        else:
            met = bool(compiled.fullmatch(text) if full_match else compiled.search(text))
        return PartResult(value=reward if met else penalty)

    return format_part


def has_tags_in_order(text: str, tags: Sequence[str]) -> bool:
    """Whether each ``<tag>`` and ``</tag>`` stands exactly once, one pair after the other."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    positions = [text.index(mark) for mark in marks]
    return positions == sorted(positions)
