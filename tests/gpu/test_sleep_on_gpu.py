"""Engine and learner on one GPU: what is given up is free for other processes, and comes back."""

from __future__ import annotations

import pytest
import torch
from rank_program import LORA, drawn_trees
from tiny_models import tiny_model
from token_trees import save_tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from trainers.learner import Learner
from trainers.packing import pack
from trainers.settings import LearnerSettings, OptimizerSettings, PolicyLossSettings

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def tokens_of(engine):
    node = engine.prefill([5, 6, 7, 8])
    specs = [(node, ExtendSpec(max_tokens=40), key) for key in range(8)]
    done = sorted(engine.extend(specs), key=lambda completion: completion.request_id)
    return [completion.token_ids.tolist() for completion in done]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["keep", "host"])
def test_an_engine_frees_its_memory_and_serves_the_same_tokens_after(weights, dtype):
    model = tiny_model("qwen3", getattr(torch, dtype)).to("cuda")
    engine = Engine(model, EngineSettings(num_kv_slots=2_000_000, device="cuda", dtype=dtype))
    before, digests = tokens_of(engine), engine.digests()
    held, pool = torch.cuda.memory_allocated(), engine.pool.bytes_per_slot * 2_000_000
    assert pool > 200 * MIB and torch.cuda.memory_reserved() > pool
    moved = engine.sleep(weights)
    assert (moved > 0) is (weights == "host")
    freed = held - torch.cuda.memory_allocated()
    assert freed > pool + 0.95 * moved
    # other processes get it; what libraries work in stays
    assert torch.cuda.memory_reserved() < held - freed + 100 * MIB
    engine.wake()
    assert engine.digests() == digests and tokens_of(engine) == before


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "lora"), [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_a_learner_frees_its_memory_and_goes_on_to_the_last_bit(tmp_path, zero_stage, dtype, lora):
    shape = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    model_path = save_tiny_model(tmp_path, "qwen3", **shape)
    settings = LearnerSettings(
        zero_stage=zero_stage,
        dtype=dtype,
        optimizer=OptimizerSettings(lr=1e-3),
        policy_loss=PolicyLossSettings(kl_loss_coef=0.1),
    )
    settings.lora = LORA if lora else settings.lora
    learner = Learner(model_path, settings)
    rows = pack(drawn_trees(3), 10_000, 1)[0]
    learner.update([rows])
    digest, held = learner.digest(), torch.cuda.memory_allocated()
    weights = sum(t.nbytes for t in learner.state_tensors().values())
    moved = learner.sleep(keep_weights=True)
    assert learner.digest() == digest
    moved += learner.sleep()
    # the reference as well, and all but adapters have an optimiser's state
    assert moved > (1.9 if lora else 3.9) * weights
    assert held - torch.cuda.memory_allocated() > 0.95 * moved
    assert learner.wake() == moved
    assert learner.digest() == digest
    assert learner.update([rows])["actor/num_updates"] == 1
