"""Runs whose reference is kept in different places."""

from __future__ import annotations

import json

import pytest
from training_runs import run

from treepo.cli import compose
from treepo.config import ClusterConfig, TrainConfig
from treepo.resources import check_resources
from treepo.tracking import read_rows


@pytest.mark.long
def test_a_run_is_the_same_wherever_its_reference_is_kept(tmp_path):
    results = {}
    for reference in ("own", "actor", "lora_off"):
        done = run(
            tmp_path / reference,
            "trainer.total_steps=2",
            "trainer.learner.optimizer.lr_warmup_steps=0",
            "trainer.learner.policy_loss.kl_loss_coef=0.1",
            "trainer.learner.lora.rank=4",
            f"trainer.learner.reference={reference}",
            f"cluster.num_reference_workers={int(reference == 'actor')}",
            "cluster.cpus_per_reference_worker=0.5",
            "cluster.cpus_per_learner_rank=0.5",
            "cluster.cpus_per_rollout_worker=0.5",
        )
        assert done.returncode == 0, done.stderr
        folder = (tmp_path / reference / "latest").resolve()
        digest = json.loads((folder / "summary.json").read_text())["digest"]
        losses = [row.get("actor/kl_loss") for row in read_rows(folder / "metrics.jsonl")]
        results[reference] = digest, losses
    assert results["own"] == results["actor"] == results["lora_off"]
    assert results["own"][1][-1] > 0


def test_a_reference_in_a_process_of_its_own_needs_one():
    words = ["+experiment=quickstart", "trainer.learner.policy_loss.kl_loss_coef=0.1"]
    words += ["trainer.learner.reference=actor"]
    with pytest.raises(ValueError, match="num_reference_workers=0: set it to 1 or more"):
        compose("train", TrainConfig, words)
    config = compose("train", TrainConfig, [*words, "cluster.num_reference_workers=1"])
    assert config.cluster.num_reference_workers == 1


def test_references_count_beside_those_who_take_turns():
    config = ClusterConfig(num_reference_workers=2, cpus_per_reference_worker=1.5)
    check_resources(config, {"CPU": 4.0})
    with pytest.raises(ValueError, match="num_reference_workers=2 x 1.5 need 4.*has 3; 1 missing"):
        check_resources(config, {"CPU": 3.0})
