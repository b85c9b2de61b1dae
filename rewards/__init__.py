"""Rewards: text and ground truth in, verdicts out. Nothing here knows tokens, trees or weights.

Public names, loaded when first used: ``RewardPool``, ``RewardSettings``, ``RewardPartSettings``,
``RewardItem``, ``RewardResult``, ``REWARDS``.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "RewardPool": "rewards.pool",
    "RewardSettings": "rewards.settings",
    "RewardPartSettings": "rewards.settings",
    "RewardItem": "rewards.records",
    "RewardResult": "rewards.records",
    "PartResult": "rewards.registry",
    "REWARDS": "rewards.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
