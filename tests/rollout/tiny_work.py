"""A tiny engine and prompts for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tiny_models import tiny_model

from rollout.engine import Engine
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from treepo.base.keys import root_key


def tiny_engine(**settings) -> Engine:
    """GPT-2 in float64, with room unless ``settings`` say otherwise."""
    settings = {"num_kv_slots": 2048, **settings}
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(**settings))


def numbered(token_ids: Iterable[Sequence[int] | np.ndarray], seed: int) -> list[Prompt]:
    """Prompts p0, p1, ... of these tokens, with root keys of ``seed``."""
    return [
        Prompt(problem_id=f"p{i}", token_ids=np.array(ids, np.int32), root_key=root_key(seed, i))
        for i, ids in enumerate(token_ids)
    ]
