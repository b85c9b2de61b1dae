"""The reference of a KL penalty: the same numbers wherever it is kept."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from rank_program import LORA, drawn_trees
from token_trees import save_tiny_model

from trainers.learner import Learner
from trainers.packing import pack
from trainers.reference import Reference
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings
from trainers.worker import LearnerWorker, ReferenceWorker

KL = PolicyLossSettings(name="gspo", kl_loss_coef=0.4, kl_loss_type="k2")
FAST = OptimizerSettings(lr=1e-2)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2")


def settings_of(dtype, **changes):
    settings = LearnerSettings(optimizer=FAST, policy_loss=KL, **changes)
    settings.dtype = dtype  # float64 is no choice of users'
    return settings


def rows_of(trees):
    return pack(trees, 200, 1)[0]


def updates_with(model_path, settings):
    """Metrics of two steps of two updates each, and the weights after them."""
    learner = Learner(model_path, settings)
    rows = rows_of(drawn_trees(5))
    assert len(rows) > 1
    steps = [[rows[:1], rows[1:]], [rows, rows[1:]]]
    metrics = []
    for step in steps:
        said = Reference(model_path, settings).logprobs(step)
        metrics.append(learner.update(step, said if settings.reference == "actor" else None))
    return metrics, learner.state_tensors()


def test_own_copy_other_process_and_switched_off_adapters_give_equal_losses_in_float64(
    model_path, monkeypatch
):
    # DeepSpeed reduces such gradients, but does not count them among those it knows.
    accelerator = deepspeed.accelerator.get_accelerator()
    dtypes = [*accelerator.supported_dtypes(), torch.float64]
    monkeypatch.setattr(accelerator, "supported_dtypes", lambda: dtypes)
    found = {
        reference: updates_with(model_path, settings_of("float64", reference=reference, lora=LORA))
        for reference in ("own", "actor", "lora_off")
    }
    metrics, weights = found["own"]
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float64}
    assert metrics[1]["actor/kl_loss"] > 1e-3  # the policy has left the reference
    for reference in ("actor", "lora_off"):
        others, other_weights = found[reference]
        for own, other in zip(metrics, others, strict=True):
            assert other == pytest.approx(own, rel=1e-12, abs=1e-14), reference
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_adapters_another_process_says_what_the_own_copy_says(model_path, dtype):
    own, own_weights = updates_with(model_path, settings_of(dtype))
    other, other_weights = updates_with(model_path, settings_of(dtype, reference="actor"))
    assert own == other and own[1]["actor/kl_loss"] > 0
    assert all(torch.equal(own_weights[name], other_weights[name]) for name in own_weights)


def test_only_the_own_copy_takes_memory_of_the_learner(model_path):
    held = {
        name: Learner(model_path, settings_of("float32", reference=name, lora=LORA)).reference
        for name in ("own", "actor", "lora_off")
    }
    assert held["own"] is not None and held["actor"] is None and held["lora_off"] is None


def test_a_reference_knows_whether_it_is_the_learner_s_first_model(model_path, tmp_path):
    settings = settings_of("float32", reference="actor")
    learner, reference = LearnerWorker(), ReferenceWorker()
    learner.setup(None, model_path, settings)
    reference.setup(model_path, settings)
    rows = [rows_of(drawn_trees(2))]
    learner.update(rows, reference.logprobs(rows))
    assert reference.digest() == learner.initial_digest() != learner.digest()
    changed = ReferenceWorker()
    changed.setup(save_tiny_model(tmp_path, "qwen3"), settings)
    assert changed.digest() != learner.initial_digest()


@pytest.mark.parametrize("reference", ["actor", "lora_off"])
def test_a_place_for_the_reference_needs_a_penalty(reference):
    message = f"reference='{reference}' is not used with .*kl_loss_coef"
    with pytest.raises(ValueError, match=message):
        LearnerSettings(reference=reference, lora=LORA)
