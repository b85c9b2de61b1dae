"""The user's own functions in both conventions, and how parts add up to a score."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rewards.records import ERROR, SCORED, UNPARSABLE, RewardItem, RewardResult
from rewards.scorer import Scorer
from rewards.settings import RewardPartSettings, RewardSettings


def score(parts: dict[str, RewardPartSettings], **fields: Any) -> RewardResult:
    values = {"data_source": "s", "prompt": "why", "ground_truth": "1", **fields}
    settings = RewardSettings(parts=parts, num_workers=0, timeout_seconds=0)
    return Scorer(settings).score(RewardItem(**values))


def user(file: Path, function: str, **fields: Any) -> dict[str, RewardPartSettings]:
    return {"mine": RewardPartSettings(name=f"{file}:{function}", **fields)}


def test_a_verl_function_may_return_a_number(user_file: Path) -> None:
    right = score(user(user_file, "verl"), solution_str="1")
    assert (right.score, right.parts, right.correct) == (1.0, {"mine": 1.0}, True)
    wrong = score(user(user_file, "verl"), solution_str="2")
    assert (wrong.score, wrong.outcome, wrong.correct) == (0.0, SCORED, False)


def test_a_verl_function_may_return_a_dict_with_verdict_and_answer(user_file: Path) -> None:
    result = score(user(user_file, "verl_dict"), solution_str="1")
    assert (result.score, result.correct, result.answer) == (0.5, True, "1")
    assert result.parts == {"mine": 0.5, "mine/words": 3.0}


def test_options_are_passed_by_name(user_file: Path) -> None:
    result = score(user(user_file, "verl_dict", options={"scale": 3.0}), solution_str="1")
    assert result.score == 2.5


def test_a_verl_dict_without_score_is_an_error(user_file: Path) -> None:
    result = score(user(user_file, "no_score"), solution_str="1")
    assert result.outcome == ERROR and math.isnan(result.score)
    assert "the returned dict has no 'score'; it has acc, pred" in result.detail


def test_a_trl_function_gets_lists_and_columns(user_file: Path) -> None:
    assert score(user(user_file, "trl"), solution_str="1").score == 1.0
    assert score(user(user_file, "trl"), solution_str="2").score == 0.0


def test_a_trl_function_gets_messages_where_the_prompt_is_messages(user_file: Path) -> None:
    info = {"level": 2, "prompt_messages": [{"role": "user", "content": "why"}]}
    result = score(user(user_file, "trl_chat"), solution_str="abc", extra_info=info)
    assert result.score == 5.0


def test_a_missing_column_is_named(user_file: Path) -> None:
    result = score(user(user_file, "trl_chat"), solution_str="abc", extra_info={"size": 1})
    assert result.outcome == ERROR
    assert "needs level" in result.detail and "size" in result.detail


def test_async_functions_are_waited_for(user_file: Path) -> None:
    assert score(user(user_file, "trl_async"), solution_str="x").score == 3.0


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        ("trl_two", "expected 1 score for 1 completion, got 2"),
        ("trl_scalar", "expected a list of one score per completion, got float 1.0"),
        ("trl_skips", "no verifying part applies"),
    ],
)
def test_malformed_results_are_errors(user_file: Path, function: str, detail: str) -> None:
    result = score(user(user_file, function), solution_str="x")
    assert result.outcome == ERROR and math.isnan(result.score)
    assert detail in result.detail


def test_scalars_of_array_libraries_are_numbers_and_arrays_are_not() -> None:
    import numpy as np

    from rewards.custom import read_score, read_scores

    for value in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        assert read_score(value).value == 0.5
        assert read_scores([value]).value == 0.5
        assert read_scores(np.array([value])).value == 0.5
    assert read_score(np.bool_(True)).value == 1.0 == read_score(True).value
    for value in (np.zeros(2), [1.0], {"score": "1"}, {"score": None}):
        with pytest.raises(ValueError):
            read_score(value)
    for value in ([], [1.0, 1.0], "1", {"0": 1.0}, ["1"], None, 1.0):
        with pytest.raises(ValueError):
            read_scores(value)


def test_a_part_that_does_not_apply_is_left_out(user_file: Path) -> None:
    parts = {**user(user_file, "trl_skips"), "exact": RewardPartSettings(weight=2.0)}
    result = score(parts, solution_str="#### 1")
    assert (result.score, result.parts, result.correct) == (2.0, {"exact": 1.0}, True)


def test_the_score_is_the_weighted_sum_and_shaping_decides_nothing() -> None:
    """By hand: 2 * 1 + 0.5 * 0 + 1 * (-0.5) = 1.5."""
    parts = {
        "exact": RewardPartSettings(weight=2.0),
        "format": RewardPartSettings(weight=0.5, options={"tags": ["answer"]}),
        "length": RewardPartSettings(options={"max_response_length": 10, "buffer_length": 10}),
    }
    result = score(parts, solution_str="#### 1", num_tokens=5)
    assert result.score == pytest.approx(1.5)
    assert result.parts == {"exact": 1.0, "format": 0.0, "length": -0.5}
    assert result.correct and result.answer == "1"


def test_weight_zero_keeps_a_part_as_a_metric() -> None:
    parts = {
        "exact": RewardPartSettings(),
        "format": RewardPartSettings(weight=0.0, options={"pattern": ".*"}),
    }
    result = score(parts, solution_str="#### 2")
    assert (result.score, result.parts) == (0.0, {"exact": 0.0, "format": 1.0})


def test_all_verdicts_must_agree_and_one_that_reads_nothing_shows(user_file: Path) -> None:
    parts = {"exact": RewardPartSettings(), **user(user_file, "verl")}
    unread = score(parts, solution_str="1")  # no marker for exact, right for the user's
    assert (unread.outcome, unread.correct, unread.score) == (UNPARSABLE, False, 1.0)
    assert unread.has_verdict


def test_one_failed_part_fails_the_verdict(user_file: Path) -> None:
    parts = {"exact": RewardPartSettings(), **user(user_file, "verl", weight=0.1)}
    result = score(parts, solution_str="raise")
    assert result.outcome == ERROR and math.isnan(result.score)
    assert result.detail.startswith("mine: KeyError")


def test_a_part_can_be_made_the_verdict() -> None:
    parts = {"format": RewardPartSettings(verdict=True, options={"pattern": "ok"})}
    assert score(parts, solution_str="ok").correct
    assert not score(parts, solution_str="no").correct


def test_labels_let_one_part_be_used_twice() -> None:
    parts = {
        "loose": RewardPartSettings(name="exact", options={"extraction": "whole"}),
        "strict": RewardPartSettings(name="exact", verdict=False, weight=0.0),
    }
    result = score(parts, solution_str="1")
    assert result.parts == {"loose": 1.0, "strict": 0.0} and result.correct


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_workers": -1}, "reward.num_workers=-1"),
        ({"timeout_seconds": -1.0}, "reward.timeout_seconds=-1.0"),
        ({"timeout_seconds": math.inf}, "reward.timeout_seconds=inf"),
        ({"num_workers": 0}, "cannot be stopped"),
        ({"memory_limit_mb": -1}, "reward.memory_limit_mb=-1"),
        ({"memory_limit_mb": 100}, "reward.memory_limit_mb=100: must be >= 512"),
        ({"startup_timeout_seconds": 0.0}, "reward.startup_timeout_seconds=0.0"),
        ({"correct_threshold": math.nan}, "reward.correct_threshold=nan"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**fields)


def test_the_settings_are_a_config_node() -> None:
    from omegaconf import OmegaConf

    node = OmegaConf.merge(
        OmegaConf.structured(RewardSettings),
        OmegaConf.create(
            {"parts": {"math": {"weight": 2, "options": {"extraction": "boxed"}}}, "num_workers": 1}
        ),
    )
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, RewardSettings) and settings.num_workers == 1
    part = RewardPartSettings(weight=2.0, options={"extraction": "boxed"})
    assert settings.parts_in_force() == {"math": part}  # in place of the default, not beside it
    assert list(RewardSettings().parts_in_force()) == ["auto"]
    with pytest.raises(ValueError, match="weight=nan"):
        RewardPartSettings(weight=math.nan)
