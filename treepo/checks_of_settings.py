"""Refusals of the roof's settings: field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence


def require(field_name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise a ``ValueError`` that names the field, its value and what is allowed, unless ``ok``."""
    if not ok:
        raise ValueError(f"{field_name}={value!r} is out of range: it must be {allowed}")


def require_one_of(field_name: str, value: str, allowed: Sequence[str]) -> None:
    """As :func:`require`, of a choice among names."""
    if value not in allowed:
        raise ValueError(f"{field_name}={value!r} is unknown; choose one of {', '.join(allowed)}")
