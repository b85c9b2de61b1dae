"""What a strategy asks of the engine and what comes back: one segment to sample, one segment
sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rollout.sampling_settings import (
    PENALTIES_ALLOWED,
    STOP_STRINGS_ALLOWED,
    TEMPERATURES_ALLOWED,
    are_stop_strings,
    is_penalty,
    is_temperature,
)
from treepo.base.typed import check_types

STOP = "stop"  # a stop was completed by the segment's last token
LENGTH = "length"  # max_tokens were drawn

StopReason = int | tuple[int, ...] | str  # the stop token, sequence or string that ended a segment


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendSpec:
    """How one segment is sampled. Logits are changed in this order: bans, repetition penalty,
    temperature, top-k, top-p, min-p.

    Attributes:
        max_tokens: at most so many tokens are drawn; 0 gives an empty segment that ended by length.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps
            all.
        top_k: keep so many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the likeliest; 0 drops none.
        repetition_penalty: divides positive and multiplies negative logits of all tokens on the
            path, prompt included; 1 changes nothing.
        ban_token_ids: tokens that are never drawn.
        stop_token_ids: a drawn token of this set ends the segment and stays in it.
        stop_token_sequences: so does the token that completes one of these.
        stop_strings: so does the token after which the decoded response holds one of these.
        num_response_tokens: how many tokens at the end of the path above belong to the response: a
            stop sequence or string may have begun in them. One that began before does not count.
        num_top_logprobs: report so many of the likeliest tokens at each drawn token.
        wants_entropy: report the entropy of the distribution of each drawn token.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ban_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_response_tokens: int = 0
    num_top_logprobs: int = 0
    wants_entropy: bool = False

    def __post_init__(self) -> None:
        check_types(self, "sampling setting")
        for field in ("max_tokens", "num_response_tokens", "num_top_logprobs"):
            self._require(field, getattr(self, field) >= 0, ">= 0")
        self._require("temperature", is_temperature(self.temperature), TEMPERATURES_ALLOWED)
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("top_k", self.top_k >= 0, ">= 0 (0 keeps all)")
        self._require("min_p", 0 <= self.min_p < 1, "in [0, 1)")
        mild = is_penalty(self.repetition_penalty)
        self._require("repetition_penalty", mild, PENALTIES_ALLOWED)
        for field in ("ban_token_ids", "stop_token_ids"):
            self._require(field, min(getattr(self, field), default=0) >= 0, "token ids >= 0")
        self._require(
            "stop_token_sequences",
            all(s and min(s) >= 0 for s in self.stop_token_sequences),
            "sequences of at least one token id >= 0",
        )
        self._require("stop_strings", are_stop_strings(self.stop_strings), STOP_STRINGS_ALLOWED)

    def _require(self, field: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(
                f"sampling setting {field}={getattr(self, field)!r} is out of range: it must be "
                f"{allowed}"
            )

    def check(self, vocabulary: int, path_length: int) -> None:
        """
        Raises:
            ValueError: a token outside the vocabulary is banned, all tokens are banned, more top
                log-probs are asked for than there are tokens, or more tokens of the response than
                the path above has.
        """
        largest = max(self.ban_token_ids, default=0)
        self._require("ban_token_ids", largest < vocabulary, f"token ids < {vocabulary}")
        if len(self.ban_token_ids) >= vocabulary and len(set(self.ban_token_ids)) == vocabulary:
            raise ValueError(
                f"sampling setting ban_token_ids bans all {vocabulary} tokens: leave one to draw"
            )
        self._require("num_top_logprobs", self.num_top_logprobs <= vocabulary, f"<= {vocabulary}")
        self._require(
            "num_response_tokens",
            self.num_response_tokens <= path_length,
            f"<= {path_length}, the tokens of the path above",
        )

    @property
    def reads_path(self) -> bool:
        """Whether drawing needs to know the tokens of the path above."""
        seeks = bool(self.stop_token_sequences or self.stop_strings)
        return self.repetition_penalty != 1 or (seeks and self.num_response_tokens > 0)


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
        sampling_logprobs: float32, after bans, penalty, top-p and the rest: the behaviour policy
            (0 when greedy).
        finish_reason: ``STOP`` or ``LENGTH``.
        policy_versions: int32, of the weights that drew each token.
        stop_reason: the stop that was completed; None for ``LENGTH``.
        entropy: float32, in nats, of the distribution of ``logprobs``; None if not asked for.
        top_token_ids: int32 [n, num_top_logprobs], the likeliest tokens of that distribution,
            likeliest first; None if not asked for.
        top_logprobs: float32 [n, num_top_logprobs], theirs.
    """

    request: ExtendRequest
    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish_reason: str
    policy_versions: np.ndarray
    stop_reason: StopReason | None = None
    entropy: np.ndarray | None = None
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
