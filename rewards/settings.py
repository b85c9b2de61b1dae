"""The reward section of a run's configuration. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class RewardPartSettings:
    """One part of the reward: ``weight * value`` is added to the score."""

    # a registered part (auto, reasoning_gym, math, exact, format, length), or your own function as
    # 'module:function' or 'path/to/file.py:function'; empty: the part's key in `parts`
    name: str = ""
    # its factor in the score; 0 keeps the part as a metric
    weight: float = 1.0
    # whether it decides if the answer is correct; unset: yes for verifiers and your own functions,
    # no for format and length
    verdict: Optional[bool] = None  # noqa: UP045 (OmegaConf reads this form)
    # keyword options of the part; those of your own function are passed to it by name
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"reward part weight={self.weight}: must be a finite number")


@dataclass
class RewardSettings:
    """How responses are scored, and in what processes."""

    # parts of the reward by label; the label names the part in metrics and is its registered name
    # unless `name` says otherwise; none: auto, the verifier that fits each row's data source
    parts: dict[str, RewardPartSettings] = field(default_factory=dict)
    # a verdict part whose value reaches this calls the answer correct (1 = the verifier's full
    # mark; reasoning-gym gives 0.01 for some wrong answers)
    correct_threshold: float = 0.99
    # processes that score; 0 scores in the calling process, where nothing can be killed: then
    # timeout_seconds must be 0
    num_workers: int = 2
    # seconds that one response may take, all parts together; it is then killed, outcome timeout.
    # 0 = no limit
    timeout_seconds: float = 10.0
    # address space of each scoring process; beyond it the verifier fails, outcome error. 0 = no
    # limit (needed by reward code that uses a GPU)
    memory_limit_mb: int = 4096
    # seconds that loading the verifiers may take at the start
    startup_timeout_seconds: float = 120.0

    def parts_in_force(self) -> dict[str, RewardPartSettings]:
        """``parts``, or the default. Not put into the field itself: a configuration's parts would
        be merged into it, and the default scored beside them.
        """
        return self.parts or {"auto": RewardPartSettings()}

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(
                f"reward.num_workers={self.num_workers}: must be >= 1, or 0 to score in process"
            )
        if not self.timeout_seconds >= 0 or math.isinf(self.timeout_seconds):
            raise ValueError(
                f"reward.timeout_seconds={self.timeout_seconds}: must be > 0, or 0 for no limit"
            )
        if self.num_workers == 0 and self.timeout_seconds > 0:
            raise ValueError(
                f"reward.timeout_seconds={self.timeout_seconds} with reward.num_workers=0: a "
                "verifier in the calling process cannot be stopped; set num_workers >= 1, or "
                "timeout_seconds=0 to say that it may hang"
            )
        if self.memory_limit_mb != 0 and self.memory_limit_mb < 512:
            raise ValueError(
                f"reward.memory_limit_mb={self.memory_limit_mb}: must be >= 512, which the "
                "verifiers themselves may need, or 0 for no limit"
            )
        if not self.startup_timeout_seconds > 0:
            raise ValueError(
                f"reward.startup_timeout_seconds={self.startup_timeout_seconds}: must be > 0"
            )
        if not math.isfinite(self.correct_threshold):
            raise ValueError(
                f"reward.correct_threshold={self.correct_threshold}: must be a finite number"
            )
