"""When a trajectory is over: repetition and complete answers, looked for in the whole response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rollout.strategies.settings import TreePOSettings
from treepo.base.registry import load_object

AnswerDetector = Callable[[np.ndarray], bool]  # response token ids, int32 [n] -> holds an answer


def is_repetitive(token_ids: np.ndarray, *, ngram: int, count: int) -> bool:
    """Whether some ``ngram`` tokens in a row occur at least ``count`` times without overlap."""
    if len(token_ids) < ngram * count:
        return False
    # Sorting hashes is many times cheaper than sorting n-grams, and nearly always settles it.
    often = np.flatnonzero(_sizes_of_equals(_window_hashes(token_ids, ngram)) >= count)
    if len(often) < count:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, ngram)[often]
    _, kind = np.unique(windows, axis=0, return_inverse=True)
    return any(
        _num_disjoint(often[kind.ravel() == k], ngram) >= count for k in range(kind.max() + 1)
    )


def _window_hashes(token_ids: np.ndarray, length: int) -> np.ndarray:
    """A polynomial hash modulo 2^64 of every ``length`` tokens in a row, uint64."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    powers = np.cumprod(np.full(length, odd))
    values = (token_ids.astype(np.uint64) + np.uint64(1)) * odd
    values ^= values >> np.uint64(29)
    hashes = np.zeros(len(values) - length + 1, dtype=np.uint64)
    for offset in range(length):
        hashes += values[offset : offset + len(hashes)] * powers[offset]
    return hashes


def _sizes_of_equals(values: np.ndarray) -> np.ndarray:
    """How many entries equal each entry."""
    _, kind, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return sizes[kind]


def _num_disjoint(starts: np.ndarray, length: int) -> int:
    """How many of the intervals [start, start + length) can be taken without overlap; ``starts``
    ascend, so that taking each as it comes is best.
    """
    taken, free_from = 0, 0
    for start in starts.tolist():
        if start >= free_from:
            taken, free_from = taken + 1, start + length
    return taken


def contains_any(token_ids: np.ndarray, sequences: Sequence[Sequence[int]]) -> bool:
    """Whether one of the sequences stands somewhere in the tokens."""
    for sequence in sequences:
        if len(sequence) <= len(token_ids):
            windows = np.lib.stride_tricks.sliding_window_view(token_ids, len(sequence))
            if (windows == np.asarray(sequence)).all(axis=1).any():
                return True
    return False


def has_complete_box(text: str) -> bool:
    r"""Whether the text holds a ``\boxed{...}`` whose braces close around something; escaped braces
    don't count.
    """
    start = text.find(r"\boxed{")
    while start >= 0:
        first = start + len(r"\boxed{")
        depth, position = 1, first
        while position < len(text) and depth:
            if text[position] == "\\":
                position += 1  # whatever is escaped is no brace
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
            position += 1
        if depth == 0 and text[first : position - 1].strip():
            return True
        start = text.find(r"\boxed{", first)
    return False


class BoxedAnswer:
    r"""Detects a complete ``\boxed{...}`` in the decoded response. The tokenizer is loaded at the
    first use and doesn't travel when the detector is pickled.
    """

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self._loaded: Any = None

    def __call__(self, token_ids: np.ndarray) -> bool:
        self.load()
        return has_complete_box(self._loaded.decode(token_ids.tolist()))

    def load(self) -> None:
        """Load the tokenizer, unless it is.

        Raises:
            ValueError: there is none of that name.
        """
        if self._loaded is not None:
            return
        from transformers import AutoTokenizer

        try:
            self._loaded = AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rollout.answer_tokenizer={self.tokenizer!r}: no tokenizer can be loaded from "
                f"it: {error}. Name a folder or a Hub name, leave it empty for the model's own, "
                "or set rollout.answer_token_ids or rollout.answer_detector"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tokenizer,)


def answer_detectors(settings: TreePOSettings) -> list[AnswerDetector]:
    """What the settings look for answers with; any detector that says yes suffices.

    Raises:
        ValueError: a finish policy that needs answers without a way to see them.
    """
    detectors: list[AnswerDetector] = []
    if settings.answer_token_ids:
        sequences = [list(sequence) for sequence in settings.answer_token_ids]
        detectors.append(partial(contains_any, sequences=sequences))
    if settings.answer_detector:
        detectors.append(load_object(settings.answer_detector, kind="rollout.answer_detector"))
    if settings.answer_tokenizer:
        detectors.append(BoxedAnswer(settings.answer_tokenizer))
    if settings.lacks_answer_source:
        raise ValueError(
            f"rollout.finish={settings.finish!r} needs a way to see answers: set "
            "rollout.answer_tokenizer (looks for \\boxed{...} in the text), "
            "rollout.answer_token_ids or rollout.answer_detector, or rollout.finish=eos"
        )
    return detectors
