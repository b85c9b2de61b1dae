"""Training in segments: it runs with flat and with tree sampling, every prompt is used once, and a
run that is killed while trees are unfinished goes on with them to the same end.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from training_runs import (
    assert_same_end,
    documented_metrics,
    finish,
    kill_after,
    step_trees,
    varied_reward,
)

from treepo.checkpoint import latest_checkpoint
from treepo.pools import POOLS_FILE, load_pools
from treepo.tracking import read_rows

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # two runs a test

SEGMENTS = [
    "trainer.segments.segment_length=6",
    "trainer.save_freq=2",
    "trainer.keep_checkpoints=9",
    "trainer.learner.optimizer.lr_warmup_steps=1",
    "data.size=24",
    "rollout.temperature=2.0",  # responses of one prompt differ, also in length
    "evaluation.num_samples=1",
]
FLAT = ["rollout=flat", "algorithm=grpo", "rollout.n=4", "rollout.max_response_length=64"]


def settings(tmp_path: Path, *more: str) -> list[str]:
    return [*SEGMENTS, *varied_reward(tmp_path), *more]


def versions(tree: dict) -> list[set[int]]:
    """Of each response, the policy versions of its tokens."""
    found = []
    for leaf in tree["leaves"]:
        node, of_leaf = leaf["node"], set()
        while node > 0:
            of_leaf |= {version for version, _ in tree["nodes"][node]["version_runs"]}
            node = tree["nodes"][node]["parent"]
        found.append(of_leaf)
    return found


@pytest.mark.parametrize("choices", [FLAT, []], ids=["flat", "treepo"])
def test_responses_continue_over_updates_and_each_prompt_is_used_once(tmp_path, choices):
    words = settings(tmp_path, *choices, "trainer.total_steps=10")
    folder = finish(tmp_path, words)
    rows = read_rows(folder / "metrics.jsonl")[1:]
    logged = {name for row in rows for name in row if not name.startswith(("val-", "reward/part/"))}
    assert not logged - documented_metrics()
    began = ended = 0
    ids: Counter[str] = Counter()
    crossing = 0
    for row in rows:
        trees = step_trees(folder, row["step"])
        ids.update(tree["problem_id"] for tree in trees)
        crossing += sum(len(v) > 1 for tree in trees for v in versions(tree))
        began, ended = began + row["rollout/num_new"], ended + row["rollout/num_finished"]
        assert row["rollout/num_unfinished"] == began - ended
        assert len(trees) == row["rollout/num_finished"] == row["training/num_groups"]
        if not row["training/skipped_steps"]:
            assert row["training/staleness/max"] <= row["training/policy_version"] - 1
            assert row["training/rollout_probs_diff_max"] < 1 + 1e-6
    assert crossing, "no response has tokens of two policies"
    assert max(row.get("training/staleness/max", 0) for row in rows) >= 2
    assert any(row["rollout/num_unfinished"] for row in rows)
    errors = [row["rollout/length_error"] for row in rows if row["rollout/num_finished"]]
    assert all(error >= 0 for error in errors) and len(errors) > 5
    assert max(ids.values()) <= -(-began // 24), "an epoch holds each of the 24 once"


@pytest.mark.parametrize(
    "choices",
    [
        [
            *FLAT,
            "trainer.segments.group_policy=finished_part",
            "trainer.segments.min_finished=1",
            "trainer.segments.train_on=full_batch",
            "trainer.segments.max_staleness=3",
            "trainer.segments.submit=longest_first",
        ],
        ["cluster.num_rollout_workers=2"],
    ],
    ids=["flat", "treepo"],
)
def test_a_run_killed_while_trees_are_unfinished_goes_on_with_them_to_the_same_end(
    tmp_path, choices
):
    words = settings(tmp_path, *choices, "trainer.total_steps=10")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = finish(whole, words)
    killed = kill_after(cut, words, steps=5)
    newest = latest_checkpoint(killed / "checkpoints")
    pools = load_pools((newest / POOLS_FILE).read_bytes())
    assert pools.unfinished, "the case did not arise"
    assert POOLS_FILE in json.loads((newest / "complete.json").read_text())["files"]
    assert finish(cut, words) == killed
    pools = "rollout/num_unfinished", "rollout/num_waiting", "training/staleness/mean"
    assert_same_end(expected, killed, *pools)
    trained: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for step in range(1, 11):
        for tree in step_trees(expected, step):
            parts[tree["nodes"][0]["path_key"]] += 1
            keys = [tree["nodes"][leaf["node"]]["path_key"] for leaf in tree["leaves"]]
            weights = [leaf["weight"] for leaf in tree["leaves"]]
            trained.update(key for key, weight in zip(keys, weights, strict=True) if weight)
    assert max(trained.values()) == 1, "a response was trained on twice"
    in_parts = any("finished_part" in word for word in choices)
    assert (max(parts.values()) > 1) == in_parts, "the case did not arise"


def responses(folder: Path, num_steps: int) -> dict[tuple[str, str], list]:
    """Tokens of every tree that was trained on or filtered, by problem and key of the prompt."""
    found = {}
    for step in range(1, num_steps + 1):
        for tree in step_trees(folder, step):
            nodes = tree["nodes"]
            name = tree["problem_id"], nodes[0]["path_key"]
            assert name not in found
            found[name] = [(n["path_key"], n["token_ids"], n["finish_reason"]) for n in nodes]
    return found


@pytest.mark.parametrize("choices", [FLAT, []], ids=["flat", "treepo"])
def test_weights_that_stay_give_the_trees_of_whole_rollouts_however_they_are_cut(tmp_path, choices):
    """A learning rate of 0: new versions of the same weights."""
    words = settings(
        tmp_path, *choices, "trainer.total_steps=12", "trainer.learner.optimizer.lr=0",
        "data.size=64", "trainer.save_freq=0",
    )  # fmt: skip
    pieces = responses(finish(tmp_path / "pieces", words), 12)
    words = [word for word in words if not word.startswith("trainer.segments")]
    whole = responses(finish(tmp_path / "whole", words), 12)
    assert len(pieces) >= 24 and set(pieces) < set(whole)  # some are not over at the run's end
    assert all(pieces[name] == whole[name] for name in pieces)
