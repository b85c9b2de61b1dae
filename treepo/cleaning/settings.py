"""Thresholds of the cleaning rules, and their names; the standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from treepo.base.registry import Registry
from treepo.base.typed import check_types

# name -> `rule(problems, settings) -> one outcome a problem`, in the order in which they are run by
# default: first what models said of the problems as they were read, then answers are shortened, so
# that the rules of questions, which may give them others, know them; then rules of answers.
_WHERE = {
    "mastered": "treepo.cleaning.evidence:mastered",
    "contradicted": "treepo.cleaning.evidence:contradicted",
    "shorten_answer": "treepo.cleaning.answers:shorten_answer",
    "multi_part": "treepo.cleaning.multi_part:multi_part",
    "multiple_choice": "treepo.cleaning.multiple_choice:multiple_choice",
    "proof": "treepo.cleaning.statements:proof",
    "true_false": "treepo.cleaning.statements:true_false",
    "matrix_answer": "treepo.cleaning.answers:matrix_answer",
    "long_answer": "treepo.cleaning.answers:long_answer",
    "exact_duplicate": "treepo.cleaning.duplicates:exact_duplicate",
    "near_duplicate": "treepo.cleaning.duplicates:near_duplicate",
}
RULES: Registry[Any] = Registry("cleaning rule", _WHERE)
NEED_FILES = ("mastered", "contradicted")  # so they are not run unless they are asked for
DEFAULT_RULES = tuple(name for name in _WHERE if name not in NEED_FILES)
ON_CONFLICT = ("drop_all", "keep_first")


class _Checked:
    """Settings that check their types and ranges."""

    def __post_init__(self) -> None:
        check_types(self, "cleaning setting ")

    def _require(self, field_name: str, ok: bool, allowed: str) -> None:
        if not ok:
            value = getattr(self, field_name)
            raise ValueError(f"cleaning setting {field_name}={value!r}: it must be {allowed}")


@dataclass
class MultipleChoice(_Checked):
    """Options become a short answer."""

    min_options: int = 3  # so many lettered options make a question a multiple-choice one

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require("min_options", self.min_options >= 2, ">= 2")


@dataclass
class MultiPart(_Checked):
    """Questions that ask for several answers."""

    min_parts: int = 2  # so many lettered or numbered parts that each ask for something
    max_questions: int = 2  # more question marks than these are too many; 0: they are not counted

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require("min_parts", self.min_parts >= 2, ">= 2")
        self._require("max_questions", self.max_questions >= 0, ">= 0 (0: not counted)")


@dataclass
class LongAnswer(_Checked):
    """Answers that a verifier cannot be trusted with."""

    max_characters: int = 100
    max_words: int = 8  # words of language; LaTeX commands and single letters are none

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require("max_characters", self.max_characters >= 1, ">= 1")
        self._require("max_words", self.max_words >= 0, ">= 0")


@dataclass
class Mastered(_Checked):
    """Problems that the model to start from always solves."""

    # samples.jsonl of python -m treepo.evaluate on the same data files
    samples: list[str] = field(default_factory=list)
    pass_rate_column: str = ""  # or a column with the share solved, e.g. extra_info.pass_rate
    min_samples: int = 4  # judged responses that a problem needs before it may be dropped
    max_pass_rate: float = 1.0  # at this share or above the problem is dropped

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require("min_samples", self.min_samples >= 1, ">= 1")
        self._require("max_pass_rate", 0 < self.max_pass_rate <= 1, "in (0, 1]")
        if self.samples and self.pass_rate_column:
            raise ValueError(
                "cleaning settings mastered.samples and mastered.pass_rate_column are both set: "
                "the share solved comes from one of them"
            )


@dataclass
class Contradicted(_Checked):
    """References that strong models agree to be wrong."""

    # jsonl of model answers: problem_id, answer, and model (else the file is one model); an
    # evaluation's samples.jsonl will do
    answers: list[str] = field(default_factory=list)
    min_models: int = 2  # models with an answer that it takes
    min_agreement: float = 1.0  # share of them that must name the same answer

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require("min_models", self.min_models >= 1, ">= 1")
        self._require("min_agreement", 0.5 < self.min_agreement <= 1, "in (0.5, 1]")


@dataclass
class Duplicates(_Checked):
    """Questions that come again."""

    # where their answers differ: drop_all of them, as none can be trusted, or keep_first
    on_conflict: str = "drop_all"

    def __post_init__(self) -> None:
        _Checked.__post_init__(self)
        self._require(
            "on_conflict", self.on_conflict in ON_CONFLICT, f"one of {', '.join(ON_CONFLICT)}"
        )


@dataclass
class RuleSettings:
    """What the rules are told; a rule of your own gets all of it."""

    multiple_choice: MultipleChoice = field(default_factory=MultipleChoice)
    multi_part: MultiPart = field(default_factory=MultiPart)
    long_answer: LongAnswer = field(default_factory=LongAnswer)
    mastered: Mastered = field(default_factory=Mastered)
    contradicted: Contradicted = field(default_factory=Contradicted)
    duplicates: Duplicates = field(default_factory=Duplicates)


def check_rules(rules: list[str], settings: RuleSettings) -> None:
    """
    Raises:
        ValueError: no rule, an unknown one, one twice, or one without the files it needs.
    """
    if not rules:
        raise ValueError(f"rules is empty: choose from {', '.join(_WHERE)}")
    for rule in rules:
        RULES.check(rule)
        if rules.count(rule) > 1:
            raise ValueError(f"rules names {rule!r} twice")
    mastered, contradicted = settings.mastered, settings.contradicted
    told = {
        "mastered": (
            bool(mastered.samples or mastered.pass_rate_column),
            "settings.mastered.samples or settings.mastered.pass_rate_column",
        ),
        "contradicted": (bool(contradicted.answers), "settings.contradicted.answers"),
    }
    for rule, (is_told, key) in told.items():
        if rule in rules and not is_told:
            raise ValueError(f"rules names {rule!r}, which needs {key}: give it, or leave it out")
        if rule not in rules and is_told:
            raise ValueError(f"{key} is given, but rules does not name {rule!r}: add it to rules")
