"""Learning rate as a pure function of the number of optimiser steps already taken."""

from __future__ import annotations

import math

from trainers.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Rate of optimiser step ``step`` (counted from 0).

    It rises linearly over ``lr_warmup_steps`` (the first step has ``lr / lr_warmup_steps``, the
    last of them ``lr``), then stays (constant), or falls to ``lr * min_lr_ratio``, reached at
    ``total_training_steps``, along a line or half a cosine; after that it stays there.
    """
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return settings.lr
    progress = min(1.0, (step - warmup) / (settings.total_training_steps - warmup))
    share = 1 - progress if settings.lr_schedule == "linear" else _half_cosine(progress)
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
