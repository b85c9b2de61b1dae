"""Reward functions of the user, in the two conventions of the field, told apart by signature.

A (verl):  ``compute_score(data_source, solution_str, ground_truth, extra_info=None)`` -> a number,
or a dict with "score" (and, if it likes, "acc": whether the answer is correct, "pred": the answer
it read, and further numbers, which are logged).

B (TRL):  ``f(prompts, completions, **columns)`` -> one number per completion (None: the function
does not apply to it). It is called with one completion at a time; the columns of the data row, the
ground truth and the data source come by name, those that its signature takes. Where the row's
prompt is chat messages, prompts and completions are lists of messages too.

Both may be ``async``; options of the part are passed as keywords. A result that is not a number, or
not finite, or of the wrong length is an error, never a 0.
"""

from __future__ import annotations

import asyncio
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from rewards.records import RewardItem
from rewards.registry import Part, PartResult

PROMPT_MESSAGES = "prompt_messages"  # in extra_info: the prompt as chat messages, where it is one

_CONVENTIONS = (
    "either compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | "
    "dict, or f(prompts, completions, **columns) -> list[float]"
)


def make(function: Callable[..., Any], *, name: str, options: Mapping[str, Any]) -> Part:
    """Wrap a user's function as a part.

    Raises:
        ValueError: it fits neither convention, or lacks a parameter for an option.
    """
    if not callable(function):
        raise ValueError(f"reward {name!r} is not a function but {type(function).__name__}")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    is_a = {"solution_str", "ground_truth"} <= parameters.keys()
    is_b = "completions" in parameters
    if is_a == is_b:
        raise ValueError(
            f"reward {name!r} has the signature {inspect.signature(function)}, which fits "
            f"{'both conventions' if is_a else 'no convention'}: it must be {_CONVENTIONS}"
        )
    for option in options:
        if option not in parameters and not takes_any:
            raise ValueError(
                f"reward {name!r} takes no parameter {option!r}, which its options name; it takes "
                f"{', '.join(parameters)}"
            )
    positional_only = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    if positional_only:
        raise ValueError(
            f"reward {name!r}: its parameters are passed by name, so {positional_only[0]!r} may "
            "not be positional-only"
        )
    arguments = _arguments_a if is_a else _arguments_b
    read = read_score if is_a else read_scores

    def custom(item: RewardItem) -> PartResult:
        values = {**arguments(item), **options}
        if not takes_any:
            values = {key: value for key, value in values.items() if key in parameters}
        missing = [
            p.name
            for p in parameters.values()
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in values
        ]
        if missing:
            raise ValueError(
                f"the function needs {', '.join(missing)}, which this row does not have; it has "
                f"{', '.join(arguments(item))}"
            )
        result = function(**values)
        if inspect.isawaitable(result):
            result = asyncio.run(_wait_for(result))
        return read(result)

    return custom


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def _arguments_a(item: RewardItem) -> dict[str, Any]:
    return {
        "data_source": item.data_source,
        "solution_str": item.solution_str,
        "ground_truth": item.ground_truth,
        "extra_info": dict(item.extra_info),
    }


def _arguments_b(item: RewardItem) -> dict[str, Any]:
    columns = dict(item.extra_info)
    messages = columns.pop(PROMPT_MESSAGES, None)
    columns = {
        "data_source": item.data_source,
        "ground_truth": item.ground_truth,
        **columns,
    }
    completion: Any = item.solution_str
    if messages is not None:
        completion = [{"role": "assistant", "content": item.solution_str}]
    return {
        **{key: [value] for key, value in columns.items()},
        "prompts": [item.prompt if messages is None else messages],
        "completions": [completion],
    }


def read_score(result: Any) -> PartResult:
    """Read what a function of convention A returned.

    Raises:
        ValueError: it is neither a number nor a dict with the number "score".
    """
    if not isinstance(result, Mapping):
        return PartResult(value=_number(result, "the result"))
    if "score" not in result:
        raise ValueError(f"the returned dict has no 'score'; it has {', '.join(map(str, result))}")
    rest = {key: value for key, value in result.items() if key not in ("score", "acc", "pred")}
    prediction = result.get("pred")
    return PartResult(
        value=_number(result["score"], "'score'"),
        correct=bool(result["acc"]) if "acc" in result else None,
        answer=None if prediction is None else str(prediction),
        extras={str(k): float(v) for k, v in rest.items() if isinstance(v, numbers.Real)},
    )


def read_scores(result: Any) -> PartResult:
    """Read what a function of convention B returned for one completion.

    Raises:
        ValueError: not a list of exactly one number or None.
    """
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
        raise ValueError(f"expected a list of one score per completion, got {_short(result)}")
    if len(result) != 1:
        raise ValueError(f"expected 1 score for 1 completion, got {len(result)}")
    (value,) = result
    return PartResult(value=None if value is None else _number(value, "the score"))


def _number(value: Any, what: str) -> float:
    item = getattr(value, "item", None)  # numpy and torch scalars
    if callable(item) and not isinstance(value, numbers.Real):
        value = item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{what} is not a number but {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
