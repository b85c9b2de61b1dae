from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.records import ERROR, SCORED, TIMEOUT, UNPARSABLE, RewardResult
from rollout.tree import EOS, TRUNCATED, Segment, Tree
from treepo.base.errors import RunFailed
from treepo.evaluation import SamplingPass, evaluate, greedy_and_sampled

EOS_ID = 0


@dataclass
class Question:
    """Stands for treepo.data.Problem."""

    id: str
    ground_truth: str = "7"
    prompt_text: str = "3 + 4 ="
    data_source: str = "adding"
    extra_info: dict[str, Any] = field(default_factory=dict)


def segment(parent: int, tokens: list[int], finish: str = "") -> Segment:
    zeros = np.zeros(len(tokens), np.float32)
    return Segment(
        parent=parent,
        level=parent + 1,
        path_key=0,
        token_ids=np.asarray(tokens, np.int32),
        logprobs=zeros,
        sampling_logprobs=zeros,
        sampled=parent >= 0,
        policy_versions=np.full(len(tokens), 3, np.int32),
        finish_reason=finish,
    )


def tree_of(problem_id: str, answers: list[str], finish: str = EOS) -> Tree:
    """A flat tree whose leaves spell the answers, a token a character."""
    leaves = [segment(0, [*map(ord, answer), EOS_ID], finish) for answer in answers]
    return Tree(
        problem_id=problem_id,
        segments=(segment(-1, [1, 2]), *leaves),
        leaves=tuple(range(1, len(answers) + 1)),
        temperature=1.0,
    )


class Spelling:
    def response_text(self, tree: Tree, leaf: int) -> str:
        ids = tree.path_token_ids(leaf, with_prompt=False)
        return "".join(chr(i) for i in ids if i != EOS_ID)


def verdict(item) -> RewardResult:
    text = item.solution_str
    if text == "slow":
        return RewardResult(score=float("nan"), parts={}, outcome=TIMEOUT, detail="killed")
    if text == "crash":
        return RewardResult(score=float("nan"), parts={}, outcome=ERROR, detail="raised")
    if not text.isdigit():
        return RewardResult(score=0.0, parts={"exact": 0.0}, outcome=UNPARSABLE)
    right = text == item.ground_truth
    return RewardResult(
        score=float(right),
        parts={"exact": float(right)},
        outcome=SCORED,
        correct=right,
        answer=text,
    )


def score(items) -> list[RewardResult]:
    return [verdict(item) for item in items]


SAMPLED = SamplingPass(
    name="sampled", num_samples=4, temperature=1.0, max_response_length=8, seed=5
)


def run(answers: dict[str, list[str]], settings: SamplingPass = SAMPLED, finish: str = EOS):
    return evaluate(
        {"test": [Question(id=name) for name in answers]},
        [settings],
        sample=lambda problems, s: [tree_of(p.id, answers[p.id], finish) for p in problems],
        score=score,
        decoder=Spelling(),
    )


def test_scores_of_a_sampled_pass_by_hand() -> None:
    result = run({"a": ["7", "5", "7", "1"], "b": ["5", "5", "7", "5"], "c": ["1", "2", "3", "4"]})
    metrics = result.metrics
    assert metrics["val-core/test/mean@4"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert metrics["val-core/test/pass@4"] == pytest.approx(2 / 3)
    assert metrics["val-aux/test/pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert metrics["val-core/test/maj@4"] == pytest.approx(1 / 3)
    # Pairs in order. a: 75 77 71 57 51 71 -> 7,7,7,5,5,7; b: the two where 7 comes first: 75 -> 1.
    assert metrics["val-aux/test/maj@2"] == pytest.approx((4 / 6 + 1 / 6 + 0) / 3)


def test_a_greedy_pass_has_one_score_with_an_interval() -> None:
    greedy, _ = greedy_and_sampled(num_samples=4, temperature=1.0, max_response_length=8, seed=0)
    result = run({"a": ["7"], "b": ["7"], "c": ["1"], "d": ["7"]}, greedy)
    estimate = result.estimates["val-core/test/greedy"]
    assert (estimate.value, estimate.num_problems) == (0.75, 4)
    assert 0.25 < estimate.low < 0.5 and 0.9 < estimate.high < 1.0
    assert [name for name in result.metrics if name.startswith("val-core")] == [
        "val-core/test/greedy"
    ]


def test_short_names_of_the_main_scores() -> None:
    answers = {0.0: ["7"], 1.0: ["7", "5"]}
    result = evaluate(
        {"easy": [Question(id="a")], "hard": [Question(id="b", ground_truth="5")]},
        greedy_and_sampled(num_samples=2, temperature=1.0, max_response_length=8, seed=0),
        sample=lambda problems, s: [tree_of(p.id, answers[s.temperature]) for p in problems],
        score=score,
        decoder=Spelling(),
    )
    assert result.scores == {
        "easy greedy": 1.0,
        "easy sampled": 0.5,
        "hard greedy": 0.0,
        "hard sampled": 0.5,
    }


def test_responses_without_a_verdict_are_neither_right_nor_wrong() -> None:
    result = run({"a": ["7", "slow", "crash", "5"], "b": ["slow"] * 4})
    metrics = result.metrics
    assert metrics["val-core/test/mean@4"] == 0.5  # problem b has no verdict at all
    assert metrics["val-core/test/pass@4"] == 1.0  # of the two judged ones
    assert result.estimates["val-core/test/mean@4"].num_problems == 1
    assert metrics["val-aux/test/sampled/num_without_verdict"] == 6
    row = result.samples[1]
    assert (row.correct, row.score, row.outcome, row.detail) == (None, None, "timeout", "killed")


def test_when_no_verdict_was_given_at_all_the_evaluation_fails_and_says_why() -> None:
    with pytest.raises(RunFailed, match="none of 4 responses got a verdict.*killed"):
        run({"a": ["slow"] * 4})


def test_a_problem_without_verdicts_is_left_out_and_counted() -> None:
    result = run({"a": ["slow"] * 4, "b": ["7", "7", "x", "7"]})
    assert result.estimates["val-core/test/mean@4"].num_problems == 1
    assert result.metrics["val-aux/test/sampled/num_without_verdict"] == 4


def test_missing_answers_and_truncated_responses_are_counted() -> None:
    result = run({"a": ["7", "x", "y", "7"]}, finish=TRUNCATED)
    assert result.metrics["val-aux/test/sampled/num_without_answer"] == 2
    assert result.metrics["val-aux/test/sampled/num_truncated"] == 4
    assert result.metrics["val-core/test/mean@4"] == 0.5  # unparsable is wrong
    assert result.metrics["val-core/test/maj@4"] == 1.0  # and does not vote
    assert result.metrics["val-aux/test/sampled/response_length/mean"] == 2.0


def test_without_answers_there_is_no_majority() -> None:
    result = run({"a": ["x", "y", "z", "u"]})
    assert not [name for name in result.metrics if "maj@" in name]
    assert result.metrics["val-core/test/pass@4"] == 0.0


def test_files_have_a_row_a_response_and_the_settings_beside_the_score(tmp_path: Path) -> None:
    result = run({"a": ["7", "5", "slow", "x"]})
    result.write(tmp_path / "evaluation", checkpoint="folder")
    rows = [
        json.loads(line)
        for line in (tmp_path / "evaluation/samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4
    first = rows[0]
    assert first["token_ids"] == [ord("7"), EOS_ID]
    assert first["text"] == "7"  # the end-of-sequence token is no text
    assert (first["problem_id"], first["index"], first["answer"]) == ("a", 0, "7")
    assert (first["correct"], first["outcome"], first["finish_reason"]) == (True, "scored", "eos")
    assert (first["num_tokens"], first["policy_version"], first["ground_truth"]) == (2, 3, "7")
    assert [row["score"] for row in rows] == [1.0, 0.0, None, 0.0]
    about = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert about["checkpoint"] == "folder"
    assert about["sampling"]["sampled"]["temperature"] == 1.0
    assert about["scores"]["val-core/test/mean@4"]["num_problems"] == 1
    assert about["counts"]["val-aux/test/sampled/num_samples"] == 4


def test_the_sampler_is_asked_once_a_split_and_pass_with_the_pass_settings() -> None:
    asked = []

    def sample(problems, settings):
        asked.append(([p.id for p in problems], settings.name, settings.num_samples))
        return [tree_of(p.id, ["7"] * settings.num_samples) for p in problems]

    evaluate(
        {"x": [Question(id="a"), Question(id="b")], "y": [Question(id="c")]},
        greedy_and_sampled(num_samples=3, temperature=0.7, max_response_length=8, seed=0),
        sample=sample,
        score=score,
        decoder=Spelling(),
    )
    assert asked == [
        (["a", "b"], "greedy", 1),
        (["a", "b"], "sampled", 3),
        (["c"], "greedy", 1),
        (["c"], "sampled", 3),
    ]


def test_a_sampler_that_gives_too_few_responses_is_caught() -> None:
    with pytest.raises(AssertionError, match="3 responses instead of 4"):
        run({"a": ["7", "7", "7"]})


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="all of them would be the same"):
        SamplingPass(name="x", num_samples=2, temperature=0.0, max_response_length=8, seed=0)
    with pytest.raises(ValueError, match="at least 1 response"):
        SamplingPass(name="x", num_samples=0, temperature=1.0, max_response_length=8, seed=0)
    with pytest.raises(ValueError, match="'empty' has no problems"):
        evaluate({"empty": []}, [SAMPLED], sample=lambda p, s: [], score=score, decoder=Spelling())
    with pytest.raises(ValueError, match="each needs a name of its own"):
        evaluate({}, [SAMPLED, SAMPLED], sample=lambda p, s: [], score=score, decoder=Spelling())
