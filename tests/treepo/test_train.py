"""One small training run from the command line, and what it must leave behind."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import documented_metrics, run

from treepo.checkpoint import latest_checkpoint, read_state
from treepo.cli import compose, from_yaml
from treepo.config import TrainConfig
from treepo.evaluate import EvaluateConfig
from treepo.tracking import read_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of three steps on two samplers and two learner ranks, W&B offline."""
    outputs = tmp_path_factory.mktemp("outputs")
    done = run(
        outputs,
        "trainer.total_steps=3",
        "trainer.save_freq=2",
        "trainer.test_freq=2",
        "cluster.num_rollout_workers=2",
        "cluster.num_learner_ranks=2",
        "tracking.wandb_mode=offline",
    )
    assert done.returncode == 0, done.stderr
    return (outputs / "latest").resolve(), done


def test_a_run_leaves_everything_that_its_folder_promises(finished):
    folder, _ = finished
    assert folder.parent.name == "quickstart"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "export/model.safetensors"):
        assert (folder / name).is_file(), name
    assert {p.name for p in (folder / "trees").iterdir()} == {f"step_{i}.jsonl" for i in (1, 2, 3)}
    assert list((folder / "wandb").glob("offline-run-*"))


def test_the_summary_holds_scores_before_and_after_at_both_temperatures(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    names = {
        f"{split} {mode}" for split in ("held_out", "longer") for mode in ("greedy", "sampled")
    }
    assert set(summary["before"]) == set(summary["after"]) == names
    assert summary["finished"] and summary["seed"] == 0 and summary["steps"] == 3
    assert summary["seconds"] > 0 and summary["versions"]["torch"] == torch.__version__


def test_the_command_that_it_ends_with_evaluates_the_same_problems(finished):
    folder, done = finished
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Try again")]
    words = shlex.split(line)
    assert words[2:6] == ["python", "-m", "treepo.evaluate", f"checkpoint={folder / 'export'}"]
    config = compose("evaluate", EvaluateConfig, words[5:])
    ran = from_yaml(folder / "config.yaml", TrainConfig)
    assert config.evaluation == ran.evaluation and config.reward == ran.reward


def test_every_step_has_a_row_with_documented_metrics_only(finished):
    folder, _ = finished
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    known = documented_metrics()
    logged = {name for row in rows for name in row if not name.startswith(("val-", "reward/part/"))}
    assert not logged - known
    for step, evaluated in ((0, True), (1, False), (2, True), (3, True)):
        assert ("val-core/held_out/greedy" in rows[step]) == evaluated


def test_engine_and_learner_agree_on_every_log_probability(finished):
    folder, _ = finished
    for row in read_rows(folder / "metrics.jsonl"):
        assert row.get("training/rollout_probs_diff_max", 0.0) < 1e-4
        assert row.get("training/rollout_probs_diff_mean", 0.0) <= 1e-5
        assert row.get("sync/golden_logprob_diff_max", 0.0) < 1e-4
        assert row.get("training/rollout_logprob_diff_p99", 0.0) < 1e-4
        assert abs(row.get("training/rollout_kl", 0.0)) < 1e-5
        assert row.get("training/rollout_is_eff_sample_size", 1.0) > 1 - 1e-6
        assert row.get("training/staleness/max", 0.0) == 0


def test_the_resolved_config_is_read_back_as_the_same_config(finished):
    folder, _ = finished
    config = from_yaml(folder / "config.yaml", TrainConfig)
    assert config.trainer.total_steps == 3 and config.rollout["segment_length"] == 6


def test_the_last_checkpoint_is_complete_and_knows_where_the_run_stands(finished):
    folder, _ = finished
    checkpoint = latest_checkpoint(folder / "checkpoints")
    state = read_state(checkpoint)
    assert state.step == 3 and state.data_position["offset"] == 12
    assert state.tracking["wandb_id"] == folder.name
    assert state.digest == json.loads((folder / "summary.json").read_text())["digest"]


def test_the_output_names_the_model_and_the_next_command_and_no_library_speaks(finished):
    folder, done = finished
    assert f"{folder.name}/export" in done.stdout and "python -m treepo.report" in done.stdout
    for noise in ("INFO", "WARNING", "Warning", "deepspeed", "raylet", "wandb:"):
        assert noise not in done.stdout + done.stderr, noise


def test_the_exported_model_gives_the_engines_greedy_tokens_under_plain_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout.engine import Engine
    from rollout.extend import ExtendSpec
    from rollout.settings import EngineSettings

    export = finished[0] / "export"
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    engine = Engine(str(export), EngineSettings(num_kv_slots=512))
    for question in ("7 + 15 - 4 =", "20 + 19 + 18 - 17 ="):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        theirs = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
        spec = ExtendSpec(max_tokens=24, temperature=0.0, stop_token_ids=(tokenizer.eos_token_id,))
        (ours,) = engine.extend([(engine.prefill(prompt[0].tolist()), spec, 1)])
        assert ours.token_ids.tolist() == theirs.tolist()


def test_a_finished_run_is_left_alone_and_can_be_reported(finished):
    folder, _ = finished
    report = subprocess.run(
        [sys.executable, "-m", "treepo.report", f"run={folder}"], capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    assert "held_out greedy" in report.stdout
