"""What the sampling strategies can be told: plain dataclasses, checked when they are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from treepo.base.registry import Registry
from treepo.base.typed import check_types

FINISH_POLICIES = ("eos", "boxed_and_eos", "boxed_as_eos")
NO_FALLBACK = "none"

# name -> rule that shares a budget among active paths (see rollout.strategies.branching)
BRANCHINGS: Registry[Any] = Registry(
    "branching rule", builtin={"even": "rollout.strategies.branching:even"}
)
# name -> rule that picks where finished trajectories are cut (see rollout.strategies.fallback)
FALLBACKS: Registry[Any] = Registry(
    "fallback rule", builtin={"random_segment": "rollout.strategies.fallback:random_segment"}
)


@dataclass
class SamplingSettings:
    """How tokens are drawn and how long a response may be; shared by all strategies."""

    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_p: float = 1.0  # nucleus: smallest set of likely tokens with this probability; 1 keeps all
    top_k: int = 0  # keep so many likely tokens; 0 keeps all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest; 0 drops none
    # divides positive and multiplies negative logits of all tokens on the path, prompt included;
    # 1 changes nothing
    repetition_penalty: float = 1.0
    ban_token_ids: list[int] = field(default_factory=list)  # never drawn
    max_response_length: int = 1024  # tokens of a response, its end-of-sequence token included
    # tokens that end a response, any of them; empty: filled in from the model's tokenizer
    stop_token_ids: list[int] = field(default_factory=list)
    # what else ends a response, with the token that completes it: one of these token sequences, or
    # text of the response (special tokens included) that holds one of these strings
    stop_token_sequences: list[list[int]] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_types(self, f"{type(self).__name__}:")
        self._require("temperature", self.temperature >= 0, ">= 0 (0 is greedy)")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)")
        self._require("top_k", self.top_k >= 0, ">= 0 (0 keeps all tokens)")
        self._require("min_p", 0 <= self.min_p < 1, "in [0, 1) (0 drops no token)")
        self._require("max_response_length", self.max_response_length >= 1, ">= 1")
        self._require("repetition_penalty", self.repetition_penalty > 0, "> 0 (1: no penalty)")
        for name in ("ban_token_ids", "stop_token_ids"):
            self._require(name, all(token >= 0 for token in getattr(self, name)), "token ids >= 0")
        self._require(
            "stop_token_sequences",
            all(s and min(s) >= 0 for s in self.stop_token_sequences),
            "sequences of at least one token id >= 0",
        )
        self._require(
            "stop_strings",
            all(s and "\ufffd" not in s for s in self.stop_strings),
            "strings of at least one character, none of them U+FFFD (a character cut in two)",
        )
        self._check_bans()

    def _check_bans(self) -> None:
        for sequence in self.stop_token_sequences:
            banned = [token for token in sequence if token in self.ban_token_ids]
            if banned:
                raise ValueError(
                    f"{type(self).__name__}.ban_token_ids={self.ban_token_ids}: token {banned[0]} "
                    f"is part of the stop sequence {sequence}, which could never be drawn: take it "
                    "off one of the lists"
                )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(
                f"{type(self).__name__}.{name}={getattr(self, name)!r}: it must be {allowed}"
            )


@dataclass
class FlatSettings(SamplingSettings):
    """Independent responses from one prompt (GRPO)."""

    n: int = 16  # responses a prompt

    def __post_init__(self) -> None:
        SamplingSettings.__post_init__(self)
        self._require("n", self.n >= 1, ">= 1")


@dataclass
class TreePOSettings(SamplingSettings):
    """Segment-wise tree sampling (TreePO, arXiv 2508.17445, section 2)."""

    max_response_length: int = 7168  # tokens below the prompt; the last segment is cut to fit
    n: int = 16  # w: leaves (responses) a prompt
    segment_length: int = 512  # l: tokens between two branching points
    max_depth: int = 14  # d: segments of a path at most
    initial_divergence_min: int = 2  # paths that leave the prompt: uniform per prompt between
    initial_divergence_max: int = 2  # these two, both included; equal values fix it
    branching: str = "even"  # how the budget of a level is shared among its active paths
    fallback: str = "random_segment"  # where to go on when all paths ended early, or 'none'
    # 'eos': a path ends at a stop token. 'boxed_and_eos': the same, and a leaf that holds an answer
    # is recorded as 'answer'. 'boxed_as_eos': an answer ends the path with its segment.
    finish: str = "eos"
    # where the finish policy looks for an answer, in the whole response; any one suffices:
    # token sequences, one of which an answer always contains (such as those of "</answer>")
    answer_token_ids: list[list[int]] = field(default_factory=list)
    answer_detector: str = ""  # your own 'module:function' of the response's token ids -> bool
    answer_tokenizer: str = ""  # tokenizer (folder or Hub name): look for \boxed{...} in the text
    repetition_ngram: int = 16  # a path ends when so many tokens in a row ...
    repetition_count: int = 8  # ... occur so many times without overlap; 0: never

    def __post_init__(self) -> None:
        SamplingSettings.__post_init__(self)
        for name in ("n", "segment_length", "max_depth", "initial_divergence_min"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        self._require("repetition_ngram", self.repetition_ngram >= 1, ">= 1")
        self._require(
            "repetition_count",
            self.repetition_count == 0 or self.repetition_count >= 2,
            "0 (never) or >= 2",
        )
        self._require("finish", self.finish in FINISH_POLICIES, f"one of {FINISH_POLICIES}")
        BRANCHINGS.check(self.branching)
        if self.fallback != NO_FALLBACK:
            FALLBACKS.check(self.fallback)
        self._check_lengths()
        self._check_divergence()
        self._check_answer()

    def _check_lengths(self) -> None:
        self._require(
            "segment_length",
            self.segment_length <= self.max_response_length,
            f"<= max_response_length={self.max_response_length}",
        )
        reach = self.segment_length * self.max_depth
        if reach < self.max_response_length:
            depth = -(-self.max_response_length // self.segment_length)
            raise ValueError(
                f"segment_length={self.segment_length} x max_depth={self.max_depth} ends every "
                f"response at {reach} tokens, before max_response_length="
                f"{self.max_response_length}: set max_depth={depth}, longer segments, or "
                f"max_response_length={reach}"
            )

    def _check_divergence(self) -> None:
        low, high = self.initial_divergence_min, self.initial_divergence_max
        if not low <= high <= self.n:
            raise ValueError(
                f"initial_divergence_min={low} and initial_divergence_max={high} must satisfy "
                f"min <= max <= n={self.n}: lower initial_divergence_max or raise n"
            )

    def _check_answer(self) -> None:
        self._require(
            "answer_token_ids", all(map(len, self.answer_token_ids)), "sequences of >= 1 tokens"
        )
        sources = [
            name
            for name in ("answer_token_ids", "answer_detector", "answer_tokenizer")
            if getattr(self, name)
        ]
        if self.finish == "eos" and sources:
            raise ValueError(
                f"{' and '.join(sources)} would not be used with finish='eos': choose "
                "finish='boxed_and_eos' or 'boxed_as_eos', or leave them out"
            )
