"""Rollout: token trees sampled by an engine whose cache is the tree.

Names are loaded on first use, so that settings can be parsed without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout.drafts import Draft as Draft
    from rollout.drafts import DraftTree as DraftTree
    from rollout.engine import Engine as Engine
    from rollout.extend import ExtendSpec as ExtendSpec
    from rollout.growth import Growth as Growth
    from rollout.growth import GrowthLimits as GrowthLimits
    from rollout.metrics import CostLedger as CostLedger
    from rollout.requests import Completion as Completion
    from rollout.scheduler import generate as generate
    from rollout.scheduler import grow as grow
    from rollout.scoring import Scorer as Scorer
    from rollout.settings import EngineSettings as EngineSettings
    from rollout.store import Node as Node
    from rollout.tree import Segment as Segment
    from rollout.tree import Tree as Tree

_PUBLIC = {
    "Draft": "rollout.drafts",
    "DraftTree": "rollout.drafts",
    "Engine": "rollout.engine",
    "ExtendSpec": "rollout.extend",
    "Growth": "rollout.growth",
    "GrowthLimits": "rollout.growth",
    "CostLedger": "rollout.metrics",
    "Completion": "rollout.requests",
    "generate": "rollout.scheduler",
    "grow": "rollout.scheduler",
    "Scorer": "rollout.scoring",
    "EngineSettings": "rollout.settings",
    "Node": "rollout.store",
    "Segment": "rollout.tree",
    "Tree": "rollout.tree",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
