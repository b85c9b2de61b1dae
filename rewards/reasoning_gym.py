"""Tasks of reasoning-gym: its generators make the problems, its scorers judge the answers.

What a scorer needs travels in ``extra_info["reasoning_gym"]`` as JSON:

    {"task": "chain_sum", "config": {"seed": 1, "size": 100, ...}, "index": 7, "entry": {...}}

``entry`` is the generator's row where JSON can hold it exactly; else it is null and the scorer
makes the row again from ``config`` and ``index``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import reasoning_gym as library
from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

from rewards.chain_sum_settings import check_term_counts, draw_term_count
from rewards.extract import check_form, extract_answer
from rewards.records import UNPARSABLE, RewardItem
from rewards.registry import Part, PartResult

KEY = "reasoning_gym"  # in extra_info
OF_CHAIN_SUM = ("min_value", "max_value", "median_terms", "log_sd")  # our settings of that task


def make(extraction: str = "auto", binary: bool = False) -> Part:
    """A part whose value is the library's own score in [0, 1] of the extracted answer.

    Some of its scorers give a little (0.01) for a wrong answer of the right kind: that is part of
    the value, and does not make the answer correct.

    Args:
        extraction: how the answer is found, see :mod:`rewards.extract`.
        binary: count only the full score, as 1, and everything else as 0.
    """
    check_form(extraction)

    def reasoning_gym(item: RewardItem) -> PartResult:
        row = item.extra_info.get(KEY)
        if not isinstance(row, Mapping) or "task" not in row:
            raise ValueError(
                f"an item of {item.data_source!r} has no extra_info[{KEY!r}] = "
                "{task, config, index, entry}: make its data with data.source=reasoning_gym"
            )
        config = json.dumps(row.get("config", {}), sort_keys=True)
        dataset = _cached_dataset(row["task"], config)
        entry = row.get("entry")
        if entry is None:
            entry = _cached_entry(row["task"], config, row["index"])
        answer = extract_answer(item.solution_str, extraction)
        value = float(dataset.score_answer(answer, entry))
        if binary:
            value = float(value >= 1.0)
        if answer is None:
            return PartResult(value=value, outcome=UNPARSABLE, correct=False)
        return PartResult(value=value, answer=_canonical(answer))

    return reasoning_gym


def make_dataset(task: str, config: Mapping[str, Any]) -> Any:
    """The library's data set ``task``.

    ``chain_sum`` takes settings beside the library's: ``min_value`` and ``max_value``, the range of
    the terms instead of their numbers of digits; ``median_terms`` and ``log_sd``, for a number of
    terms with a long tail (:mod:`rewards.chain_sum_settings`) instead of one that is uniform.

    Raises:
        ValueError: an unknown task (the closest names are listed) or a setting it does not have or
            refuses.
    """
    known = library.factory.DATASETS
    if task not in known:
        import difflib

        close = difflib.get_close_matches(task, known, n=5) or sorted(known)
        raise ValueError(
            f"unknown reasoning-gym task {task!r}; of its {len(known)} tasks these are close: "
            f"{', '.join(close)}"
        )
    config = dict(config)
    ours = {key: config.pop(key) for key in OF_CHAIN_SUM if key in config}
    if ours and task != "chain_sum":
        raise ValueError(f"reasoning-gym task {task!r} has no {' or '.join(ours)}")
    fields = known[task][1].__dataclass_fields__
    for key in config:
        if key not in fields:
            raise ValueError(
                f"reasoning-gym task {task!r} has no setting {key!r}; it has {', '.join(fields)}"
            )
    try:
        if ours:
            return _OurChainSum(ChainSumConfig(**config), **ours)
        return library.create_dataset(task, **config)
    except AssertionError as error:  # how the library's configurations refuse a value
        raise ValueError(
            f"reasoning-gym task {task!r} refuses the settings {config}: {error}"
        ) from error


def entry_as_json(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row as plain JSON data, or None where JSON would change it (tuples, fractions, ...)."""
    with contextlib.suppress(TypeError):  # json's word for "cannot hold this"
        copy = json.loads(json.dumps(entry))
        if _identical(copy, entry):
            return copy
    return None


def _identical(left: Any, right: Any) -> bool:
    """Equality that tells a list from a tuple and 1 from True or 1.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_identical(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_identical, left, right))
    return left == right


@functools.lru_cache(maxsize=64)
def _cached_dataset(task: str, config_json: str) -> Any:
    return make_dataset(task, {"seed": 0, "size": 1, **json.loads(config_json)})


@functools.lru_cache(maxsize=1024)
def _cached_entry(task: str, config_json: str, index: int) -> Any:
    return _cached_dataset(task, config_json)[index]


class _OurChainSum(ChainSumDataset):
    """The library's generator, its terms drawn from another range, their number from a lognormal
    where ``median_terms`` is given.
    """

    def __init__(
        self,
        config: ChainSumConfig,
        min_value: int = 1,
        max_value: int = 20,
        median_terms: float = 0.0,
        log_sd: float = 0.0,
    ) -> None:
        if not 0 <= min_value <= max_value:
            raise ValueError(
                f"chain_sum: min_value={min_value} and max_value={max_value} must satisfy "
                "0 <= min_value <= max_value"
            )
        super().__init__(config)
        self._bounds = (min_value, max_value)
        self._term_counts: tuple[float, float] | None = None
        if median_terms or log_sd:
            check_term_counts(config.min_terms, config.max_terms, median_terms, log_sd)
            self._term_counts = (median_terms, log_sd)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        if self._term_counts is None:
            return super().__getitem__(idx)
        # Draws of their own, so that the number of terms says nothing about the terms.
        rng = random.Random(f"number of terms: {self.seed + idx}")
        count = draw_term_count(
            rng, self.config.min_terms, self.config.max_terms, *self._term_counts
        )
        row = copy.copy(self)
        row.config = replace(self.config, min_terms=count, max_terms=count)
        row._term_counts = None
        return row[idx]

    def _generate_task(
        self, rng: random.Random, num_terms: int, min_value: int, max_value: int
    ) -> tuple[str, int]:
        return super()._generate_task(rng, num_terms, *self._bounds)


def _canonical(answer: str) -> str:
    """One spelling for votes: numbers without separators, sign or leading zeros, else one-spaced
    text.
    """
    text = " ".join(answer.split())
    digits = text.replace(",", "").removeprefix("+")
    unsigned = digits.removeprefix("-")
    if unsigned.isascii() and unsigned.isdigit():
        stripped = unsigned.lstrip("0") or "0"
        return "-" + stripped if digits.startswith("-") and stripped != "0" else stripped
    return text
