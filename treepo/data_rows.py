"""Rows of data in the formats of the field, read into one form.

- verl: ``data_source, prompt, ability, reward_model.ground_truth, extra_info``
- TRL: ``prompt`` and further columns, which the reward function gets
- GSM8K: ``question, answer``, the answer ending in ``#### 18``

A prompt is a string or a list of chat messages. A row that is wrong is an error that says where it
stands and what is expected of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXPECTED = (
    "expected 'prompt' and 'reward_model' (verl), 'prompt' (TRL), or 'question' and 'answer' "
    "(GSM8K)"
)
_VERL_COLUMNS = ("data_source", "prompt", "reward_model", "extra_info")
TRUTH_COLUMNS = ("ground_truth", "solution", "answer", "label")  # TRL has no name for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One problem before its prompt is rendered.

    Attributes:
        where: file and line, for errors.
        prompt: text, or chat messages ``{"role": ..., "content": ...}`` ending with the user's.
    """

    id: str
    where: str
    prompt: str | list[dict[str, str]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


def parse_row(
    row: Any, *, id: str, where: str, row_format: str = "auto", data_source: str = ""
) -> Row:
    """Read one row.

    Args:
        row_format: one of ``treepo.data_settings.ROW_FORMATS``.
        data_source: for rows that name none.

    Raises:
        ValueError: says where the row stands, what it has and what is expected.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a row of columns, got {type(row).__name__}")
    if not row:
        raise ValueError(f"{where}: the row is empty; {_EXPECTED}")
    if row_format == "auto":
        row_format = recognise(row, where)
    prompt, source, truth, extra = _PARSERS[row_format](row, where)
    source = source or data_source
    if not source:
        raise ValueError(
            f"{where}: the row has no data_source; give it one, or set data.data_source"
        )
    return Row(
        id=id,
        where=where,
        prompt=_checked_prompt(prompt, where),
        data_source=source,
        ground_truth=truth,
        extra_info=extra,
    )


def recognise(row: Mapping[str, Any], where: str) -> str:
    """The format that a row's columns tell.

    Raises:
        ValueError: none.
    """
    if "prompt" in row:
        return "verl" if "reward_model" in row else "trl"
    if "question" in row and "answer" in row:
        return "gsm8k"
    raise ValueError(f"{where}: {_has(row)}; {_EXPECTED}")


_Parsed = tuple[Any, str, Any, dict[str, Any]]


def _verl(row: Mapping[str, Any], where: str) -> _Parsed:
    _need(row, ("data_source", "prompt", "reward_model"), "verl", where)
    model = row["reward_model"]
    if not isinstance(model, Mapping) or model.get("ground_truth") is None:
        raise ValueError(f"{where}: reward_model.ground_truth is missing (a verl row has it)")
    extra = row.get("extra_info") or {}
    if not isinstance(extra, Mapping):
        raise ValueError(f"{where}: extra_info must be an object, got {type(extra).__name__}")
    others = {key: value for key, value in row.items() if key not in _VERL_COLUMNS}
    return row["prompt"], str(row["data_source"]), model["ground_truth"], {**others, **extra}


def _trl(row: Mapping[str, Any], where: str) -> _Parsed:
    _need(row, ("prompt",), "TRL", where)
    extra = {key: value for key, value in row.items() if key not in ("prompt", "data_source")}
    truth = next((row[key] for key in TRUTH_COLUMNS if row.get(key) is not None), None)
    return row["prompt"], str(row.get("data_source") or ""), truth, extra


def _gsm8k(row: Mapping[str, Any], where: str) -> _Parsed:
    _need(row, ("question", "answer"), "GSM8K", where)
    solution, mark, final = str(row["answer"]).rpartition("####")
    if not mark or not final.strip():
        raise ValueError(
            f"{where}: the answer does not end in '#### <number>', as a GSM8K row's does; rows of "
            "another kind need the columns 'prompt' and 'ground_truth'"
        )
    extra = {key: value for key, value in row.items() if key != "data_source"}
    source = str(row.get("data_source") or "openai/gsm8k")
    return row["question"], source, final.strip(), extra


_PARSERS = {"verl": _verl, "trl": _trl, "gsm8k": _gsm8k}


def _need(row: Mapping[str, Any], columns: tuple[str, ...], kind: str, where: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(f"{where}: a {kind} row needs {', '.join(missing)}; {_has(row)}")


def _has(row: Mapping[str, Any]) -> str:
    return f"the row has the columns {', '.join(map(str, row))}"


def _checked_prompt(prompt: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{where}: the prompt must be text or a list of chat messages, got "
            f"{type(prompt).__name__}{' without any' if prompt == [] else ''}"
        )
    for message in prompt:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"{where}: each chat message needs the texts 'role' and 'content', got "
                f"{str(message)[:100]}"
            )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last chat message is the assistant's; nothing is asked")
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise ValueError(f"{where}: the prompt is empty")
    return [dict(message) for message in prompt]
