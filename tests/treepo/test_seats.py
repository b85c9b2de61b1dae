"""Who shares a GPU: one worker of each side."""

from __future__ import annotations

import functools

import pytest
import ray

import treepo.cluster
from rollout.settings import EngineSettings
from trainers.settings import LearnerSettings
from treepo.cluster import Cluster
from treepo.config import ClusterConfig


class Seated:
    """A worker that only knows where it is."""

    def __init__(self, rank: int, world_size: int = 1) -> None:
        self.rank = rank

    def setup(self, *arguments) -> None:
        pass

    def rendezvous_address(self) -> str:
        return ""

    def sleep(self, how) -> int:
        return 0

    def wake(self) -> int:
        return 0

    def gpus(self) -> list[int]:
        return ray.get_gpu_ids()


@pytest.mark.long
def test_each_gpu_has_one_sampler_and_one_learner(monkeypatch):
    machine = {"CPU": 3.0, "GPU": 3.0}  # GPUs that Ray only counts
    monkeypatch.setattr(treepo.cluster, "local_resources", lambda: machine)
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_cpus=3, num_gpus=3))
    monkeypatch.setattr(treepo.cluster, "RolloutWorker", Seated)
    monkeypatch.setattr(treepo.cluster, "LearnerWorker", Seated)
    config = ClusterConfig(
        num_rollout_workers=3,
        num_learner_ranks=3,
        gpus_per_rollout_worker=1.0,
        gpus_per_learner_rank=1.0,
    )
    with Cluster(config=config) as cluster:
        cluster.start_rollout("", EngineSettings())
        cluster.start_learners("", LearnerSettings())
        cluster.wait_until_ready()
        samplers, learners = cluster.on_rollout("gpus"), cluster.on_learners("gpus")
    assert samplers == learners
    assert sorted(sum(samplers, [])) == [0, 1, 2]
