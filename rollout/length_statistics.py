"""Online statistics of response lengths, and what they say of responses that are not finished.

Lengths vary widely between prompts and between the responses to one prompt, so a guess made once
helps little; what was seen in the run itself helps. Each response that is over is recorded; each
that is put aside is known to be at least as long as what it has drawn (``survival.py``). The
length of a response to be drawn, or to be drawn further, is predicted from

1. the lengths seen of its own prompt: of earlier epochs, and of siblings that finished before it,
2. else the lengths seen of all prompts.

Who has the longest to go is submitted first: of all orders that know no more it is the one that
leaves the fewest slots idle at the end (longest processing time first, Graham 1969).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rollout.survival import SurvivalCurve, product_limit
from rollout.tree import DEPTH, FINISH_REASONS, TRUNCATED

PAUSED = "paused"  # put aside unfinished, or given up
_CENSORED = frozenset({TRUNCATED, DEPTH, PAUSED})


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What is known of one response's length.

    Attributes:
        prompt_id: of the problem.
        policy_version: of the weights that drew its last token.
        sampling: names the sampling settings; lengths under different ones are not compared.
        length: tokens drawn.
        finish_reason: of ``rollout.tree``, or ``PAUSED``.
        cap: tokens that it may draw in all, >= ``length``.
    """

    prompt_id: str
    policy_version: int
    sampling: str
    length: int
    finish_reason: str
    cap: int

    def __post_init__(self) -> None:
        if self.finish_reason not in (*FINISH_REASONS, PAUSED):
            known = ", ".join((*FINISH_REASONS, PAUSED))
            raise ValueError(f"finish_reason={self.finish_reason!r}: must be one of {known}")
        if not 0 <= self.length <= self.cap:
            raise ValueError(f"length={self.length}: must be in 0..cap={self.cap}")

    @property
    def has_ended(self) -> bool:
        """Whether the response came to its own end: else its length is a lower bound."""
        return self.finish_reason not in _CENSORED


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStatistics:
    """The newest observations of responses that are over, oldest first; plain data.

    Attributes:
        capacity: so many are kept: the policy changes, and old lengths with it.
    """

    observations: tuple[Observation, ...] = ()
    capacity: int = 65536

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: must be >= 1")

    def add(self, observations: Iterable[Observation]) -> LengthStatistics:
        """These statistics and further observations. Each response is to be added once, when it is
        over; until then it is given to ``predictor``.
        """
        every = (*self.observations, *observations)
        kept = every[max(0, len(every) - self.capacity) :]
        return LengthStatistics(observations=kept, capacity=self.capacity)

    def predictor(
        self, sampling: str, unfinished: Iterable[Observation] = (), *, since_version: int = 0
    ) -> LengthPredictor:
        """What is known now.

        Args:
            sampling: of the responses to be predicted; others are left out.
            unfinished: of trees that are not over: responses that were put aside, and finished ones
                among their siblings. Those of one prompt are its group.
            since_version: leave out what older weights drew.
        """
        seen = [
            o
            for o in (*self.observations, *unfinished)
            if o.sampling == sampling and o.policy_version >= since_version
        ]
        return LengthPredictor(seen)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [list(asdict(o).values()) for o in self.observations]
        return {"capacity": self.capacity, "columns": list(_COLUMNS), "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LengthStatistics:
        """What :meth:`as_dict` gave.

        Raises:
            ValueError: something else.
        """
        if list(values.get("columns", ())) != list(_COLUMNS):
            raise ValueError(
                f"these are no length statistics: the columns are {values.get('columns')!r}, not "
                f"{', '.join(_COLUMNS)}"
            )
        kept = tuple(Observation(**dict(zip(_COLUMNS, row, strict=True))) for row in values["rows"])
        return cls(observations=kept, capacity=values["capacity"])


_COLUMNS = tuple(Observation.__dataclass_fields__)


class LengthPredictor:
    """Curves of all observations and of each prompt's; a prediction is O(log n)."""

    def __init__(self, observations: Sequence[Observation]) -> None:
        groups: dict[str, list[Observation]] = {}
        for observation in observations:
            groups.setdefault(observation.prompt_id, []).append(observation)
        self._global = _curve(observations)
        self._of_prompt = {
            prompt_id: _curve(group)
            for prompt_id, group in groups.items()
            if any(observation.has_ended for observation in group)
        }

    def expected_remaining(
        self,
        prompt_id: str,
        drawn: Sequence[int] | np.ndarray | int,
        cap: Sequence[int] | np.ndarray | int,
    ) -> np.ndarray:
        """float64, tokens that each response to a prompt is still expected to draw.

        Args:
            drawn: tokens that each has drawn; 0 for one that has not begun.
            cap: tokens that each may draw in all.
        """
        curve = self._of_prompt.get(prompt_id, self._global)
        return curve.expected_remaining(np.asarray(drawn), np.asarray(cap))


def longest_first(expected_tokens: Sequence[float] | np.ndarray) -> np.ndarray:
    """int64 [n], order of submission; equal ones as they come."""
    return np.argsort(-np.asarray(expected_tokens, np.float64), kind="stable")


def relative_error(predicted: Sequence[float], actual: Sequence[float]) -> float:
    """Sum of absolute errors over the sum of what came: 0 is perfect, 1 is no better than
    predicting nothing. NaN where nothing came.
    """
    came = np.asarray(actual, np.float64)
    total = float(np.abs(came).sum())
    error = float(np.abs(np.asarray(predicted, np.float64) - came).sum())
    return error / total if total else float("nan")


def _curve(observations: Sequence[Observation]) -> SurvivalCurve:
    lengths = np.fromiter((o.length for o in observations), np.int64, len(observations))
    ended = np.fromiter((o.has_ended for o in observations), bool, len(observations))
    return product_limit(lengths, ended)
