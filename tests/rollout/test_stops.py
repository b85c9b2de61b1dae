"""Stops against the plain way: after each token, decode the whole response and search it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import END, byte_level, sentencepiece, word_piece
from tokenizers import pre_tokenizers

from rollout.extend import ExtendSpec
from rollout.row_stops import RowStops
from rollout.stops import DecodingMatcher, StopRules, TextMatcher
from rollout.token_text import TokenText

STRINGS = ("</answer>", "好", "é", "🙂", "\n\n", " the", "e", "answer", "is <", "ïv", END)


@pytest.fixture(scope="module")
def tokenizers():
    return {"bytes": byte_level(), "pieces": sentencepiece(), "words": word_piece()}


def spec(**stops):
    return ExtendSpec(max_tokens=99, **stops)


def contains(token_ids, sequence):
    n = len(sequence)
    return any(tuple(token_ids[i : i + n]) == tuple(sequence) for i in range(len(token_ids)))


def expected_end(token_ids, tokenizer=None, strings=(), sequences=(), stop_ids=()):
    """Number of tokens after which the response must end; None if it goes on."""
    for n in range(1, len(token_ids) + 1):
        head = token_ids[:n]
        if head[-1] in stop_ids or any(contains(head, s) for s in sequences):
            return n
        if strings:
            text = tokenizer.decode(head, skip_special_tokens=False)
            if any(string in text for string in strings):
                return n
    return None


def found_end(token_ids, request, rules, cuts=(), put_back=()):
    """(number of tokens, the stop) by the product, the response in segments that are cut at
    ``cuts``; at ``put_back`` a request loses its row and starts again with what it has drawn.
    """
    response = np.array(token_ids, np.int32)
    stops, row = RowStops(3, rules), np.array([1])
    begin = 0
    stops.set(1, request, response[:0], response[:0])
    for n in range(1, len(response) + 1):
        drawn = response[begin:n]
        if stops.completed(row, response[n - 1 : n].astype(np.int64), lambda _, d=drawn: d)[0]:
            return n, stops.remove(1, drawn)
        if n in cuts or n in put_back:
            assert stops.remove(1, drawn) is None
            begin = n if n in cuts else begin
            stops.set(1, request, response[:begin], response[begin:n])
    return None, None


def random_responses(tokenizer, count, seed, length=14):
    """Token ids of shuffled scraps of text, cut anywhere, among random tokens."""
    rng = np.random.default_rng(seed)
    scraps = ["</answer>", " the answer", "你好", "🙂🙃", "naïve", "\n\n", "é", " is <", "x"]
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            scrap = tokenizer.encode(str(rng.choice(scraps)), add_special_tokens=False)
            ids += scrap[rng.integers(0, len(scrap) + 1) :][: rng.integers(1, 5)]
            ids += rng.integers(0, len(tokenizer), rng.integers(0, 2)).tolist()
        yield ids[:length]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_a_stop_string_ends_a_response_where_its_decoded_text_first_holds_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    rules = StopRules(TokenText(tokenizer))
    rng = np.random.default_rng(1)
    ended = 0
    for ids in random_responses(tokenizer, 250, seed=2):
        strings = tuple(rng.choice(STRINGS, rng.integers(1, 4), replace=False).tolist())
        expected = expected_end(ids, tokenizer, strings)
        cuts = rng.integers(1, 14, 2).tolist()
        n, reason = found_end(ids, spec(stop_strings=strings), rules, cuts, rng.integers(1, 14, 1))
        assert n == expected, (ids, strings, cuts)
        if n is not None:
            ended += 1
            assert reason in strings and reason in tokenizer.decode(ids[:n])
    assert 50 < ended < 245


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_every_place_of_two_segment_borders_finds_the_same_end(tokenizers, kind):
    tokenizer = tokenizers[kind]
    rules = StopRules(TokenText(tokenizer))
    text = "so 你 x </answer> the end"
    ids = [tokenizer.convert_tokens_to_ids(c) for c in _spelled(tokenizer, text)]
    for strings in (("</answer>",), ("你 x <",), ("r> t", "zzz"), ("end",)):
        expected = expected_end(ids, tokenizer, strings)
        assert expected is not None
        for cuts in combinations(range(1, len(ids)), 2):
            n, reason = found_end(ids, spec(stop_strings=strings), rules, cuts)
            assert (n, reason) == (expected, strings[0])


def _spelled(tokenizer, text):
    """The tokens of single bytes that make a text, so that every stop is cut everywhere."""
    if "<0x41>" in tokenizer.get_vocab():
        return ["▁" if b == 32 else f"<0x{b:02X}>" for b in text.encode()]
    alphabet = {
        TokenText(tokenizer).spell(tokenizer.convert_tokens_to_ids(c)): c
        for c in pre_tokenizers.ByteLevel.alphabet()
    }
    return [alphabet[bytes([b])] for b in text.encode()]


def test_a_stop_string_inside_one_token_and_at_its_middle_is_found(tokenizers):
    tokenizer = tokenizers["bytes"]
    rules = StopRules(TokenText(tokenizer))
    ids = tokenizer.encode("the answer is </answer>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "theĠanswer"
    assert found_end(ids, spec(stop_strings=("e ans",)), rules) == (1, "e ans")
    assert found_end(ids, spec(stop_strings=("er i",)), rules) == (2, "er i")


def test_every_place_of_two_segment_borders_finds_the_same_token_sequence():
    rng = np.random.default_rng(3)
    rules = StopRules(TokenText(None))
    for _ in range(40):
        ids = rng.integers(0, 3, 9).tolist()  # few tokens: stops overlap themselves
        sequences = tuple(tuple(rng.integers(0, 3, rng.integers(1, 5)).tolist()) for _ in range(2))
        expected = expected_end(ids, sequences=sequences)
        for cuts in combinations(range(1, 9), 2):
            n, reason = found_end(ids, spec(stop_token_sequences=sequences), rules, cuts)
            assert n == expected
            assert n is None or tuple(ids[n - len(reason) : n]) == reason


def test_a_stop_that_began_before_the_response_does_not_count(tokenizers):
    tokenizer = tokenizers["bytes"]
    rules = StopRules(TokenText(tokenizer))
    request = spec(stop_strings=("</answer>",), stop_token_sequences=((7, 8),))
    ids = tokenizer.encode("</answer>", add_special_tokens=False)
    last = np.array([ids[-1]])
    for above, drawn, ends in (
        (ids[:-1], last, True),  # the response holds what is above
        ([], last, False),  # the same tokens above are the prompt
        ([7], np.array([8]), True),
        ([], np.array([8]), False),
    ):
        stops = RowStops(1, rules)
        stops.set(0, request, np.array(above, np.int32), np.zeros(0, np.int32))
        done = stops.completed(np.array([0]), drawn, lambda _, d=drawn: d.astype(np.int32))
        assert done.tolist() == [ends]


def test_a_stop_that_an_earlier_segment_holds_does_not_fire_again(tokenizers):
    for kind in ("bytes", "words"):
        tokenizer = tokenizers[kind]
        rules = StopRules(TokenText(tokenizer))
        ids = tokenizer.encode("</answer> the end </answer>", add_special_tokens=False)
        first = expected_end(ids, tokenizer, ("</answer>",))
        stops = RowStops(1, rules)
        above, rest = np.array(ids[:first], np.int32), np.array(ids[first:], np.int32)
        stops.set(0, spec(stop_strings=("</answer>",)), above, rest[:0])
        ends = [
            bool(stops.completed(np.array([0]), rest[i : i + 1], lambda _, r=rest[: i + 1]: r)[0])
            for i in range(len(rest))
        ]
        assert ends == [False] * (len(rest) - 1) + [True]


def test_rows_with_different_stops_share_a_batch():
    rules = StopRules(TokenText(None))
    rng = np.random.default_rng(4)
    specs = [
        spec(stop_token_ids=(1,)),
        spec(),
        spec(stop_token_sequences=((2, 2),)),
        spec(stop_token_ids=(3, 0), stop_token_sequences=((2, 2), (1, 2, 1))),
        spec(stop_token_sequences=((2, 2),)),
    ]
    for _ in range(30):
        responses = rng.integers(0, 4, (len(specs), 12))
        stops, rows, ends = RowStops(9, rules), np.array([8, 3, 0, 5, 6]), {}
        for row, request in zip(rows, specs, strict=True):
            stops.set(int(row), request, np.zeros(0, np.int32), np.zeros(0, np.int32))
        drawn = {}
        for n in range(1, 13):
            alive = [i for i in range(len(specs)) if i not in ends]
            if not alive:
                break
            drawn = {int(rows[i]): responses[i, :n] for i in alive}
            done = stops.completed(rows[alive], responses[alive, n - 1], drawn.__getitem__)
            for i in np.array(alive)[done]:
                ends[int(i)] = n
                assert stops.remove(int(rows[i]), responses[i, :n]) is not None
        for i, request in enumerate(specs):
            expected = expected_end(
                responses[i].tolist(),
                sequences=request.stop_token_sequences,
                stop_ids=request.stop_token_ids,
            )
            assert ends.get(i) == expected


def test_tokens_that_spell_bytes_are_told_from_those_that_do_not(tokenizers):
    for kind, matcher in (
        ("bytes", TextMatcher),
        ("pieces", TextMatcher),
        ("words", DecodingMatcher),
    ):
        rules = StopRules(TokenText(tokenizers[kind]))
        (found,) = rules.matchers(spec(stop_strings=("a",)))
        assert type(found) is matcher
        assert rules.matchers(spec(stop_strings=("a",))) == [found]  # shared, not built again


def test_the_shipped_models_tokens_spell_bytes():
    folder = Path(__file__).resolve().parents[2] / "treepo" / "assets" / "tiny_chain_sum"
    text = TokenText(folder)
    assert text.spells_bytes
    assert "".join(text.spell(i).decode() for i in range(20)) == text.decode(np.arange(20))


def test_the_whole_byte_alphabet_is_spelled(tokenizers):
    text = TokenText(tokenizers["bytes"])
    ids = tokenizers["bytes"].convert_tokens_to_ids(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(text.spell(i) for i in ids) == [bytes([b]) for b in range(256)]
    text = TokenText(tokenizers["pieces"])
    ids = tokenizers["pieces"].convert_tokens_to_ids([f"<0x{b:02X}>" for b in range(256)])
    assert [text.spell(i) for i in ids] == [bytes([b]) for b in range(256)]


def test_stop_strings_without_a_tokenizer_are_an_error_and_token_sequences_are_not(tmp_path):
    StopRules(TokenText(None)).matchers(spec(stop_token_sequences=((1, 2),)))
    with pytest.raises(ValueError, match="stop_strings need the model's tokenizer"):
        StopRules(TokenText(None)).matchers(spec(stop_strings=("a",)))
    with pytest.raises(ValueError, match="none can be loaded from"):
        StopRules(TokenText(tmp_path)).matchers(spec(stop_strings=("a",)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(stop_strings=("",)),
        dict(stop_strings=("a\ufffd",)),
        dict(stop_token_sequences=((),)),
        dict(stop_token_sequences=((1, -1),)),
        dict(ban_token_ids=(-1,)),
        dict(repetition_penalty=0.0),
        dict(num_response_tokens=-1),
        dict(num_top_logprobs=-1),
    ],
)
def test_specs_that_make_no_sense_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        spec(**changes)
