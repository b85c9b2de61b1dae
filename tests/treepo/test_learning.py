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


@pytest.mark.timeout(1800)
def test_the_quickstart_learns_to_carry(tmp_path):
    summary = quickstart(tmp_path, "seed=11")
    before, after = summary["before"], summary["after"]
    assert before["held_out sampled"] <= 0.5 and after["held_out sampled"] >= 0.85
    assert before["held_out greedy"] <= 0.7 and after["held_out greedy"] >= 0.9
    assert after["longer sampled"] > before["longer sampled"]
    assert after["longer greedy"] > before["longer greedy"]


@pytest.mark.timeout(1800)
def test_with_shuffled_rewards_nothing_is_learned(tmp_path):
    summary = quickstart(tmp_path, "trainer.shuffle_rewards=true")
    before, after = summary["before"], summary["after"]
    assert after["held_out sampled"] <= before["held_out sampled"] + 0.05
