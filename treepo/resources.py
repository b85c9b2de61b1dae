"""Whether there are processors and GPUs enough for the workers. No Ray in here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treepo.config import ClusterConfig


def check_resources(config: ClusterConfig, available: dict[str, float]) -> None:
    """Compare what the workers need with what there is.

    Args:
        available: ``{"CPU": ..., "GPU": ...}`` of the machine or the Ray cluster.

    Raises:
        ValueError: not enough of something; says how much is missing and what to lower.
    """
    for kind in ("CPU", "GPU"):
        a_worker, a_rank, a_reference = _each(config, kind)
        need = needed(config, kind, in_turns=config.colocate)
        have = available.get(kind, 0.0)
        if need > have:
            where = f"the Ray cluster at {config.address}" if config.address else "this machine"
            together = "taking turns" if config.colocate else "at the same time"
            raise ValueError(
                f"not enough {kind}s: "
                f"cluster.num_rollout_workers={config.num_rollout_workers} x {a_worker:g} and "
                f"cluster.num_learner_ranks={config.num_learner_ranks} x {a_rank:g}, {together}, "
                f"{_and_references(config, a_reference)}"
                f"need {need:g}, but {where} has {have:g}; {need - have:g} missing. "
                "Lower the numbers or set cluster.address to a larger Ray cluster"
            )


def needed(config: ClusterConfig, kind: str, *, in_turns: bool) -> float:
    """How much of ``kind`` ('CPU' or 'GPU') all workers take together.

    Args:
        in_turns: rollout workers and learner ranks use the same.
    """
    a_worker, a_rank, a_reference = _each(config, kind)
    rollout, learner = a_worker * config.num_rollout_workers, a_rank * config.num_learner_ranks
    together = max(rollout, learner) if in_turns else rollout + learner
    return together + a_reference * config.num_reference_workers


def _each(config: ClusterConfig, kind: str) -> list[float]:
    workers = ("rollout_worker", "learner_rank", "reference_worker")
    return [getattr(config, f"{kind.lower()}s_per_{worker}") for worker in workers]


def _and_references(config: ClusterConfig, each: float) -> str:
    count = config.num_reference_workers
    return f"and cluster.num_reference_workers={count} x {each:g} " if count else ""


def local_resources() -> dict[str, float]:
    """Processors and GPUs of this machine that this process may use."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
