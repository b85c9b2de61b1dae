"""Worked answers to chain sums: hand-computed strings, and a digit-column oracle for the slips."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.reasoning_gym import make_dataset
from treepo.demonstrations import (
    ANSWER_MARKER,
    add_without_carry,
    carries_or_borrows,
    demonstrate,
    number_terms,
    parse_chain,
)

QUESTION = "State the final answer to the following arithmetic problem: {} ="


def _demonstrate(chain: str, error_prob: float, seed: int = 0) -> str:
    return demonstrate(QUESTION.format(chain), error_prob=error_prob, rng=random.Random(seed))


def test_a_chain_is_read_with_its_operators_and_signs() -> None:
    assert parse_chain(QUESTION.format("4 - 13 + -7")) == [("+", 4), ("-", 13), ("+", -7)]
    assert parse_chain("-3 + 4 =") == [("+", -3), ("+", 4)]


def test_a_question_without_a_chain_is_an_error_that_says_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="no chain sum.*7 \\+ 15"):
        parse_chain("How many apples are left?")


@pytest.mark.parametrize(
    ("chain", "right", "slipped"),
    [
        ("12 + 5 - 3", "12 + 5 = 17 - 3 = 14\n#### 14", "12 + 5 = 17 - 3 = 14\n#### 14"),
        ("7 + 15 - 4", "7 + 15 = '22 - 4 = '18\n#### 18", "7 + 15 = 12 - 4 = 18\n#### 18"),
        ("22 - 5", "22 - 5 = '17\n#### 17", "22 - 5 = 27\n#### 27"),
        ("5 - 12", "5 - 12 = '-7\n#### -7", "5 - 12 = -17\n#### -17"),
        ("3 - 8 - 6", "3 - 8 = -5 - 6 = '-11\n#### -11", "3 - 8 = -5 - 6 = -1\n#### -1"),
        ("4 - 16 + 8", "4 - 16 = -12 + 8 = '-4\n#### -4", "4 - 16 = -12 + 8 = -14\n#### -14"),
        ("95 + 7", "95 + 7 = '102\n#### 102", "95 + 7 = 92\n#### 92"),
        ("8 - 8 + 2", "8 - 8 = 0 + 2 = 2\n#### 2", "8 - 8 = 0 + 2 = 2\n#### 2"),
        ("4 + -5", "4 + -5 = -1\n#### -1", "4 + -5 = -1\n#### -1"),
    ],
)
def test_hand_computed_answers(chain: str, right: str, slipped: str) -> None:
    assert _demonstrate(chain, 0.0) == right
    assert _demonstrate(chain, 1.0) == slipped


@given(st.integers(-999, 999), st.integers(-999, 999))
def test_the_slip_is_paper_arithmetic_whose_tens_never_hear_of_the_units(a: int, b: int) -> None:
    if (a >= 0) == (b >= 0):
        tens, units = abs(a) // 10 + abs(b) // 10, (abs(a) % 10 + abs(b) % 10) % 10
        expected = (1 if a >= 0 else -1) * (10 * tens + units)
    else:
        large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
        tens, units = large // 10 - small // 10, (large % 10 - small % 10) % 10
        expected = (1 if a + b >= 0 else -1) * (10 * tens + units)
    assert add_without_carry(a, b) == expected
    assert carries_or_borrows(a, b) == (expected != a + b)
    assert abs(expected - (a + b)) in (0, 10)


def test_without_slips_the_library_calls_every_answer_right() -> None:
    data = make_dataset("chain_sum", {"seed": 5, "size": 200, "min_terms": 2, "max_terms": 7})
    for row in data:
        answer = demonstrate(row["question"], error_prob=0.0, rng=random.Random(0))
        assert data.score_answer(answer.split(ANSWER_MARKER)[1], row) == 1.0


def test_slips_come_at_the_asked_rate_and_only_where_a_step_carries_or_borrows() -> None:
    slips = [_demonstrate("7 + 5", 0.3, seed) == "7 + 5 = 2\n#### 2" for seed in range(2000)]
    assert sum(slips) / len(slips) == pytest.approx(0.3, abs=0.035)
    assert all(_demonstrate("12 + 5", 0.9, seed).endswith("#### 17") for seed in range(50))


def test_the_same_generator_state_gives_the_same_demonstration() -> None:
    chain = "17 + 15 - 18 + 19 - 16"
    answers = [_demonstrate(chain, 0.5, seed) for seed in range(20)]
    assert answers == [_demonstrate(chain, 0.5, seed) for seed in range(20)]
    assert len(set(answers)) > 1


def test_a_numbered_chain_names_every_term_but_the_first() -> None:
    assert number_terms(QUESTION.format("7 + 15 - 4")) == QUESTION.format("7 (2) + 15 (3) - 4")
    assert number_terms("Add 3 things: -3 + -4 = ?") == "Add 3 things: -3 (2) + -4 = ?"
    answer = demonstrate("7 + 15 - 4 =", error_prob=0.0, rng=random.Random(0), numbered=True)
    assert answer == "7 (2) + 15 = '22 (3) - 4 = '18\n#### 18"


def test_slips_confined_to_some_terms_happen_nowhere_else() -> None:
    def answer(error_terms: list[int]) -> str:
        return demonstrate(
            "7 + 15 - 4 + 19 =", error_prob=1.0, rng=random.Random(0), error_terms=error_terms
        )

    assert answer([]) == "7 + 15 = 12 - 4 = 18 + 19 = 27\n#### 27" == answer([4, 15, 19])
    assert answer([19]) == "7 + 15 = '22 - 4 = '18 + 19 = 27\n#### 27"
    assert answer([3]) == "7 + 15 = '22 - 4 = '18 + 19 = '37\n#### 37"
