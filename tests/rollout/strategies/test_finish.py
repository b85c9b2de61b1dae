import pickle

import numpy as np
import pytest

from rollout.strategies.finish import (
    BoxedAnswer,
    answer_detectors,
    contains_any,
    has_complete_box,
    is_repetitive,
)
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO


def ids(*tokens):
    return np.array(tokens, dtype=np.int32)


def repetitive_by_text(token_ids, ngram, count):
    """``str.count`` counts without overlap: letters stand for tokens."""
    text = "".join(chr(97 + token) for token in token_ids)
    grams = {text[i : i + ngram] for i in range(len(text) - ngram + 1)}
    return any(text.count(gram) >= count for gram in grams)


def test_repetition_agrees_with_counting_in_text():
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(500):
        ngram, count = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        token_ids = rng.integers(0, rng.integers(1, 5), rng.integers(0, 40)).astype(np.int32)
        expected = repetitive_by_text(token_ids, ngram, count)
        assert is_repetitive(token_ids, ngram=ngram, count=count) == expected
        outcomes.add(expected)
    assert outcomes == {True, False}


def test_overlapping_occurrences_count_once():
    assert not is_repetitive(ids(*[5] * 7), ngram=4, count=2)
    assert is_repetitive(ids(*[5] * 8), ngram=4, count=2)


def test_occurrences_need_not_follow_each_other():
    assert is_repetitive(ids(1, 2, 9, 8, 1, 2, 7, 1, 2), ngram=2, count=3)
    assert not is_repetitive(ids(1, 2, 9, 8, 1, 2, 7, 2, 1), ngram=2, count=3)


def test_token_sequences_are_found_anywhere_and_only_whole():
    assert contains_any(ids(4, 30, 31), [[9], [30, 31]])
    assert contains_any(ids(30, 31, 4), [[30, 31]])
    assert not contains_any(ids(30, 4, 31), [[30, 31]])
    assert not contains_any(ids(30), [[30, 31]])
    assert not contains_any(ids(), [[30]])


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        (r"so \boxed{42}", True),
        (r"so \boxed{\frac{1}{2}} and more", True),
        (r"so \boxed{\frac{1}{2}", False),
        (r"so \boxed{42", False),
        (r"so \boxed{", False),
        (r"so \boxed{} and \boxed{ }", False),
        (r"first \boxed{} then \boxed{7}", True),
        (r"\boxed{\{1, 2\}}", True),
        (r"\boxed{1\}", False),
        (r"boxed{42}", False),
        ("", False),
    ],
)
def test_an_answer_is_a_box_whose_braces_close(text, complete):
    assert has_complete_box(text) is complete


def test_a_box_is_found_in_the_text_of_the_whole_response(letters, drive):
    """Segments of four characters: \\boxed{4} runs over three of them."""
    folder, ids_of = letters
    text = r"= \boxed{4} = 44 = 4 = 4"

    def script(context, request):
        done = len(context) - 3
        return [ids_of[c] for c in text[done : done + request.spec.max_tokens]]

    settings = TreePOSettings(
        n=2, segment_length=4, max_depth=6, max_response_length=24, finish="boxed_as_eos",
        answer_tokenizer=folder, repetition_count=0,
    )  # fmt: skip
    tree = drive.grow(TreePO(settings), drive.prompt(), drive.ScriptedEngine(script))
    assert {tree.segments[leaf].finish_reason for leaf in tree.leaves} == {"answer"}
    assert {tree.segments[leaf].level for leaf in tree.leaves} == {3}


def test_the_box_detector_travels_without_its_tokenizer(letters):
    folder, ids_of = letters
    detector = BoxedAnswer(folder)
    response = np.array([ids_of[c] for c in r"\boxed{4}"], dtype=np.int32)
    assert detector(response) and not detector(response[:-1])
    copy = pickle.loads(pickle.dumps(detector))
    assert copy._loaded is None and copy(response)


def test_your_own_detector_goes_in_by_path(tmp_path, drive):
    file = tmp_path / "detect.py"
    file.write_text("def ends_in_nine(token_ids):\n    return token_ids[-1] == 9\n")
    settings = TreePOSettings(
        n=2, segment_length=2, max_depth=4, max_response_length=8, finish="boxed_as_eos",
        answer_detector=f"{file}:ends_in_nine",
    )  # fmt: skip
    (detector,) = answer_detectors(settings)
    assert detector(ids(3, 9)) and not detector(ids(9, 3))
    strategy = TreePO(settings)
    tree = drive.grow(
        strategy, drive.prompt(), drive.ScriptedEngine(lambda c, r: [3, 9 if r.level == 3 else 4])
    )
    assert {tree.segments[leaf].finish_reason for leaf in tree.leaves} == {"answer"}
    assert {tree.segments[leaf].level for leaf in tree.leaves} == {3}
