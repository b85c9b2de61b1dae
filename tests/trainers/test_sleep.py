"""A sleeping learner gives up all memory, and goes on to the last bit when it wakes."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from rank_program import LORA, drawn_trees
from token_trees import save_tiny_model

from trainers.held_memory import tensors_of_model, tensors_of_optimizer
from trainers.learner import Learner
from trainers.packing import pack
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings
from treepo.base.aside import storages

KL = PolicyLossSettings(kl_loss_coef=0.2)
PATH = np.array([3, 1, 4, 1, 5], np.int32)
CASES = [
    (0, "float32", 0),
    (0, "bfloat16", 0),
    (1, "float32", 0),
    (2, "float32", 0),
    (2, "bfloat16", 3),
    (3, "float32", 0),
    (3, "float32", 3),
    (3, "bfloat16", 0),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


def make_learner(model_path, zero_stage=0, dtype="float32", rank=0):
    settings = LearnerSettings(
        zero_stage=zero_stage, dtype=dtype, optimizer=OptimizerSettings(lr=1e-2), policy_loss=KL
    )
    settings.lora = LORA if rank else settings.lora
    learner = Learner(model_path, settings)
    # On a CPU weights may lie in the map of their file, which cannot be given up; on a GPU never.
    for model in (learner.policy, learner.reference):
        for parameter in model.parameters():
            if not parameter.untyped_storage().resizable():
                parameter.data = parameter.data.clone()
    return learner


def rows():
    return pack(drawn_trees(3), 200, 1)[0]


def live_storages():
    """Memory of all tensors of this process that Python knows, by storage."""
    gc.collect()
    every = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    there = [t for t in every if t.layout == torch.strided and t.device.type != "meta"]
    storages = [t.untyped_storage() for t in there]
    return {s._cdata: s.nbytes() for s in storages if s.nbytes()}


@pytest.mark.parametrize(("zero_stage", "dtype", "rank"), CASES)
def test_a_learner_that_slept_makes_the_identical_next_update(model_path, zero_stage, dtype, rank):
    learner = make_learner(model_path, zero_stage, dtype, rank)
    other = make_learner(model_path, zero_stage, dtype, rank)
    for one in (learner, other):
        one.update([rows(), rows()])
    digest = learner.digest()
    moved = learner.sleep()
    assert learner.wake() == moved > 0
    assert learner.digest() == digest
    assert learner.update([rows()]) == other.update([rows()])
    assert learner.digest() == other.digest() != digest
    learner.sleep(keep_weights=True)
    learner.sleep()
    learner.wake()
    assert learner.update([rows()]) == other.update([rows()])
    assert learner.digest() == other.digest()


@pytest.mark.parametrize(("zero_stage", "dtype", "rank"), CASES)
def test_all_that_a_learner_holds_is_given_up(model_path, zero_stage, dtype, rank):
    """Against every tensor that Python knows: none is missed, whatever DeepSpeed keeps it in."""
    before = live_storages()
    learner = make_learner(model_path, zero_stage, dtype, rank)
    learner.update([rows()])
    held = {at: size for at, size in live_storages().items() if at not in before}
    moved = learner.sleep()
    # up to counters, such as Adam's number of steps
    assert moved > 10_000 and sum(held.values()) - moved < 200
    copies = {t.untyped_storage()._cdata for put in learner._aside._put for t in put.copy}
    left = [n for at, n in live_storages().items() if at not in before and at not in copies]
    assert sum(left) < 200
    assert learner.wake() == moved


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_with_its_weights_alone_a_learner_publishes_and_scores(model_path, zero_stage):
    learner = make_learner(model_path, zero_stage)
    learner.update([rows()])
    digest, score = learner.digest(), learner.score_paths([PATH])[0]
    moved = learner.sleep(keep_weights=True)
    assert learner.publication("float32").digest == digest == learner.digest()
    assert np.array_equal(learner.score_paths([PATH])[0], score)
    weights = {storage._cdata for storage in storages(tensors_of_model(learner.policy))}
    others = storages(tensors_of_optimizer(learner._engine.optimizer))
    assert {storage._cdata for storage in others} <= weights
    assert moved > 2 * sum(p.numel() for p in learner.policy.parameters()) * 4  # Adam's moments
    with pytest.raises(ValueError, match="asleep"):
        learner.update([rows()])
    assert learner.sleep() > 0  # the weights too
    assert learner.wake() > moved


def test_a_sleeping_learner_says_so(model_path, tmp_path):
    learner = make_learner(model_path)
    learner.save(tmp_path)
    learner.sleep()
    for call in (
        lambda: learner.update([rows()]),
        lambda: learner.score_paths([PATH]),
        lambda: learner.publication("float32"),
        learner.digest,
        lambda: learner.save(tmp_path),
        lambda: learner.load(tmp_path),
        lambda: learner.export_hf(tmp_path),
    ):
        with pytest.raises(ValueError, match="the learner is asleep: call wake"):
            call()
    learner.wake()
    learner.load(tmp_path)
