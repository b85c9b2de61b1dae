"""What a strategy asks of the engine and what comes back: one segment to sample, one segment
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STOP = "stop"  # a stop token was drawn (it is the segment's last token)
LENGTH = "length"  # max_tokens were drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendSpec:
    """How one segment is sampled.

    Attributes:
        max_tokens: at most so many tokens are drawn; 0 gives an empty segment that ended by length.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps
            all.
        top_k: keep so many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest; 0 drops none.
        stop_token_ids: a drawn token of this set ends the segment and stays in it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 0, ">= 0")
        _check("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps all)")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendRequest:
    """Sample one segment below segment ``parent`` of a strategy's tree.

    Attributes:
        request_id: number of the request within its tree, counted from 0 in the order of creation,
            never used twice.
        parent: index of the parent in the strategy's arena.
        path_key: key of the new segment; with the position it names every draw of the segment.
        level: the new segment's TreePO level (its parent's + 1 unless a strategy cuts finer).
    """

    request_id: int
    parent: int
    path_key: int
    level: int
    spec: ExtendSpec


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExtendResult:
    """One sampled segment, all arrays [n] with n <= spec.max_tokens (n = 0 only if max_tokens = 0).

    Attributes:
        token_ids: int32.
        logprobs: float32, of the drawn token under softmax(logits / temperature) (at temperature 0:
            softmax(logits)); what a trainer recomputes.
        sampling_logprobs: float32, after top-p and the rest: the behaviour policy (0 when greedy).
        finish_reason: ``STOP`` or ``LENGTH``.
        policy_version: of the weights that drew the tokens.
    """

    request: ExtendRequest
    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish_reason: str
    policy_version: int


def _check(field: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(
            f"sampling setting {field}={value!r} is out of range: it must be {allowed}"
        )
