"""What the sampling strategies can be told: plain dataclasses, checked when they are built."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field

from rollout.sampling_settings import (
    PENALTIES_ALLOWED,
    STOP_STRINGS_ALLOWED,
    TEMPERATURES_ALLOWED,
    are_stop_strings,
    is_penalty,
    is_temperature,
)
from rollout.strategies.rule_settings import (
    BRANCHING_SCHEDULES,
    BRANCHING_SCORES,
    BRANCHINGS,
    BUDGETS,
    FALLBACK_CUTS,
    FALLBACKS,
    PAPER_TEMPERATURES,
    SOFTMAX_BLOCK,
)
from treepo.base.registry import check_spec
from treepo.base.typed import check_types

FINISH_POLICIES = ("eos", "boxed_and_eos", "boxed_as_eos")
ANSWER_SOURCES = ("answer_token_ids", "answer_detector", "answer_tokenizer")
NO_FALLBACK = "none"
_BLOCK_CUTS = ("block_softmax", "block_softmax_inverse", "misaligned")


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
        check_types(self, "rollout.")
        self._require("temperature", is_temperature(self.temperature), TEMPERATURES_ALLOWED)
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)")
        self._require("top_k", self.top_k >= 0, ">= 0 (0 keeps all tokens)")
        self._require("min_p", 0 <= self.min_p < 1, "in [0, 1) (0 drops no token)")
        self._require("max_response_length", self.max_response_length >= 1, ">= 1")
        mild = is_penalty(self.repetition_penalty)
        self._require("repetition_penalty", mild, PENALTIES_ALLOWED)
        for name in ("ban_token_ids", "stop_token_ids"):
            self._require(name, all(token >= 0 for token in getattr(self, name)), "token ids >= 0")
        self._require(
            "stop_token_sequences",
            all(s and min(s) >= 0 for s in self.stop_token_sequences),
            "sequences of at least one token id >= 0",
        )
        self._require("stop_strings", are_stop_strings(self.stop_strings), STOP_STRINGS_ALLOWED)
        self._check_bans()

    def _check_bans(self) -> None:
        for sequence in self.stop_token_sequences:
            banned = [token for token in sequence if token in self.ban_token_ids]
            if banned:
                raise ValueError(
                    f"rollout.ban_token_ids={self.ban_token_ids}: token {banned[0]} "
                    f"is part of the stop sequence {sequence}, which could never be drawn: take it "
                    "off one of the lists"
                )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"rollout.{name}={getattr(self, name)!r}: it must be {allowed}")


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
    # how the budget of a level is shared among its active paths: even, low_logprob, high_logprob or
    # entropy (improbable, probable or uncertain paths get more)
    branching: str = "even"
    # of low_logprob and high_logprob: last_segment (mean over it), mean (over the response) or
    # cumulative
    branching_score: str = "last_segment"
    # temperature of all but even over the levels: constant [T], linear [first, last] or sinusoidal
    # [ends, middle]; empty: the paper's, [2], [5, 1] and [0.5, 10]
    branching_schedule: str = "constant"
    branching_temperature: list[float] = field(default_factory=list)
    # what limits the paths: width (n alone), level_tokens (budget_tokens a level) or
    # response_tokens (budget_tokens for all responses, of which there are at least budget_min_n)
    budget: str = "width"
    budget_tokens: int = 0
    budget_min_n: int = 1
    # which ended responses go on when all paths ended early: random, finished_first, longer_first
    # or none
    fallback: str = "random"
    # where they are cut: segment (a random border), from_start, lowest_logprob, block_softmax,
    # block_softmax_inverse or misaligned (multiples of a block)
    fallback_cut: str = "segment"
    fallback_block_length: int = 0  # tokens; 0: 128, or half a segment for misaligned
    # 'eos': a path ends at a stop token. 'boxed_and_eos': the same, and a leaf that holds an answer
    # is recorded as 'answer'. 'boxed_as_eos': an answer ends the path with its segment.
    finish: str = "eos"
    # where the finish policy looks for an answer, in the whole response; any one suffices, and
    # without any, training looks for \boxed{...} in the text of the model's own tokenizer:
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
        self._check_lengths()
        self._check_divergence()
        self._check_branching()
        self._check_budget()
        self._check_fallback()
        self._check_answer()

    def block_length(self) -> int:
        """Tokens of a block of the fallback's cut."""
        if self.fallback_block_length:
            return self.fallback_block_length
        if self.fallback_cut == "misaligned":
            return max(1, self.segment_length // 2)
        # Shorter trees have shorter blocks: one block alone would be a restart.
        return min(SOFTMAX_BLOCK, self.segment_length)

    def _check_lengths(self) -> None:
        self._require(
            "segment_length",
            self.segment_length <= self.max_response_length,
            f"<= rollout.max_response_length={self.max_response_length}",
        )
        reach = self.segment_length * self.max_depth
        if reach < self.max_response_length:
            depth = -(-self.max_response_length // self.segment_length)
            raise ValueError(
                f"rollout.segment_length={self.segment_length} x rollout.max_depth="
                f"{self.max_depth} ends every response at {reach} tokens, before "
                f"rollout.max_response_length={self.max_response_length}: set "
                f"rollout.max_depth={depth}, longer segments, or "
                f"rollout.max_response_length={reach}"
            )

    def _check_divergence(self) -> None:
        low, high = self.initial_divergence_min, self.initial_divergence_max
        if not low <= high <= self.n:
            raise ValueError(
                f"rollout.initial_divergence_min={low} and rollout.initial_divergence_max={high} "
                f"must satisfy min <= max <= rollout.n={self.n}: lower "
                "rollout.initial_divergence_max or raise rollout.n"
            )

    def _check_branching(self) -> None:
        BRANCHINGS.check(self.branching)
        BRANCHING_SCORES.check(self.branching_score)
        BRANCHING_SCHEDULES.check(self.branching_schedule)
        if self.branching in ("even", "entropy"):
            self._unused(
                ["branching_score"], f"rollout.branching={self.branching!r}",
                "rollout.branching=low_logprob or high_logprob",
            )  # fmt: skip
        if self.branching == "even":
            self._unused(
                ["branching_schedule", "branching_temperature"], "rollout.branching='even'",
                "rollout.branching=low_logprob, high_logprob or entropy",
            )  # fmt: skip
        self._require(
            "branching_temperature", all(t > 0 for t in self.branching_temperature), "> 0"
        )
        papers = PAPER_TEMPERATURES.get(self.branching_schedule)
        if papers and self.branching_temperature:
            self._require(
                "branching_temperature",
                len(self.branching_temperature) == len(papers),
                f"{len(papers)} numbers for rollout.branching_schedule="
                f"{self.branching_schedule!r}, such as {papers} "
                "(linear takes [first, last], sinusoidal [ends, middle])",
            )

    def _check_budget(self) -> None:
        BUDGETS.check(self.budget)
        self._require("budget_tokens", self.budget_tokens >= 0, ">= 0")
        self._require("budget_min_n", 1 <= self.budget_min_n <= self.n, f"in 1..rollout.n={self.n}")
        if self.budget == "width":
            self._unused(
                ["budget_tokens", "budget_min_n"], "rollout.budget='width'",
                "rollout.budget=level_tokens or response_tokens",
            )  # fmt: skip
        elif self.budget == "level_tokens":
            self._unused(
                ["budget_min_n"], "rollout.budget='level_tokens'", "rollout.budget=response_tokens"
            )
            first = self.segment_length * self.initial_divergence_max
            self._require(
                "budget_tokens", self.budget_tokens >= first,
                f">= {first} for rollout.budget='level_tokens': a segment for each of "
                f"rollout.initial_divergence_max={self.initial_divergence_max} paths",
            )  # fmt: skip
        elif self.budget == "response_tokens":
            self._require(
                "budget_tokens", self.budget_tokens >= 1,
                ">= 1 for rollout.budget='response_tokens'",
            )  # fmt: skip

    def _check_fallback(self) -> None:
        self._require("fallback_block_length", self.fallback_block_length >= 0, ">= 0")
        FALLBACK_CUTS.check(self.fallback_cut)
        if self.fallback == NO_FALLBACK:
            self._unused(
                ["fallback_cut", "fallback_block_length"], "rollout.fallback='none'",
                f"rollout.fallback={', '.join(FALLBACKS)}",
            )  # fmt: skip
            return
        FALLBACKS.check(self.fallback, besides=[NO_FALLBACK])
        if self.fallback_cut not in _BLOCK_CUTS:
            if self.fallback_cut in FALLBACK_CUTS:
                self._unused(
                    ["fallback_block_length"], f"rollout.fallback_cut={self.fallback_cut!r}",
                    f"rollout.fallback_cut={', '.join(_BLOCK_CUTS)}",
                )  # fmt: skip
            return
        block = self.block_length()
        if block >= self.max_response_length:
            raise ValueError(
                f"rollout.fallback_block_length={block} is not less than "
                f"rollout.max_response_length={self.max_response_length}: every cut would be at "
                "the prompt; choose shorter blocks, or "
                "rollout.fallback_cut=from_start if that is what you want"
            )
        if self.fallback_cut == "misaligned" and block % self.segment_length == 0:
            raise ValueError(
                f"rollout.fallback_block_length={block} is a multiple of rollout.segment_length="
                f"{self.segment_length}: these cuts are not misaligned; choose another block, or "
                "rollout.fallback_cut=segment"
            )

    def _unused(self, names: list[str], choice: str, better: str) -> None:
        """Refuse settings that differ from their defaults but are not used with ``choice``."""
        for name in names:
            default = TreePOSettings.__dataclass_fields__[name]
            plain = [] if default.default is MISSING else default.default
            if getattr(self, name) != plain:
                raise ValueError(
                    f"rollout.{name}={getattr(self, name)!r} would not be used with {choice}: "
                    f"choose {better}, or leave it out"
                )

    def _check_answer(self) -> None:
        self._require(
            "answer_token_ids", all(map(len, self.answer_token_ids)), "sequences of >= 1 tokens"
        )
        if self.answer_detector:
            check_spec(self.answer_detector, kind="rollout.answer_detector")
        sources = [f"rollout.{name}" for name in ANSWER_SOURCES if getattr(self, name)]
        if self.finish == "eos" and sources:
            raise ValueError(
                f"{' and '.join(sources)} would not be used with rollout.finish='eos': choose "
                "rollout.finish=boxed_and_eos or boxed_as_eos, or leave them out"
            )

    @property
    def lacks_answer_source(self) -> bool:
        """Whether the finish policy needs to see answers and nothing says how."""
        return self.finish != "eos" and not any(getattr(self, name) for name in ANSWER_SOURCES)
