"""Every publication of weights is proved, on either road: sabotage on the way, or in an engine, is
caught.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from rollout.settings import EngineSettings
from rollout.strategies.settings import FlatSettings
from rollout.weights import WeightLoad
from rollout.worker import RolloutWorker
from trainers.settings import LearnerSettings
from trainers.weight_sync import WeightSyncError
from trainers.worker import LearnerWorker
from treepo.sync import publish_weights

GOLDEN = [np.array([5, 6, 7, 8, 9, 10], np.int32), np.array([40, 41, 42], np.int32)]
UP, GATE = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"


class InProcess:
    """The cluster's calls on real workers in this process."""

    def __init__(self, model_path: str) -> None:
        self.learner = LearnerWorker()
        self.learner.setup(None, model_path, LearnerSettings(num_threads=1))
        self.engine = RolloutWorker(0)
        self.engine.setup(model_path, EngineSettings(num_kv_slots=512))
        self.transport = "object_store"
        self.tamper: Any = lambda arrays: arrays
        self._threads = ThreadPoolExecutor(2)

    def transfer_weights(self, version: int, dtype: str) -> tuple[dict, list[dict]]:
        if self.transport == "object_store":
            manifest, digests, arrays = self.learner.publication(dtype)
            return digests, [self.engine.load_weights(version, manifest, self.tamper(arrays))]
        members = ["learner rank 0", "rollout worker 0"]
        address = self.learner.open_weight_group(10.0)
        joined = self._threads.submit(self.learner.join_weight_group, members, 10.0)
        self.engine.join_weight_group(address, members, 10.0)
        joined.result()
        sent = self._threads.submit(self.learner.send_weights, version, dtype)
        found = self.engine.receive_weights(version)
        return sent.result(), [found]

    def on_learners(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self.learner, method)(*arguments)]

    def on_rollout(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self.engine, method)(*arguments)]

    def move_weights(self) -> None:
        """What an update does, in short: the learner's weights change."""
        with torch.no_grad():
            for parameter in self.learner.learner.policy.model.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def workers(tiny_model_path):
    torch.manual_seed(0)
    # Not closed: DeepSpeed keeps its groups for the life of the process, and other tests use them.
    return InProcess(str(tiny_model_path))


@pytest.fixture(params=["object_store", "group"])
def cluster(workers, request):
    workers.transport, workers.tamper = request.param, lambda arrays: arrays
    workers.move_weights()
    workers.base = workers.engine.policy_version()  # versions never fall: tests count from here
    return workers


def publish(cluster, version: int) -> dict[str, float]:
    return publish_weights(cluster, cluster.base + version, "float32", GOLDEN)


def assert_refuses_work(cluster, version: int) -> None:
    with pytest.raises(ValueError, match="refuses work"):
        cluster.engine.sample([], "flat", FlatSettings(), cluster.base + version)


def change_parts(monkeypatch, change) -> None:
    """Every part of a weight set is ``change``d just before it is stored."""
    put = WeightLoad.put
    monkeypatch.setattr(WeightLoad, "put", lambda load, part: put(load, change(part)))


def test_an_honest_publication_passes_and_puts_the_version_in_force(cluster):
    assert publish(cluster, 1)["sync/golden_logprob_diff_max"] < 1e-4
    assert cluster.engine.policy_version() == cluster.base + 1
    trees, _ = cluster.engine.sample([], "flat", FlatSettings(), cluster.base + 1)
    assert trees == []


def test_a_bit_flipped_on_the_way_is_caught_and_the_engine_refuses_work(cluster, monkeypatch):
    def flip(part):
        values = part.values.clone()
        if part.name == UP:
            values.view(torch.uint8)[5] ^= 1
        return part._replace(values=values)

    change_parts(monkeypatch, flip)
    with pytest.raises(WeightSyncError, match=f"rollout worker 0.*other bytes in {UP}$"):
        publish(cluster, 2)
    assert_refuses_work(cluster, 2)


def test_two_tensors_of_one_shape_that_are_swapped_on_the_way_are_caught(cluster, monkeypatch):
    names = {UP: GATE, GATE: UP}
    change_parts(monkeypatch, lambda part: part._replace(name=names.get(part.name, part.name)))
    with pytest.raises(WeightSyncError, match="other bytes in .*gate_proj.*up_proj"):
        publish(cluster, 3)
    assert_refuses_work(cluster, 3)


@pytest.mark.parametrize("cluster", ["object_store"], indirect=True)  # a group sends one of the two
def test_tied_names_that_come_with_two_values_are_refused(cluster):
    def untie(arrays):
        return {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"] + 1e-3}

    cluster.tamper = untie
    with pytest.raises(ValueError, match="tied but their values differ"):
        publish(cluster, 3)


def test_an_engine_that_missed_the_version_is_caught(cluster, monkeypatch):
    publish(cluster, 4)
    cluster.move_weights()

    def lose(version, manifest, tensors):
        list(tensors)  # taken, and not stored
        return cluster.engine.digests()

    monkeypatch.setattr(cluster.engine._engine, "load_weights", lose)
    with pytest.raises(WeightSyncError, match="other bytes"):
        publish(cluster, 5)
    held, asked = cluster.base + 4, cluster.base + 5
    with pytest.raises(ValueError, match=f"holds weights of version {held}, not {asked}"):
        cluster.engine.sample([], "flat", FlatSettings(), asked)
    assert_refuses_work(cluster, 4)


def test_right_bytes_used_wrongly_are_caught_by_the_golden_sequences(cluster):
    model = cluster.engine._engine.model
    original = model.model.norm.variance_epsilon
    model.model.norm.variance_epsilon = 0.5  # no weight: no checksum sees it
    with pytest.raises(WeightSyncError, match="computes other log-probs"):
        publish(cluster, 6)
    assert_refuses_work(cluster, 6)
    model.model.norm.variance_epsilon = original
    publish(cluster, 7)
