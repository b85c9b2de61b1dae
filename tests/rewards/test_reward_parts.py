"""The small parts: extraction, reasoning-gym, exact match, format, length, choice by source."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rewards.extract import extract_answer
from rewards.length import overlong_penalty
from rewards.reasoning_gym import entry_as_json, make_dataset
from rewards.records import SCORED, UNPARSABLE, RewardItem
from rewards.registry import PartResult, make_part


def item(response: str, **fields: Any) -> RewardItem:
    values = {"data_source": "s", "prompt": "", "ground_truth": None, **fields}
    return RewardItem(solution_str=response, **values)


def judge(name: str, response: str, options: dict[str, Any] | None = None, **fields: Any) -> Any:
    return make_part(name, options or {})(item(response, **fields))


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("a #### 1\nb #### 2 \nc", "hash", "2"),
        ("#### ", "hash", None),
        ("\\boxed{1} \\boxed{a{b}c}", "boxed", "a{b}c"),
        ("\\boxed {1}", "boxed", "1"),
        ("\\fbox{1}", "boxed", "1"),
        ("\\boxed{1} and \\boxed{2", "boxed", "1"),
        ("\\boxed{\\{1\\}}", "boxed", "\\{1\\}"),
        ("<answer>1</answer><answer> 2\n</answer>", "answer_tag", "2"),
        ("<answer>1", "answer_tag", None),
        ("</answer>1<answer>", "answer_tag", None),
        ("  all of it ", "whole", "all of it"),
        ("\\boxed{2}\n#### 1", "auto", "1"),
        ("Result= 4 \n", "Result=", "4"),
        ("no marker", "auto", None),
    ],
)
def test_the_last_marked_answer_is_found(text: str, form: str, answer: str | None) -> None:
    assert extract_answer(text, form) == answer


# ---------------------------------------------------------------- reasoning-gym


def chain_sum(index: int = 0, **config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {"seed": 5, "size": 50, **config}
    entry = make_dataset("chain_sum", config)[index]
    info = {"task": "chain_sum", "config": config, "index": index, "entry": entry}
    return entry, {"reasoning_gym": json.loads(json.dumps(info))}


def test_the_library_scores_its_own_answer_fully_and_a_wrong_one_hardly() -> None:
    entry, info = chain_sum()
    right = judge("reasoning_gym", f"... #### {entry['answer']}", extra_info=info)
    wrong = judge("reasoning_gym", "... #### 99999", extra_info=info)
    assert (right.value, right.outcome, right.answer) == (1.0, SCORED, entry["answer"])
    assert wrong.value < 0.1 and wrong.outcome == SCORED


def test_a_partial_score_is_not_a_correct_answer() -> None:
    from rewards.scorer import Scorer
    from rewards.settings import RewardPartSettings, RewardSettings

    scorer = Scorer(
        RewardSettings(
            parts={"reasoning_gym": RewardPartSettings()}, num_workers=0, timeout_seconds=0
        )
    )
    entry, info = chain_sum()
    wrong = scorer.score(item(f"#### 1{entry['answer']}", extra_info=info))
    assert 0 < wrong.score < 1 and not wrong.correct
    assert scorer.score(item(f"#### {entry['answer']}", extra_info=info)).correct


def test_binary_counts_only_the_full_score() -> None:
    entry, info = chain_sum()
    assert judge("reasoning_gym", "#### 99999", {"binary": True}, extra_info=info).value == 0.0
    right = judge("reasoning_gym", f"#### {entry['answer']}", {"binary": True}, extra_info=info)
    assert right.value == 1.0


def test_no_answer_is_unparsable_and_votes_for_nothing() -> None:
    _, info = chain_sum()
    result = judge("reasoning_gym", "I give up", extra_info=info)
    assert (result.outcome, result.answer, result.correct) == (UNPARSABLE, None, False)


def test_spellings_of_one_number_vote_as_one() -> None:
    _, info = chain_sum()
    answers = {
        judge("reasoning_gym", f"#### {text}", extra_info=info).answer
        for text in ("1000", "1,000", "+1000", "01000")
    }
    assert answers == {"1000"}


def test_without_its_entry_the_scorer_makes_the_row_again() -> None:
    entry, info = chain_sum(7)
    info["reasoning_gym"]["entry"] = None
    assert judge("reasoning_gym", f"#### {entry['answer']}", extra_info=info).value == 1.0
    assert judge("reasoning_gym", "#### 99999", extra_info=info).value < 0.1


def test_chain_sum_takes_a_range_of_terms() -> None:
    dataset = make_dataset(
        "chain_sum",
        {"seed": 1, "size": 300, "min_terms": 3, "max_terms": 5, "min_value": 1, "max_value": 20},
    )
    rows = [dataset[i] for i in range(300)]
    terms = [int(t) for row in rows for t in row["metadata"]["expression"].split()[::2]]
    assert set(terms) == set(range(1, 21))
    assert {row["metadata"]["num_terms"] for row in rows} == {3, 4, 5}
    assert all(str(eval(row["metadata"]["expression"])) == row["answer"] for row in rows)


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        ("chain_sums", {}, "unknown reasoning-gym task 'chain_sums'.*chain_sum"),
        ("chain_sum", {"terms": 3}, "no setting 'terms'; it has min_terms"),
        ("chain_sum", {"min_terms": 5, "max_terms": 3}, "max_terms must be >= min_terms"),
        ("chain_sum", {"min_value": 5, "max_value": 3}, "min_value=5"),
        ("leg_counting", {"min_value": 5}, "no min_value"),
    ],
)
def test_a_wrong_task_or_setting_is_named(task: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(task, config)


def test_only_rows_that_json_holds_exactly_are_kept_as_json() -> None:
    assert entry_as_json({"a": [1, 2.5, None, "x", {"b": True}]}) is not None
    for odd in ((1, 2), {1: "a"}, {1, 2}, 1j):
        assert entry_as_json({"a": odd}) is None


def test_rows_that_json_cannot_hold_are_scored_by_every_task_that_makes_them() -> None:
    """Each task's own answer must get its full mark after a trip through JSON."""
    for task in ("countdown", "leg_counting", "gcd", "base_conversion", "complex_arithmetic"):
        config = {"seed": 3, "size": 4}
        dataset = make_dataset(task, config)
        for index in range(4):
            entry = dataset[index]
            info = {"task": task, "config": config, "index": index, "entry": entry_as_json(entry)}
            extra = {"reasoning_gym": json.loads(json.dumps(info))}
            result = judge("reasoning_gym", f"<answer>{entry['answer']}</answer>", extra_info=extra)
            assert result.value == 1.0, (task, index)


# ---------------------------------------------------------------- exact, format, length


def test_exact_match_ignores_spacing_and_on_demand_case() -> None:
    assert judge("exact", "#### New  York", ground_truth="New York").value == 1.0
    assert judge("exact", "#### new york", ground_truth="New York").value == 0.0
    loose = judge("exact", "#### new york", {"ignore_case": True}, ground_truth="New York")
    assert loose.value == 1.0
    assert judge("exact", "#### b", ground_truth=["a", "b"]).value == 1.0
    assert judge("exact", "b", ground_truth="b").outcome == UNPARSABLE


@pytest.mark.parametrize(
    ("response", "met"),
    [
        ("<think>a</think> <answer>1</answer>", True),
        ("<answer>1</answer><think>a</think>", False),
        ("<think>a<answer>1</answer></think>", False),
        ("<think>a</think><answer>1</answer><answer>2</answer>", False),
        ("<think>a</think><answer>1", False),
        ("", False),
    ],
)
def test_tags_stand_once_and_in_order(response: str, met: bool) -> None:
    assert judge("format", response, {"tags": ["think", "answer"]}).value == float(met)


def test_a_pattern_covers_the_response_or_is_searched() -> None:
    assert judge("format", " a\nb#### 3 \n", {"pattern": r".*#### \d"}).value == 1.0
    assert judge("format", "#### 3 and more", {"pattern": r".*#### \d"}).value == 0.0
    options = {"pattern": r"#### \d", "full_match": False, "reward": 0.2, "penalty": -0.5}
    assert judge("format", "x #### 3 and more", options).value == 0.2
    assert judge("format", "nothing", options).value == -0.5


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(0, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5), (140, -0.5)],
)
def test_the_overlong_penalty_grows_over_the_buffer(num_tokens: int, value: float) -> None:
    """By hand: L_max 100, buffer 20, factor 0.5; so 81 tokens cost 0.5 * 1/20."""
    assert overlong_penalty(num_tokens, 100, 20, 0.5) == pytest.approx(value)
    options = {"max_response_length": 100, "buffer_length": 20, "penalty_factor": 0.5}
    assert judge("length", "", options, num_tokens=num_tokens).value == pytest.approx(value)


# ---------------------------------------------------------------- choice by source, options


def test_auto_picks_the_verifier_by_data_source() -> None:
    entry, info = chain_sum()
    picked: PartResult = judge(
        "auto", f"#### {entry['answer']}", data_source="reasoning_gym/chain_sum", extra_info=info
    )
    assert picked.value == 1.0
    assert judge("auto", "#### 5", data_source="openai/gsm8k", ground_truth="5").value == 1.0
    options = {"sources": {"mine": "exact"}, "options": {"exact": {"extraction": "whole"}}}
    assert judge("auto", "yes", options, data_source="mine", ground_truth="yes").value == 1.0


def test_auto_knows_no_verifier_for_an_unknown_source_and_says_how_to_name_one() -> None:
    with pytest.raises(ValueError, match=r"data_source 'zzz'.*reward\.parts=\{math"):
        judge("auto", "5", data_source="zzz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, "unknown reward 'maths'. Did you mean 'math'"),
        ("math", {"extract": "boxed"}, "no option 'extract'; it has extraction"),
        ("math", {"extraction": " "}, "must be one of auto, hash"),
        ("length", {"buffer_length": 5}, "needs its option 'max_response_length'"),
        ("length", {"max_response_length": 5, "buffer_length": 6}, "buffer_length=6"),
        ("length", {"max_response_length": 5, "buffer_length": 0}, "buffer_length=0"),
        ("format", {}, "exactly one"),
        ("format", {"pattern": "a", "tags": ["b"]}, "exactly one"),
        ("format", {"pattern": "("}, "no regular expression"),
        ("auto", {"options": {"exact": {}}}, "which no data source uses"),
    ],
)
def test_a_wrong_option_is_one_clear_error(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_part(name, options)
