"""The math verifier: equal answers in different dress, and what must not be called equal."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

import pytest

from rewards.math import make, plain_number
from rewards.records import SCORED, UNPARSABLE, RewardItem
from rewards.registry import PartResult

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


def judge(response: str, truth: object, **options: str) -> PartResult:
    item = RewardItem(data_source="m", prompt="", solution_str=response, ground_truth=truth)
    return make(**options)(item)


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18 dollars", "18"),
        ("#### $18 per day.", "18"),
        ("#### $1,000", "1000"),
        ("#### 1000", "He has 1,000.\n#### 1,000"),
        ("#### 7", 7),
        ("#### .5", "1/2"),
        ("#### 3.0", "3"),
        ("#### 0.333333", "1/3"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\dfrac12}", "1/2"),
        ("\\boxed{0.5}", "\\frac{1}{2}"),
        ("\\boxed{50\\%}", "\\frac12"),
        ("\\boxed{50\\%}", "50"),
        ("#### 5%", "0.05"),
        ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("\\boxed{1{,}000}", "1000"),
        ("\\boxed{1\\!,000}", "1000"),
        ("\\boxed{x^2+2x+1}", "(x+1)^2"),
        ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}"),
        ("\\boxed{2 \\pi}", "2\\pi"),
        ("\\boxed{(1,2)}", "(1,2)"),
        ("\\boxed{x=5}", "5"),
        ("\\boxed{\\text{east}}", "\\text{east}"),
        ("\\boxed{90^\\circ}", "90"),
        ("<answer>3/4</answer>", "0.75"),
        ("So the answer is $42$.", "42"),
        ("first \\boxed{3}, no: \\boxed{4}", "4"),
        ("#### 6", ["5", "6"]),
    ],
)
def test_equal_answers_in_another_dress_are_right(response: str, truth: object) -> None:
    result = judge(response, truth)
    assert (result.value, result.outcome) == (1.0, SCORED)


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("#### -5", "5"),
        ("#### 19", "18"),
        ("#### 1,00", "100"),  # no thousands separator stands there
        ("#### 2 pi", "2"),
        ("#### 0.34", "1/3"),
        ("\\boxed{(2,1)}", "(1,2)"),
        ("\\boxed{4}, no: \\boxed{3}", "4"),
        ("\\boxed{" + "9" * 500 + "}", "5"),
        ("\\boxed{\\frac{1}{0}}", "3"),
    ],
)
def test_other_answers_are_wrong_but_read(response: str, truth: str) -> None:
    result = judge(response, truth)
    assert (result.value, result.outcome) == (0.0, SCORED)


@pytest.mark.parametrize("response", ["", "I do not know", "\\boxed{}", "\\boxed{unfinished"])
def test_a_response_without_answer_is_unparsable(response: str) -> None:
    result = judge(response, "5")
    assert (result.value, result.outcome, result.answer) == (0.0, UNPARSABLE, None)


def test_with_a_named_marker_nothing_else_counts_as_an_answer() -> None:
    assert judge("it is 18", "18", extraction="hash").outcome == UNPARSABLE
    assert judge("it is 18", "18", extraction="auto").value == 1.0
    assert judge("Answer: 18\nbye", "18", extraction="Answer:").value == 1.0


@pytest.mark.parametrize(
    "spellings",
    [
        ["#### 1,000", "#### 1000.0", "\\boxed{1{,}000}", "#### $1000"],
        ["\\boxed{\\frac{1}{2}}", "#### 0.5", "#### 1/2", "\\boxed{50\\%}"],
        ["\\boxed{-\\frac{3}{4}}", "#### -0.75"],
    ],
)
def test_equal_answers_vote_as_one(spellings: list[str]) -> None:
    assert len({judge(text, "1").answer for text in spellings}) == 1


def test_an_empty_ground_truth_is_an_error_and_not_a_wrong_answer() -> None:
    for truth in (None, "", "  "):
        with pytest.raises(ValueError, match="ground truth is empty"):
            judge("#### 1", truth)
    with pytest.raises(ValueError, match="holds no answer"):
        judge("#### 1", "\\boxed{}")


def test_it_works_off_the_main_thread() -> None:
    results: list[PartResult] = []
    thread = threading.Thread(
        target=lambda: results.append(judge("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"))
    )
    thread.start()
    thread.join()
    assert results[0].value == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "#### " + "1" * 200_000,
        "1," * 50_000,
        "<answer>" * 20_000 + "</answer>",
        "#### " + "a " * 100_000,
    ],
    ids=["open boxes", "digits", "commas", "tags", "words"],
)
def test_nonsense_of_any_size_ends_soon(text: str) -> None:
    start = time.monotonic()
    assert judge(text, "5", extraction="hash" if "####" in text else "boxed").value == 0.0
    assert time.monotonic() - start < 5


def test_plain_numbers_are_read_exactly() -> None:
    from fractions import Fraction

    assert plain_number("-1,234,567.25") == Fraction(-123456725, 100)
    assert plain_number("0.1") == Fraction(1, 10)
    assert plain_number("-$3") == plain_number("$-3") == -3
    for text in ("", "-", ".", "1.2.3", "12,34", "--1", "-$-1", "1e5", "x"):
        assert plain_number(text) is None, text


def solutions() -> list[tuple[str, str]]:
    """(worked solution, its final number) in GSM8K's form: our own, and the set's where it is."""
    own = [
        ("A box has 3 rows of 4.\n3 * 4 = <<3*4=12>>12.\n#### 12", "12"),
        ("A car costs 10 * 150 = <<10*150=1500>>1,500 dollars.\n#### 1,500", "1,500"),
        ("She owes 5 - 8 = <<5-8=-3>>-3.\n#### -3", "-3"),
    ]
    if GSM8K.is_file():
        rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:300]]
        own += [(row["answer"], row["answer"].rpartition("####")[2].strip()) for row in rows]
    return own


def test_every_gsm8k_solution_is_right_and_its_neighbour_number_wrong() -> None:
    for solution, final in solutions():
        assert judge(solution, final).value == 1.0, final
        assert judge(solution, solution).value == 1.0, final
        number = int(re.sub(r"[^\d-]", "", final.split(".")[0]))
        assert judge(solution, str(number + 1)).value == 0.0, final
