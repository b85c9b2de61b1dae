"""Samplers and learners on one device: never both, and the same numbers as if both stayed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from training_runs import run

from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings
from rollout.weights import stored_state
from rollout.worker import RolloutWorker
from trainers.held_memory import tensors_of_model, tensors_of_optimizer
from trainers.packing import pack, path_tree
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings
from trainers.worker import LearnerWorker
from treepo.base.aside import storages
from treepo.cli import compose
from treepo.config import ClusterConfig, TrainConfig
from treepo.tracking import read_rows
from treepo.turns import Turn, Turns

FLAT = FlatSettings(n=3, max_response_length=8)
PROMPT = Prompt(problem_id="p", token_ids=np.array([5, 6, 7], np.int32), root_key=1)


class Pair:
    """A sampler and a learner in this process, in turns or not."""

    def __init__(self, model_path: str, *, in_turns: bool) -> None:
        self.sampler, self.learner = RolloutWorker(0), LearnerWorker()
        self.sampler.setup(model_path, EngineSettings(num_kv_slots=256))
        settings = LearnerSettings(
            optimizer=OptimizerSettings(lr=1e-3),
            policy_loss=PolicyLossSettings(name="nll"),
            num_threads=1,
            zero_stage=1,
        )
        self.learner.setup(None, model_path, settings)
        # On a CPU weights may lie in the map of their file, which cannot be given up.
        for parameter in self.sampler._engine.model.parameters():
            parameter.data = parameter.data.clone()
        self.calls: list[tuple[str, ...]] = []
        self.turns = Turns(self.call("sampler"), self.call("learner")) if in_turns else None
        self.version = 0

    def call(self, side):
        def on_all(method, *arguments):
            self.calls.append((side, method, *map(str, arguments)))
            return [getattr(getattr(self, side), method)(*arguments)]

        return on_all

    def take(self, turn, **options):
        if self.turns is not None:
            self.turns.take(turn, **options)

    def held(self) -> tuple[int, int]:
        """Bytes of weights, keys and values of the sampler, and of all that the learner has."""
        engine, learner = self.sampler._engine, self.learner.learner
        pool = [*engine.pool.keys.values(), *engine.pool.values.values()]
        of_sampler = storages([*stored_state(engine.model).values(), *pool])
        of_learner = tensors_of_model(learner.policy)
        of_learner += tensors_of_optimizer(learner._engine.optimizer)
        return tuple(sum(s.nbytes() for s in found) for found in (of_sampler, storages(of_learner)))

    def publish(self):
        self.version += 1
        self.take(Turn.PUBLISHING)
        # tensors: a numpy view would tie a CPU's memory down, which a GPU's copies don't
        sent = self.learner.learner.publication("float32")
        found = self.sampler.load_weights(self.version, sent.manifest, sent.tensors)
        assert found == sent.digests
        self.during_publication = self.held()
        if self.turns is not None:
            self.turns.take_for_learners("score_paths")
        (reference,) = self.learner.score_paths([PROMPT.token_ids])
        self.take(Turn.SAMPLING)
        (score,) = self.sampler.score_paths([PROMPT.token_ids])
        np.testing.assert_allclose(score[1:], reference, atol=1e-4)
        self.sampler.confirm(self.version)

    def step(self):
        self.take(Turn.SAMPLING)
        (tree,), _ = self.sampler.sample([PROMPT], "flat", FLAT, self.version)
        self.while_sampling = self.held()
        tokens = [segment.token_ids.tolist() for segment in tree.segments]
        self.take(Turn.LEARNING, forget=True)
        ids = torch.tensor([*PROMPT.token_ids.tolist(), *sum(tokens, [])][:20])
        sequence = path_tree(ids)
        sequence.weight[3:] = 1.0
        sequence.leaf_weight.fill_(1.0)
        (rows,) = pack([sequence], 100, 1)
        metrics = self.learner.update([rows])
        self.while_learning = self.held()
        self.publish()
        return tokens, metrics


def test_steps_in_turns_are_those_of_two_that_stay_and_never_are_both_in_memory(tiny_model_path):
    stay = Pair(str(tiny_model_path), in_turns=False)
    turns = Pair(str(tiny_model_path), in_turns=True)
    for pair in (stay, turns):
        pair.publish()
    for _ in range(2):
        assert turns.step() == stay.step()
        # the learner keeps counters, such as Adam's number of steps
        assert turns.while_sampling[0] > 1e6 and turns.while_sampling[1] < 100
        assert turns.while_learning[0] == 0 and turns.while_learning[1] > 4e6
        both = turns.during_publication
        assert 1e6 < both[0] < turns.while_sampling[0]  # weights, no keys and values
        assert 1e6 < both[1] < turns.while_learning[1] / 2  # weights, no moments
        assert min(stay.while_sampling) > 1e6
    assert turns.learner.learner.wake() and turns.learner.digest() == stay.learner.digest()
    metrics = turns.turns.metrics()
    assert metrics["perf/sleep_moved_gib"] > 0.01 and metrics["timing_s/sleep"] > 0
    assert turns.turns.metrics()["perf/sleep_moved_gib"] == 0


class Recorded:
    """Turns over two sides that only write down what they are told."""

    def __init__(self, **options):
        self.told: list[str] = []
        self.turns = Turns(self.side("sampler"), self.side("learner"), **options)

    def side(self, name):
        def call(*words):
            self.told.append(" ".join((name, *map(str, words))))
            return [1]

        return call

    def after(self, action):
        self.told.clear()
        action()
        return self.told.copy()


def test_a_step_moves_each_side_once_and_the_samplers_weights_not_at_all():
    one = Recorded(samplers_sleep=True)
    take = one.turns.take
    assert one.after(lambda: take(Turn.PUBLISHING)) == ["learner sleep True"]
    assert one.after(lambda: one.turns.take_for_learners("score_paths")) == []
    assert one.after(lambda: take(Turn.SAMPLING)) == ["learner sleep False", "sampler wake"]
    assert one.after(lambda: take(Turn.SAMPLING)) == []
    update = one.after(lambda: take(Turn.LEARNING, forget=True))
    assert update == ["sampler sleep drop", "learner wake"]
    assert one.after(lambda: take(Turn.LEARNING)) == []


def test_without_a_publication_to_come_the_samplers_keep_a_copy():
    one = Recorded()
    one.turns.take(Turn.SAMPLING)
    saving = one.after(lambda: one.turns.take_for_learners("save"))
    assert saving == ["sampler sleep host", "learner wake"]
    one.turns.take(Turn.SAMPLING)
    # a publication without an update before it: what the samplers hold is of no use any more
    publishing = one.after(lambda: one.turns.take(Turn.PUBLISHING))
    assert publishing == ["sampler sleep drop", "learner wake", "learner sleep True"]
    # the set has arrived, but is not sampled from
    saving = one.after(lambda: one.turns.take_for_learners("save"))
    assert saving == ["sampler sleep host", "learner wake"]


@pytest.mark.parametrize(
    ("settings", "sleeps"),
    [
        (dict(), False),
        (dict(gpus_per_rollout_worker=1.0), False),
        (dict(gpus_per_rollout_worker=1.0, gpus_per_learner_rank=1.0), True),
        (dict(gpus_per_rollout_worker=1.0, gpus_per_learner_rank=1.0, sleep=False), False),
        (dict(gpus_per_rollout_worker=1.0, gpus_per_learner_rank=1.0, colocate=False), False),
        (dict(sleep=True), True),
    ],
)
def test_sides_sleep_where_they_share_gpus_unless_told_otherwise(settings, sleeps):
    assert ClusterConfig(**settings).sleeps is sleeps


def test_sides_that_work_at_the_same_time_cannot_sleep():
    words = ["+experiment=quickstart", "cluster.sleep=true", "cluster.colocate=false"]
    with pytest.raises(ValueError, match="cluster.sleep=true is for .* that take turns"):
        compose("train", TrainConfig, words)
    segments = "trainer.segments.segment_length=16"
    kept = ["+experiment=quickstart", segments, "cluster.sleep=true", "engine.kv_over_update=keep"]
    with pytest.raises(ValueError, match="keep leaves .* in the pool.*set engine.kv_on_host=true"):
        compose("train", TrainConfig, kept)
    compose("train", TrainConfig, [*kept, "engine.kv_on_host=true"])
    config = compose("train", TrainConfig, ["+experiment=quickstart", "cluster=one_gpu"])
    assert config.cluster.sleeps


@pytest.mark.long
@pytest.mark.parametrize("transport", ["object_store", "group"])
def test_a_run_in_turns_is_the_same_to_the_last_bit(tmp_path, transport):
    results = {}
    for sleep in ("true", "false"):
        done = run(
            tmp_path / sleep,
            "trainer.total_steps=2",
            "trainer.save_freq=1",
            "trainer.learner.optimizer.lr_warmup_steps=0",
            "trainer.learner.zero_stage=2",
            f"cluster.weight_transport={transport}",
            f"cluster.sleep={sleep}",
        )
        assert done.returncode == 0, done.stderr
        folder = (tmp_path / sleep / "latest").resolve()
        summary = json.loads((folder / "summary.json").read_text())
        trees = [file.read_text() for file in sorted((folder / "trees").iterdir())]
        results[sleep] = summary["digest"], summary["after"], trees
        last = read_rows(folder / "metrics.jsonl")[-1]
        assert ("perf/sleep_moved_gib" in last) == (sleep == "true")
    assert results["true"] == results["false"]
    assert last["training/policy_version"] == 2.0
