"""What Ray gives each worker: processors, GPUs, and where sides share GPUs a place."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from treepo.calls import WorkerLost
from treepo.config import ClusterConfig


def reserve_seats(config: ClusterConfig) -> Any:
    """Room for one worker of each side, by number. Ray by itself fills a GPU with two workers of
    one side, which then have the turn together, while another GPU is idle.

    Raises:
        WorkerLost: the Ray cluster does not free it in time.
    """
    room = {
        "CPU": max(config.cpus_per_rollout_worker, config.cpus_per_learner_rank),
        "GPU": max(config.gpus_per_rollout_worker, config.gpus_per_learner_rank),
    }
    count = max(config.num_rollout_workers, config.num_learner_ranks)
    seats = placement_group([room] * count, strategy="PACK")
    if not seats.wait(config.start_timeout_seconds):
        raise WorkerLost(
            f"the Ray cluster did not free {count} x {room} within "
            f"{config.start_timeout_seconds:.0f} s: something else is running on it"
        )
    return seats


def actor_class(worker: type, num_cpus: float, num_gpus: float, seats: Any = None, seat: int = 0):
    """``worker`` as an actor class that gets so much.

    Args:
        seats: reserved ones, of which it takes number ``seat``; None: anywhere.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if seats is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            seats, placement_group_bundle_index=seat
        )
    return ray.remote(worker).options(**options)
