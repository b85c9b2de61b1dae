"""The trainers' room: forward and backward over token trees, once for every shared token.

Names are loaded on first use, so that settings can be parsed without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "LearnerSettings": "trainers.settings",
    "OptimizerSettings": "trainers.settings",
    "PolicyLossSettings": "trainers.settings",
    "has_traits": "trainers.settings",
    "PackedBatch": "trainers.batch",
    "TokenTree": "trainers.batch",
    "pack": "trainers.packing",
    "Learner": "trainers.learner",
    "POLICY_LOSSES": "trainers.losses",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
