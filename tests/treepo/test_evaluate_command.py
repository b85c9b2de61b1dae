from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treepo.checkpoint import RunState, save_checkpoint
from treepo.cli import compose
from treepo.evaluate import EvaluateConfig, work
from treepo.evaluation_run import load_splits


def config_of(checkpoint: str, *overrides: str) -> EvaluateConfig:
    return compose("evaluate", EvaluateConfig, [f"checkpoint={checkpoint}", *overrides])


def test_a_model_is_evaluated_from_the_command_line_to_the_files(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result"
    config = config_of(
        str(tiny_model_path),
        "evaluation.splits.held_out.size=4",
        "evaluation.splits.longer.size=2",
        "+experiment=quickstart",
        "data.size=16",  # so few that no held-out problem is also trained on
        "evaluation.num_samples=2",
        "cluster.num_rollout_workers=1",
        "reward.num_workers=1",
        f"output={output}",
    )
    work(config, False)
    about = json.loads((output / "evaluation.json").read_text())
    assert about["scores"]["val-core/held_out/greedy"]["num_problems"] == 4
    assert about["sampling"]["sampled"]["num_samples"] == 2
    assert "val-core/longer/mean@2" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    passes = [(row["split"], row["sampling_pass"]) for row in rows]
    assert passes[:12] == [("held_out", "greedy")] * 4 + [("held_out", "sampled")] * 8
    assert passes[12:] == [("longer", "greedy")] * 2 + [("longer", "sampled")] * 4
    assert_greedy_as_transformers(tiny_model_path, rows[:4])
    with pytest.raises(ValueError, match="holds an evaluation already"):
        work(config, False)


def assert_greedy_as_transformers(model_path: Path, rows: list[dict]) -> None:
    """The greedy responses are what ``generate`` of plain transformers gives."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for row in rows:
        prompt = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        generated = model.generate(**prompt, max_new_tokens=row["num_tokens"], do_sample=False)
        assert generated[0, prompt.input_ids.shape[1] :].tolist() == row["token_ids"]
        text = tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert row["text"] == text and tokenizer.eos_token not in text


def test_a_checkpoint_without_its_completion_marker_is_refused_at_once(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")

    state = RunState(step=3, policy_version=3, data_position={}, digest="", seconds=0.0, seed=0)
    folder = save_checkpoint(tmp_path, state, write, keep=1)
    (folder / "complete.json").unlink()
    with pytest.raises(ValueError, match="completion marker"):
        work(config_of(str(folder), "+experiment=quickstart"), True)


def test_an_experiment_without_held_out_problems_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluation.splits is empty"):
        work(config_of(str(tiny_model_path), "rollout=flat", "rollout.n=1"), True)


def test_a_dry_run_prints_the_settings_and_samples_nothing(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result"
    config = config_of(str(tiny_model_path), "+experiment=quickstart", f"output={output}")
    work(config, True)
    assert "held_out:" in capsys.readouterr().out
    assert not output.exists()


def test_problems_that_are_also_trained_on_are_left_out_as_in_training(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    for name, sums in (("train", ["1 + 2", "3 + 4"]), ("test", ["3 + 4", "5 + 6"])):
        rows = [{"question": text, "answer": "#### 7"} for text in sums]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "rollout=flat",
        "rollout.n=1",
        "data=file",
        f"data.files=[{tmp_path}/train.jsonl]",
        f"+evaluation.splits={{test: {{source: file, files: [{tmp_path}/test.jsonl]}}}}",
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    splits = load_splits(config_of(str(tiny_model_path), *overrides), tokenizer)
    (only,) = splits["test"]
    assert "5 + 6" in only.prompt_text
    allowed = [*overrides, "evaluation.splits.test.on_overlap=allow"]
    splits = load_splits(config_of(str(tiny_model_path), *allowed), tokenizer)
    assert len(splits["test"]) == 2
