"""Sampling strategies: pure state machines that grow token trees.

Names are loaded on first use, so that settings can be parsed without importing anything heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "STRATEGIES": "rollout.strategies.base",
    "Prompt": "rollout.strategies.base",
    "Strategy": "rollout.strategies.base",
    "Flat": "rollout.strategies.flat",
    "FlatSettings": "rollout.strategies.settings",
    "TreePO": "rollout.strategies.treepo",
    "TreePOSettings": "rollout.strategies.settings",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rollout.strategies' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
