r"""Each cleaning rule on problems made by hand, with what is to become of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treepo.cleaning.equality import same_answer
from treepo.cleaning.records import Change, CleanItem, Drop
from treepo.cleaning.run import clean
from treepo.cleaning.settings import (
    DEFAULT_RULES,
    RULES,
    Contradicted,
    Duplicates,
    LongAnswer,
    Mastered,
    MultiPart,
    MultipleChoice,
    RuleSettings,
    check_rules,
)
from treepo.cleaning.texts import normalised

DROP = "drop"
KEEP = None


def problem(question: str, answer: str | None = "7", number: int = 0, **fields) -> CleanItem:
    known = {
        "id": f"rows.jsonl:{number}",
        "where": f"rows.jsonl:{number + 1}",
        "question": question,
        "context": "",
        "answer": answer,
        "truth": json.dumps(answer),
        "original_question": question,
        "columns": {},
    }
    return CleanItem(**{**known, **fields})


def outcome(rule: str, question: str, answer: str | None = "7", settings=None):
    """What a rule makes of one problem: ``DROP``, ``KEEP``, or (question, answer) changed."""
    (found,) = RULES.get(rule)([problem(question, answer)], settings or RuleSettings())
    if isinstance(found, Drop):
        return DROP
    if isinstance(found, Change):
        new = question if found.question is None else found.question
        return new, answer if found.answer is None else found.answer
    return found


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Let f(x) = x^2. (a) Find f(2). (b) Find f(3).", DROP),
        ("A box holds 5 balls.\n(i) What is the mean?\n(ii) What is the variance?", DROP),
        ("Consider n = 6.\n1. Compute n!.\n2. How many divisors has it?", DROP),
        ("Part A: Solve x = 2. Part B: Solve x = 3.", DROP),
        ("How old is Ann? How old is Bob? How old is Carl?", DROP),
        ("A number n satisfies: (a) n is even, (b) n > 10, (c) n is prime to 15. Find n.", KEEP),
        ("Steps: (1) add 2; (2) halve it. What do I get from 4?", KEEP),
        ("Find f(a) + f(b) if f(x) = x.", KEEP),
        ('He said: "Why?" How much did he pay?', KEEP),
        ("What is 2 + 3?", KEEP),
    ],
)
def test_questions_with_several_parts_are_dropped(question, expected):
    assert outcome("multi_part", question) == expected


def test_the_limits_of_parts_and_questions_are_settings():
    two = "(a) Find x. (b) Find y."
    lenient = RuleSettings(multi_part=MultiPart(min_parts=3, max_questions=0))
    assert outcome("multi_part", two) == DROP
    assert outcome("multi_part", two, settings=lenient) is KEEP
    assert outcome("multi_part", "Is it? Is it? Is it? Is it?", settings=lenient) is KEEP


SUM = "What is 2 + 3?"
INLINE = SUM + " (A) 4 (B) 5 (C) 6 (D) 7"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        (INLINE, "B", (SUM, "5")),
        (INLINE, "(b)", (SUM, "5")),
        (INLINE, "The correct answer is B.", (SUM, "5")),
        (INLINE, "(B) 5", (SUM, "5")),
        (INLINE, "5", (SUM, "5")),
        (INLINE, "(B) 6", DROP),  # letter and text differ
        (INLINE, "E", DROP),
        (INLINE, "12", DROP),
        (SUM + "\nA. 4\nB. 5\nC. 6", "C", (SUM, "6")),
        (SUM + "\nOptions:\na) 4\nb) 5\nc) 6\nAnswer with a letter.", "c", (SUM, "6")),
        (SUM + "\nA. 4\nB. 5\nC. 6\nNow double the sum.", "C", DROP),
        (
            SUM + r" $\textbf{(A)}\ 4 \qquad \textbf{(B)}\ \frac{1}{2} \qquad \textbf{(C)}\ 6$",
            "B",
            (SUM, r"\frac{1}{2}"),
        ),
        (SUM + " (A) $x+1$ (B) $x-1$ (C) $x$", "A", (SUM, "x+1")),
        ("Which of the following is prime? (A) 4 (B) 5 (C) 6", "B", DROP),
        ("Which number is closest to 5.2? (A) 4 (B) 5 (C) 6", "B", DROP),
        (SUM + " (A) 4 (B) 6 (C) none of the above", "C", DROP),
        (SUM + " (A) 4 (B) 5", "B", KEEP),  # fewer than three
        ("P(A) = 0.5, P(B) = 0.2, P(C) = 0.1, independent. Find P(A and B).", "0.1", KEEP),
        ("Find f(a), given f(b) = 2 and f(c) = 3.", "1", KEEP),
        (SUM, "5", KEEP),
    ],
)
def test_multiple_choice_becomes_a_short_answer_or_goes(question, answer, expected):
    assert outcome("multiple_choice", question, answer) == expected


def test_the_number_of_options_is_a_setting_and_other_truths_are_left_alone():
    two = RuleSettings(multiple_choice=MultipleChoice(min_options=2))
    assert outcome("multiple_choice", SUM + " (A) 4 (B) 5", "B", two) == (SUM, "5")
    assert outcome("multiple_choice", INLINE, None) is KEEP


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Prove that the square root of 2 is irrational.", "proof", DROP),
        ("Let n be odd. Show that $n^2 - 1$ is divisible by 8.", "", DROP),
        (
            "A square has side 3. Prove that the area of the square is 9.",
            "see below",
            ("A square has side 3. Find the area of the square.", "9"),
        ),
        (
            r"Show that $\int_0^1 2x\,dx = 1$.",
            "QED",
            (r"Find $\int_0^1 2x\,dx$.", "1"),
        ),
        (
            r"Prove that the limit equals $\frac{1}{2}$.",
            "QED",
            ("Find the limit.", r"\frac{1}{2}"),
        ),
        ("Prove that the sum is 9. Prove that the product is 8.", "QED", DROP),
        ("Show that f is even. Hence find f(3) given f(-3) = 7.", "7", KEEP),
        ("Results show that 5 of 10 failed. How many passed?", "5", KEEP),
        ("What is 10 proof in percent?", "5", KEEP),
        ("Show your work. What is 2 + 3?", "5", KEEP),
    ],
)
def test_proofs_become_values_where_one_is_to_be_proved(question, answer, expected):
    assert outcome("proof", question, answer) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is 7 prime?", "Yes", DROP),
        ("Is 9 prime?", "\\text{No}", KEEP),  # shortened before
        ("True or false: 2 + 2 = 4", "T", DROP),
        ("The sky is green.", "False.", DROP),
        ("Is there such an n? If so, find it.", "Yes, 12", ("Is there such an n? If so, find it.",
                                                           "12")),
        ("Is there such an n?", "Yes, since 12 is one", DROP),
        ("How many primes are below 10?", "4", KEEP),
        ("Who is right?", "Nobody", KEEP),
    ],
)  # fmt: skip
def test_true_and_false_are_no_answers(question, answer, expected):
    assert outcome("true_false", question, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"We add: 2 + 3. So \boxed{\frac{5}{1}}.", r"\frac{5}{1}"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("<think>hm</think><answer> 5 </answer>", "5"),
        ("The answer is 5.", "5"),
        ("Therefore, the final answer is: $x = 5$.", "5"),
        (r"$\text{east}$", "east"),
        (r"\(\frac{1}{2}\)", r"\frac{1}{2}"),
        (r"x_1 = \frac{3}{4}", r"\frac{3}{4}"),
        (r"f(x) = -2\sqrt{3}", r"-2\sqrt{3}"),
        ("5.", "5"),
        ("18", "18"),
        ("y = 2x + 1", "y = 2x + 1"),  # an equation is the answer
        ("x = 1, y = 2", "x = 1, y = 2"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("1, 2, ...", "1, 2, ..."),
        ("3.5", "3.5"),
        ("$12", "$12"),
    ],
)
def test_answers_are_shortened_but_say_the_same(answer, expected):
    assert outcome("shorten_answer", "", answer) == (KEEP if expected == answer else ("", expected))
    assert outcome("shorten_answer", "", expected) is KEEP


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", DROP),
        (r"A = \begin{bmatrix}1\\2\end{bmatrix}", DROP),
        ("[[1, 2], [3, 4]]", DROP),
        ("[1, 2]", KEEP),
        ("(1, 2)", KEEP),
        ("(1, 2), (3, 4)", KEEP),
        (r"\begin{cases} 1 \\ 2 \end{cases}", KEEP),
    ],
)
def test_matrices_are_dropped(answer, expected):
    assert outcome("matrix_answer", "", answer) == expected


def test_long_answers_are_dropped_by_characters_and_words():
    assert outcome("long_answer", "", "1+" * 50) is KEEP  # 100 characters
    assert outcome("long_answer", "", "1+" * 50 + "1") == DROP
    assert outcome("long_answer", "", "it is the set of all points that are even") == DROP
    assert outcome("long_answer", "", r"\frac{\sqrt{a}}{\left(b\right)} + \pi \cdot x") is KEEP
    strict = RuleSettings(long_answer=LongAnswer(max_characters=3, max_words=0))
    assert outcome("long_answer", "", "1234", strict) == DROP
    assert outcome("long_answer", "", "red", strict) == DROP
    assert outcome("long_answer", "", "123", strict) is KEEP


def kept(rule: str, items: list[CleanItem], settings: RuleSettings | None = None) -> list[int]:
    found = RULES.get(rule)(items, settings or RuleSettings())
    return [i for i, verdict in enumerate(found) if verdict is None]


def test_the_first_of_equal_questions_stays():
    items = [problem("What is 2 + 3?"), problem("What is 2+3"), problem("What is 2 + 3?")]
    items += [problem("What is 2 - 3?"), problem("What is 2 + 3?", context="Think in base 3.")]
    assert kept("exact_duplicate", items) == [0, 1, 3, 4]
    assert kept("near_duplicate", items) == [0, 3, 4]


def test_equal_questions_with_other_answers_all_go_unless_the_first_is_to_be_kept():
    items = [problem("Q", "1"), problem("Q", "$1$"), problem("R", "1"), problem("R", "2")]
    assert kept("exact_duplicate", items) == [0]
    first = RuleSettings(duplicates=Duplicates(on_conflict="keep_first"))
    assert kept("exact_duplicate", items, first) == [0, 2]


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("What  is $1,000$ + 2?", "what is 1000+2", True),
        (r"Find \left( x^{2} \right).", "find (x^2)", True),
        ("Is 3.5 > 3?", "Is 35 > 3?", False),
        ("(a+b)c", "a+(bc)", False),
        ("2 - 3", "2 + 3", False),
        ("x_1", "x_2", False),
        ("Find f(2).", "Find f'(2).", False),
        ("Find f'(2).", "Find f''(2).", False),
        ("Find f'(2).", "Find f\u2032(2).", True),
        ("What is John's age?", "What is John\u2019s age?", True),
        ("x \u2264 3", "x \u2265 3", False),
        ("\u221a2", "2", False),
        ("\u22125", "5", False),
        ("\u22125", "-5", True),
        ("\u00b12", "2", False),
        ("3\u00b2", "32", False),
        ("3\u00b2", "3^{2}", True),
        ("A \u222a B", "A \u2229 B", False),
    ],
)
def test_normalised_texts_are_equal_where_they_ask_the_same(one, other, are_equal):
    assert (normalised(one) == normalised(other)) is are_equal


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(number: int, correct: bool | None, **fields) -> dict:
    return {"problem_id": f"rows.jsonl:{number}", "correct": correct, **fields}


def test_problems_that_are_always_solved_are_dropped_by_samples(tmp_path):
    rows = [sample(0, True) for _ in range(4)]  # always
    rows += [sample(1, i > 0) for i in range(4)]  # 3 of 4
    rows += [sample(2, True) for _ in range(3)]  # too few
    rows += [sample(3, True if i else None) for i in range(5)]  # 4 judged of 5
    file = write(tmp_path / "samples.jsonl", *rows)
    items = [problem(f"Q{i}", number=i) for i in range(5)]
    settings = RuleSettings(mastered=Mastered(samples=[file]))
    assert kept("mastered", items, settings) == [1, 2, 4]
    lower = Mastered(samples=[file], max_pass_rate=0.75, min_samples=3)
    assert kept("mastered", items, RuleSettings(mastered=lower)) == [4]


def test_problems_that_are_always_solved_are_dropped_by_a_column():
    columns = [{"extra_info": {"pass_rate": rate}} for rate in (1.0, 0.5, 1, None)]
    items = [problem(f"Q{i}", number=i, columns=c) for i, c in enumerate([*columns, {}])]
    settings = RuleSettings(mastered=Mastered(pass_rate_column="extra_info.pass_rate"))
    assert kept("mastered", items, settings) == [1, 3, 4]
    wrong = problem("Q", columns={"extra_info": {"pass_rate": 80}})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: extra_info\.pass_rate=80"):
        kept("mastered", [wrong], settings)


def test_samples_of_another_file_are_refused_where_they_stand(tmp_path):
    items = [problem("What is 2 + 3?")]
    file = write(tmp_path / "other.jsonl", {"problem_id": "test.jsonl:0", "correct": True})
    with pytest.raises(ValueError, match=r"no row is of a file.*'rows\.jsonl:0'"):
        kept("mastered", items, RuleSettings(mastered=Mastered(samples=[file])))
    of_dropped = write(tmp_path / "dropped.jsonl", sample(9, True))  # by an earlier rule
    assert kept("mastered", items, RuleSettings(mastered=Mastered(samples=[of_dropped]))) == [0]
    asked = "<user>What is {}?<assistant>"
    rows = [sample(0, True, prompt=asked.format(sum_)) for sum_ in ("2 + 3", "4 + 4")]
    file = write(tmp_path / "samples.jsonl", *rows)
    with pytest.raises(
        ValueError, match=r"samples\.jsonl:2: the prompt of problem 'rows\.jsonl:0'"
    ):
        kept("mastered", items, RuleSettings(mastered=Mastered(samples=[file])))
    file = write(tmp_path / "bad.jsonl", {"problem_id": "rows.jsonl:0"})
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: .*correct is missing"):
        kept("mastered", items, RuleSettings(mastered=Mastered(samples=[file])))
    with pytest.raises(ValueError, match="'none.jsonl' does not exist"):
        kept("mastered", items, RuleSettings(mastered=Mastered(samples=["none.jsonl"])))


def said(number: int, model: str, answer: str | None) -> dict:
    return {"problem_id": f"rows.jsonl:{number}", "model": model, "answer": answer}


def test_references_that_agreeing_models_contradict_are_dropped(tmp_path):
    rows = [said(0, m, "5") for m in "ab"]  # as the reference
    rows += [said(1, "a", "6"), said(1, "b", r"\boxed{6.0}")]  # both another
    rows += [said(2, "a", "6"), said(2, "b", "8")]  # they differ
    rows += [said(3, "a", "6"), said(3, "a", "6"), said(3, "b", None)]  # one model
    rows += [said(4, "a", a) for a in ("9", "6", "6")] + [said(4, "b", "6")]  # by majority
    file = write(tmp_path / "answers.jsonl", *rows)
    items = [problem(f"Q{i}", "5", number=i) for i in range(6)]
    settings = RuleSettings(contradicted=Contradicted(answers=[file]))
    assert kept("contradicted", items, settings) == [0, 2, 3, 5]
    three = Contradicted(answers=[file], min_models=3)
    assert kept("contradicted", items, RuleSettings(contradicted=three)) == [0, 1, 2, 3, 4, 5]
    alone = Contradicted(answers=[file], min_models=1)
    assert kept("contradicted", items, RuleSettings(contradicted=alone)) == [0, 2, 5]


def test_two_of_three_agree_enough_where_that_is_asked_for(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", {"problem_id": "rows.jsonl:0", "answer": a})
             for n, a in enumerate(("6", "6", "5"))]  # fmt: skip
    items = [problem("Q", "5")]
    for share, left in ((1.0, [0]), (0.6, [])):
        settings = RuleSettings(contradicted=Contradicted(answers=files, min_agreement=share))
        assert kept("contradicted", items, settings) == left


@pytest.mark.parametrize(
    ("reference", "answer", "are_same"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        ("1,000", "1000", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("east", "East", True),
        ("5", "6", False),
        ("east", "west", False),
        ("x+1", "x+2", False),
    ],
)
def test_answers_are_the_same_where_the_verifier_says_so(reference, answer, are_same):
    assert same_answer(reference, answer) is are_same


def test_rules_run_one_after_the_other_and_every_problem_is_accounted_for():
    questions = [(INLINE, "B"), (SUM, "The answer is 5."), (SUM, "5"), ("Prove it.", "x"),
                 ("What is 3 * 4?", "12")]  # fmt: skip
    items = [problem(q, a, number=i) for i, (q, a) in enumerate(questions)]
    rules = {name: RULES.get(name) for name in DEFAULT_RULES}
    cleaned = clean(items, rules, RuleSettings())
    # The multiple-choice question becomes the same as the next two, with the same answer.
    assert [item and item.answer for item in cleaned.items] == ["5", None, None, None, "12"]
    counts = cleaned.counts()
    numbers = {"read": 5, "unchanged": 1, "changed": 1, "dropped": 3}
    assert {name: counts[name] for name in numbers} == numbers
    assert counts["rules"]["shorten_answer"]["changed"] == 1
    assert counts["rules"]["exact_duplicate"]["reasons"] == {"the same question": 2}
    assert counts["rules"]["proof"] == {
        "looked_at": 5,
        "changed": 0,
        "dropped": 1,
        "reasons": {"asks for a proof": 1},
    }
    assert sum(rule["dropped"] for rule in counts["rules"].values()) == counts["dropped"]


def test_cleaning_what_was_cleaned_changes_nothing():
    made = [
        mark.args[1]
        for test in (
            test_questions_with_several_parts_are_dropped,
            test_multiple_choice_becomes_a_short_answer_or_goes,
            test_proofs_become_values_where_one_is_to_be_proved,
            test_true_and_false_are_no_answers,
        )
        for mark in test.pytestmark
    ]
    cases = [(case[0], case[1] if len(case) == 3 else "7") for table in made for case in table]
    items = [problem(q, a, number=i) for i, (q, a) in enumerate(cases) if a]
    rules = {name: RULES.get(name) for name in DEFAULT_RULES}
    settings = RuleSettings(duplicates=Duplicates(on_conflict="keep_first"))
    once = clean(items, rules, settings)
    left = [item for item in once.items if item is not None]
    assert 10 < len(left) < len(items)
    again = clean(left, rules, settings)
    assert list(again.items) == left and not again.events


def test_a_rule_that_forgets_a_problem_or_says_nonsense_is_named():
    items = [problem("Q"), problem("R", number=1)]
    with pytest.raises(ValueError, match="'mine' gave 1 outcomes for 2 problems"):
        clean(items, {"mine": lambda items, settings: [None]}, RuleSettings())
    with pytest.raises(ValueError, match=r"'mine' gave str for rows\.jsonl:1"):
        clean(items, {"mine": lambda items, settings: ["drop", None]}, RuleSettings())
    empty = Change(reason="", answer=" ")
    with pytest.raises(ValueError, match=r"left rows\.jsonl:1 without question or answer"):
        clean(items, {"mine": lambda items, settings: [empty, None]}, RuleSettings())


@pytest.mark.parametrize(
    ("rules", "settings", "words"),
    [
        ([], RuleSettings(), "rules is empty"),
        (["proofs"], RuleSettings(), "Did you mean 'proof'"),
        (["proof", "proof"], RuleSettings(), "twice"),
        (["mastered"], RuleSettings(), "which needs settings.mastered.samples"),
        (["proof"], RuleSettings(mastered=Mastered(samples=["x"])), "does not name 'mastered'"),
        (["contradicted"], RuleSettings(), "which needs settings.contradicted.answers"),
    ],
)
def test_rules_that_cannot_work_are_refused_before_they_do(rules, settings, words):
    with pytest.raises(ValueError, match=words):
        check_rules(rules, settings)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MultipleChoice(min_options=1), "min_options=1: it must be >= 2"),
        (lambda: MultiPart(max_questions=-1), "max_questions=-1"),
        (lambda: LongAnswer(max_characters=0), "max_characters=0"),
        (lambda: Mastered(max_pass_rate=0.0), r"max_pass_rate=0.0: it must be in \(0, 1\]"),
        (lambda: Mastered(samples=["x"], pass_rate_column="y"), "both set"),
        (lambda: Contradicted(min_agreement=0.5), r"min_agreement=0.5: it must be in \(0.5, 1\]"),
        (lambda: Duplicates(on_conflict="drop"), "one of drop_all, keep_first"),
    ],
)
def test_thresholds_out_of_range_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
