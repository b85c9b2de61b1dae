"""Refusals of the learner's settings: field, value and what is allowed."""

from __future__ import annotations

from typing import Any


def check(name: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise a ``ValueError`` that names ``trainer.learner.<name>``, unless ``ok``."""
    if not ok:
        raise ValueError(f"trainer.learner.{name}={value!r}: must be {allowed}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """:func:`check` that the value is one of a few names."""
    check(name, value, value in allowed, f"one of {', '.join(allowed)}")


def unused(name: str, value: Any, where: str, mend: str) -> ValueError:
    """The error of a setting that does nothing beside the others."""
    return ValueError(f"trainer.learner.{name}={value!r} is not used with {where}: {mend}")
