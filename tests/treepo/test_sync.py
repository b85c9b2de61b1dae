"""Every publication of weights is proved: sabotage on the way, or in an engine, is caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rollout.settings import EngineSettings
from rollout.strategies.settings import FlatSettings
from rollout.worker import RolloutWorker
from trainers.settings import LearnerSettings
from trainers.weight_sync import WeightSyncError
from trainers.worker import LearnerWorker
from treepo.sync import publish_weights

GOLDEN = [np.array([5, 6, 7, 8, 9, 10], np.int32), np.array([40, 41, 42], np.int32)]


class InProcess:
    """The cluster's calls on real workers in this process, with a hand in the middle."""

    def __init__(self, model_path: str) -> None:
        self.learner = LearnerWorker()
        self.learner.setup(None, model_path, LearnerSettings(num_threads=1))
        self.engine = RolloutWorker(0)
        self.engine.setup(model_path, EngineSettings(num_kv_slots=512))
        self.tamper: Any = lambda tensors: tensors
        self.lose_the_load = False

    def publication(self, dtype: str) -> tuple[Any, dict[str, int], dict[str, torch.Tensor]]:
        manifest, digests, tensors = self.learner.publication(dtype)
        return manifest, digests, self.tamper({k: v.clone() for k, v in tensors.items()})

    def on_learners(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self.learner, method)(*arguments)]

    def on_rollout(self, method: str, *arguments: Any) -> list[Any]:
        if method == "load_weights" and self.lose_the_load:
            return [self.engine.digests()]  # an engine that answers without having loaded
        return [getattr(self.engine, method)(*arguments)]

    def move_weights(self) -> None:
        """What an update does, in short: the learner's weights change."""
        with torch.no_grad():
            for parameter in self.learner.learner.policy.model.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def cluster(tiny_model_path):
    torch.manual_seed(0)
    # Not closed: DeepSpeed keeps its groups for the life of the process, and other tests use them.
    return InProcess(str(tiny_model_path))


@pytest.fixture(autouse=True)
def honest(cluster):
    cluster.tamper, cluster.lose_the_load = (lambda tensors: tensors), False


def publish(cluster, version: int) -> dict[str, float]:
    return publish_weights(cluster, version, "float32", GOLDEN)


def test_an_honest_publication_passes_and_puts_the_version_in_force(cluster):
    cluster.move_weights()
    assert publish(cluster, 1)["sync/golden_logprob_diff_max"] < 1e-4
    assert cluster.engine.policy_version() == 1
    trees, _ = cluster.engine.sample([], "flat", FlatSettings(), 1)
    assert trees == []


def flip_a_byte(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[0, 5] ^= 1
    return tensors


def swap_two_of_one_shape(tensors):
    up, gate = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    tensors[up], tensors[gate] = tensors[gate], tensors[up]
    return tensors


@pytest.mark.parametrize("tamper", [flip_a_byte, swap_two_of_one_shape])
def test_bytes_changed_on_the_way_are_caught_and_the_engine_refuses_work(cluster, tamper):
    cluster.move_weights()
    cluster.tamper = tamper
    with pytest.raises(WeightSyncError, match=r"rollout worker 0.*other bytes in model\.layers"):
        publish(cluster, 2)
    with pytest.raises(ValueError, match="refuses work"):
        cluster.engine.sample([], "flat", FlatSettings(), 2)


def test_a_head_that_lost_its_tie_is_caught(cluster):
    cluster.move_weights()

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1e-3
        return tensors

    cluster.tamper = untie
    with pytest.raises(ValueError, match="tied but their values differ"):
        publish(cluster, 3)


def test_an_engine_that_missed_the_version_is_caught(cluster):
    cluster.move_weights()
    publish(cluster, 4)
    cluster.move_weights()
    cluster.lose_the_load = True
    with pytest.raises(WeightSyncError, match="other bytes"):
        publish(cluster, 5)
    with pytest.raises(ValueError, match="holds weights of version 4, not 5"):
        cluster.engine.sample([], "flat", FlatSettings(), 5)


def test_right_bytes_used_wrongly_are_caught_by_the_golden_sequences(cluster):
    cluster.move_weights()
    model = cluster.engine._engine.model
    original = model.model.norm.variance_epsilon
    model.model.norm.variance_epsilon = 0.5  # no weight: no checksum sees it
    with pytest.raises(WeightSyncError, match="computes other log-probs"):
        publish(cluster, 6)
    model.model.norm.variance_epsilon = original
    publish(cluster, 7)
