"""Types of a settings record's fields, checked when it is built: ``'False'`` is no False, ``'ab'``
no list of strings, and 1.5 no number of tokens. Numpy's numbers become Python's, and sequences the
kind that the field declares.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import fields
from functools import cache
from typing import Any

_LARGEST = 1 << 31  # integers must be smaller in size: they become int32 tensors


def check_types(record: Any, owner: str) -> None:
    """Check and convert every field of a dataclass (a frozen one too) by its annotation. Fields of
    other kinds are left alone.

    Args:
        owner: what the error calls the record's fields, e.g. ``engine setting``; one that ends
            with a dot is a prefix, as ``rollout.``.

    Raises:
        ValueError: naming field and value.
    """
    for field, words, convert in _checks(record.__class__):
        value = getattr(record, field)
        try:
            found = convert(value)
        except (TypeError, ValueError, OverflowError) as error:
            name = f"{owner}{field}" if owner.endswith(".") else f"{owner} {field}"
            raise ValueError(f"{name}={value!r}: it must be {words}") from error
        object.__setattr__(record, field, found)


@cache
def _checks(kind: type) -> list[tuple[str, str, Callable[[Any], Any]]]:
    """Fields of a dataclass that are checked: name, what is allowed in words, conversion."""
    kinds = ((field.name, _KINDS.get(str(field.type))) for field in fields(kind))
    return [(name, *found) for name, found in kinds if found is not None]


def as_int(value: Any) -> int:
    """An integer below 2**31 in size; bools are none.

    Raises:
        TypeError, OverflowError: it is something else.
    """
    if isinstance(value, bool):
        raise TypeError("a bool")
    number = operator.index(value)
    if abs(number) >= _LARGEST:
        raise OverflowError(f"{number} does not fit 32 bits")
    return number


def _as_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError("no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _as_float_or_none(value: Any) -> float | None:
    return None if value is None else _as_float(value)


def _as_int_or_none(value: Any) -> int | None:
    return None if value is None else as_int(value)


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("no bool")
    return bool(value)


def _as_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no string")
    value.encode()  # lone surrogates are no text
    return value


def _each(convert: Callable[[Any], Any], kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def convert_all(values: Any) -> Any:
        if isinstance(values, str | bytes | Set | Mapping):
            raise TypeError("no sequence")
        return kind(convert(value) for value in values)

    return convert_all


_INTS = "integers"
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "int": ("an integer", as_int),
    "int | None": ("an integer, or null", _as_int_or_none),
    "float": ("a finite number", _as_float),
    "float | None": ("a finite number, or null", _as_float_or_none),
    "list[float]": ("a list of finite numbers", _each(_as_float, list)),
    "bool": ("True or False", _as_bool),
    "str": ("a string", _as_str),
    "tuple[int, ...]": (f"a sequence of {_INTS}", _each(as_int, tuple)),
    "list[int]": (f"a list of {_INTS}", _each(as_int, list)),
    "tuple[str, ...]": ("a sequence of strings, not one string", _each(_as_str, tuple)),
    "list[str]": ("a list of strings, not one string", _each(_as_str, list)),
    "tuple[tuple[int, ...], ...]": (
        f"a sequence of sequences of {_INTS}",
        _each(_each(as_int, tuple), tuple),
    ),
    "list[list[int]]": (f"a list of lists of {_INTS}", _each(_each(as_int, list), list)),
}
