from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewards.records import SCORED, TIMEOUT, RewardResult
from rollout.tree import EOS, TRUNCATED, Segment, Tree, TreeCounters
from treepo.advantages import TreeAdvantages
from treepo.tree_file import tree_record, write_trees


def segment(parent: int, text: str, finish: str = "", sampled: bool = True) -> Segment:
    logprobs = np.full(len(text), -0.1234567, np.float32)
    return Segment(
        parent=parent,
        level=0 if parent < 0 else 1 if parent == 0 else 2,
        path_key=2**64 - 2 - parent,
        token_ids=np.array([*map(ord, text)], np.int32),
        logprobs=logprobs,
        sampling_logprobs=logprobs / 2,
        sampled=sampled,
        policy_versions=np.full(len(text), 4, np.int32),
        finish_reason=finish,
    )


TREE = Tree(
    problem_id="sum-1",
    segments=(
        segment(-1, "3+4=", sampled=False),
        segment(0, "ab"),
        segment(1, "7$", EOS),
        segment(1, "", TRUNCATED),
    ),
    leaves=(2, 3),
    temperature=0.9,
    counters=TreeCounters(branches=1),
)
VERDICTS = [
    RewardResult(score=1.0, parts={"exact": 1.0}, outcome=SCORED, correct=True, answer="7"),
    RewardResult(score=float("nan"), parts={}, outcome=TIMEOUT, detail="killed"),
]
ADVANTAGES = TreeAdvantages(
    leaf_advantage=np.array([0.5, 0.0]),
    leaf_weight=np.array([2.0, 0.0]),
    advantage_pos=np.array([0.0, 1.0, 1.0, 0.0]),
    advantage_neg=np.array([0.0, -0.25, 0.0, 0.0]),
    weight=np.array([0.0, 2.0, 2.0, 0.0]),
)


class Spelling:
    def text(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    def response_text(self, tree: Tree, leaf: int) -> str:
        ids = tree.path_token_ids(leaf, with_prompt=False).tolist()
        return self.text(ids).replace("$", "")


def test_a_line_holds_the_whole_tree(tmp_path: Path) -> None:
    file = tmp_path / "trees" / "step_3.jsonl"
    write_trees(file, [TREE], [VERDICTS], {"sum-1": ADVANTAGES}, Spelling())
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert record["problem_id"] == "sum-1" and record["counters"]["branches"] == 1
    assert [node["parent"] for node in record["nodes"]] == [-1, 0, 1, 1]
    assert [node["text"] for node in record["nodes"]] == ["3+4=", "ab", "7$", ""]
    assert [node["sampled"] for node in record["nodes"]] == [False, True, True, True]
    node = record["nodes"][2]
    assert node["token_ids"] == [ord("7"), ord("$")]
    assert node["logprobs"] == [-0.123457, -0.123457]
    assert node["sampling_logprobs"] == [-0.061728, -0.061728]
    assert (node["version"], node["finish_reason"], node["level"]) == (4, "eos", 2)
    assert record["nodes"][0]["path_key"] == "f" * 16
    assert [leaf["node"] for leaf in record["leaves"]] == [2, 3]
    assert [leaf["text"] for leaf in record["leaves"]] == ["ab7", "ab"]
    assert [leaf["num_tokens"] for leaf in record["leaves"]] == [4, 2]
    assert [leaf["reward"] for leaf in record["leaves"]] == [1.0, None]
    assert [leaf["outcome"] for leaf in record["leaves"]] == ["scored", "timeout"]
    assert [leaf["correct"] for leaf in record["leaves"]] == [True, None]


def test_a_node_names_its_oldest_weights_and_how_many_tokens_each_version_drew() -> None:
    mixed = replace(TREE.segments[1], policy_versions=np.array([4, 5], np.int32))
    tree = replace(TREE, segments=(TREE.segments[0], mixed, *TREE.segments[2:]))
    nodes = tree_record(tree, VERDICTS, Spelling())["nodes"]
    assert [node["version"] for node in nodes] == [4, 4, 4, 0]
    assert [node["version_runs"] for node in nodes] == [[[4, 4]], [[4, 1], [5, 1]], [[4, 2]], []]


def test_a_nodes_advantage_is_the_mean_over_the_leaves_below_it() -> None:
    record = tree_record(TREE, VERDICTS, Spelling(), ADVANTAGES)
    assert [node["advantage"] for node in record["nodes"]] == [None, 0.375, 0.5, None]
    assert [leaf["advantage"] for leaf in record["leaves"]] == [0.5, 0.0]


def test_a_tree_left_out_of_training_has_null_advantages() -> None:
    record = tree_record(TREE, VERDICTS, Spelling())
    assert {node["advantage"] for node in record["nodes"]} == {None}
    assert {leaf["weight"] for leaf in record["leaves"]} == {None}


def test_a_file_of_an_earlier_life_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "step_1.jsonl"
    write_trees(file, [TREE, TREE], [VERDICTS, VERDICTS], {}, Spelling())
    unwritable = replace(VERDICTS[0], parts={"exact": object()})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_trees(file, [TREE], [[VERDICTS[0], unwritable]], {}, Spelling())
    assert len(file.read_text().splitlines()) == 2
    write_trees(file, [TREE], [VERDICTS], {}, Spelling())
    assert len(file.read_text().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.jsonl"]
