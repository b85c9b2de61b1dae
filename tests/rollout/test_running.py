"""The table of running requests: mixed settings in one batch, rows that leave and come back."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_tokenizers import of_pieces

from rollout.extend import ExtendSpec
from rollout.running import Drawn, RunningTable
from rollout.stops import StopRules
from rollout.token_text import TokenText
from treepo.base.keys import Purpose, uniform

VOCABULARY = 17


def new_table(num_rows, tokenizer=None):
    return RunningTable(num_rows, StopRules(TokenText(tokenizer)))


def random_spec(rng):
    """Any mixture of settings."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.4 else otherwise

    return ExtendSpec(
        max_tokens=int(rng.integers(1, 90)),
        temperature=float(rng.choice([0.0, 0.6, 1.0, 1.0])),
        top_p=maybe(0.8, 1.0),
        top_k=maybe(int(rng.integers(1, 9)), 0),
        min_p=maybe(0.05, 0.0),
        repetition_penalty=maybe(1.3, 1.0),
        ban_token_ids=maybe(tuple(rng.integers(0, 9, rng.integers(1, 4)).tolist()), ()),
        stop_token_ids=maybe((16,), ()),
        stop_token_sequences=maybe(tuple(map(tuple, rng.integers(9, 16, (6, 2)).tolist())), ()),
        num_response_tokens=int(rng.integers(0, 4)),
        num_top_logprobs=maybe(int(rng.integers(1, 5)), 0),
        wants_entropy=bool(maybe(True, False)),
    )


class Requests:
    """Requests whose logits depend on their number and on what they have drawn."""

    def __init__(self, seed, count):
        rng = np.random.default_rng(seed)
        self.specs = [random_spec(rng) for _ in range(count)]
        self.paths = [
            rng.integers(0, VOCABULARY, rng.integers(4, 9)).astype(np.int32) for _ in range(count)
        ]
        self.keys = rng.integers(0, 1 << 63, count, dtype=np.uint64)

    def logits(self, number, drawn):
        seed = [number, len(drawn), int(drawn[-1]) if len(drawn) else 99]
        return np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32)

    def add(self, table, number, drawn=None):
        spec, path = self.specs[number], self.paths[number]
        drawn = Drawn.nothing(spec) if drawn is None else drawn
        return table.add(len(path), spec, int(self.keys[number]), drawn, path)

    def step(self, table, rows_of, numbers):
        """One token for each of ``numbers``; returns those that are over."""
        rows = np.array([rows_of[n] for n in numbers])
        logits = np.stack([self.logits(n, table.token_ids(rows_of[n], 0)) for n in numbers])
        stopped, full = table.record(rows, table.draw(rows, torch.from_numpy(logits)))
        return [n for n, over in zip(numbers, stopped | full, strict=True) if over]

    def alone(self, number):
        table = new_table(1)
        row = self.add(table, number)
        while not self.step(table, {number: row}, [number]):
            pass
        return table.remove(row)


def assert_same(ours, theirs):
    for name in Drawn.__slots__:
        a, b = getattr(ours, name), getattr(theirs, name)
        if isinstance(a, np.ndarray):
            assert np.array_equal(a, b) and a.dtype == b.dtype, name
        else:
            assert a == b, name


@pytest.mark.parametrize("seed", range(4))
def test_mixed_settings_in_one_batch_give_what_each_gives_alone(seed):
    count = 24
    requests, rng = Requests(seed, count), np.random.default_rng(seed)
    expected = [requests.alone(n) for n in range(count)]
    table, rows_of, waiting, done = new_table(9), {}, list(range(count)), {}
    put_back: dict[int, Drawn] = {}
    while len(done) < count:
        while waiting and len(rows_of) < 9:
            number = waiting.pop(0)
            rows_of[number] = requests.add(table, number, put_back.pop(number, None))
        numbers = [n for n in rows_of if rng.random() < 0.9]
        for number in requests.step(table, rows_of, numbers) if numbers else ():
            done[number] = table.remove(rows_of.pop(number))
        if rows_of and rng.random() < 0.1:
            number = int(rng.choice(list(rows_of)))
            put_back[number] = table.remove(rows_of.pop(number))
            waiting.insert(0, number)
    for number, drawn in done.items():
        assert_same(drawn, expected[number])
    assert any(d.stop_reason == 16 for d in expected)
    assert any(isinstance(d.stop_reason, tuple) for d in expected)
    assert any(d.stop_reason is None for d in expected)


def test_what_is_not_asked_for_is_none_and_what_is_asked_for_has_its_shape():
    requests = Requests(0, 3)
    requests.specs = [
        ExtendSpec(max_tokens=5),
        ExtendSpec(max_tokens=5, wants_entropy=True),
        ExtendSpec(max_tokens=5, num_top_logprobs=3),
    ]
    table = new_table(3)
    rows_of = {n: requests.add(table, n) for n in range(3)}
    while not requests.step(table, rows_of, [0, 1, 2]):
        pass
    plain, entropy, top = [table.remove(rows_of[n]) for n in range(3)]
    assert plain.entropy is None and plain.top_token_ids is None and plain.top_logprobs is None
    assert entropy.entropy.shape == (5,) and (entropy.entropy > 0).all()
    assert top.top_token_ids.shape == top.top_logprobs.shape == (5, 3)
    for i in range(5):
        logits = torch.from_numpy(requests.logits(2, top.token_ids[:i])).double()
        values, tokens = torch.log_softmax(logits, 0).topk(3)
        assert np.array_equal(top.top_token_ids[i], tokens)
        assert np.abs(top.top_logprobs[i] - values.numpy()).max() < 1e-6


def test_draws_computed_ahead_are_those_of_key_and_position():
    table = new_table(4)
    spec = ExtendSpec(max_tokens=300)
    rows = np.array([table.add(7 * i, spec, 1000 + i, Drawn()) for i in range(4)])
    rng = np.random.default_rng(0)
    positions = np.array([7 * i for i in range(4)])
    for _ in range(200):
        some = np.flatnonzero(rng.random(4) < 0.7)
        if len(some):
            found = table._sampling.uniforms(rows[some], positions[some])
            wanted = [uniform(1000 + int(i), int(positions[i]), Purpose.TOKEN) for i in some]
            assert found.tolist() == wanted
            positions[some] += 1


def test_a_row_that_is_taken_again_remembers_nothing():
    requests = Requests(5, 40)
    table = new_table(1)
    for number in range(40):
        row = requests.add(table, number)
        while not requests.step(table, {number: row}, [number]):
            pass
        assert_same(table.remove(row), requests.alone(number))


def test_broken_logits_are_an_error_when_they_are_read():
    table = new_table(2)
    rows = np.array([table.add(1, ExtendSpec(max_tokens=3), 5, Drawn()) for _ in range(2)])
    draws = table.draw(rows, torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
    with pytest.raises(ValueError, match="not finite"):
        table.record(rows, draws)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(top_p=0.9, stop_token_sequences=((1, 2),)), dict(stop_strings=("abc", "zzz"))],
)
def test_a_step_runs_as_much_python_for_many_rows_as_for_few(changes):
    tokenizer = of_pieces([chr(ord("A") + i) for i in range(64)])

    def calls(num_rows):
        table = new_table(num_rows, tokenizer)
        spec = replace(ExtendSpec(max_tokens=50, stop_token_ids=(3,)), **changes)
        rows = np.array([table.add(3, spec, key, Drawn()) for key in range(num_rows)])
        logits = torch.zeros(num_rows, 64)
        logits[:, 5] = 50.0  # no stop is ever drawn
        count = 0

        def note(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        for step in range(4):  # the first steps learn tokens, make plans and draw ahead
            sys.setprofile(note if step == 3 else None)
            table.record(rows, table.draw(rows, logits))
            sys.setprofile(None)
        return count

    assert calls(8) == calls(200) > 0
