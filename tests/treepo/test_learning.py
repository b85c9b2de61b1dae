"""The quickstart learns; with rewards dealt at random it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def quickstart(outputs: Path, *overrides: str) -> dict:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "treepo.train",
            "+experiment=quickstart",
            f"output_dir={outputs}",
            *overrides,
        ],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((outputs / "latest" / "summary.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """The folder of a whole quickstart run with a seed of its own."""
    outputs = tmp_path_factory.mktemp("learned")
    quickstart(outputs, "seed=11")
    return (outputs / "latest").resolve()


@pytest.mark.timeout(1800)
def test_the_quickstart_learns_to_carry(learned):
    summary = json.loads((learned / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["held_out sampled"] <= 0.5 and after["held_out sampled"] >= 0.85
    assert before["held_out greedy"] <= 0.7 and after["held_out greedy"] >= 0.9
    assert after["longer sampled"] > before["longer sampled"]
    assert after["longer greedy"] > before["longer greedy"]


@pytest.mark.timeout(1800)
def test_the_exported_model_is_as_good_under_plain_transformers(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rewards.reasoning_gym import make
    from rewards.records import RewardItem
    from treepo.cli import compose
    from treepo.config import TrainConfig
    from treepo.held_out import load_splits

    tokenizer = AutoTokenizer.from_pretrained(learned / "export", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(learned / "export")
    config = compose("train", TrainConfig, ["+experiment=quickstart"])
    problems = load_splits(config, tokenizer)["held_out"]
    score, correct = make(binary=True), 0.0
    for start in range(0, len(problems), 64):
        batch = problems[start : start + 64]
        padded = tokenizer.pad(
            {"input_ids": [problem.prompt_token_ids.tolist() for problem in batch]},
            return_tensors="pt",
        )
        out = model.generate(**padded, max_new_tokens=64, do_sample=False)
        texts = tokenizer.batch_decode(
            out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for problem, text in zip(batch, texts, strict=True):
            item = RewardItem(
                data_source=problem.data_source,
                prompt=problem.prompt_text,
                solution_str=text,
                ground_truth=problem.ground_truth,
                extra_info=problem.extra_info,
            )
            correct += score(item).value
    ours = json.loads((learned / "summary.json").read_text())["after"]["held_out greedy"]
    # Padding changes the last bits of a logit, so one near-tie may fall the other way.
    assert abs(correct / len(problems) - ours) <= 1.01 / len(problems)


@pytest.mark.timeout(1800)
def test_with_shuffled_rewards_nothing_is_learned(tmp_path):
    summary = quickstart(tmp_path, "trainer.shuffle_rewards=true")
    before, after = summary["before"], summary["after"]
    assert after["held_out sampled"] <= before["held_out sampled"] + 0.05
