"""Which responses go on and where they are cut, against numbers worked out by hand."""

from collections import Counter

import numpy as np
import pytest

from rollout.strategies.fallback import Ended, finished_first, longer_first, random
from rollout.strategies.rule_settings import FALLBACK_CUTS
from rollout.strategies.settings import TreePOSettings

LONG = dict(segment_length=4, max_depth=8, max_response_length=32)


def ended(key, num_tokens=6, *, logprobs=None, borders=(0, 4), is_complete=True):
    values = -np.ones(num_tokens) if logprobs is None else logprobs
    return Ended(
        leaf=key,
        path_key=key,
        logprobs=np.array(values, np.float32),
        borders=borders,
        is_complete=is_complete,
    )


def cut(rule, response, draw, **changes):
    return FALLBACK_CUTS.get(rule)(
        response, draw, TreePOSettings(**LONG, fallback_cut=rule, **changes)
    )


def keys(responses):
    return [response.path_key for response in responses]


# --- who goes on ---


def test_the_random_chooser_takes_complete_responses_in_every_order():
    responses = [ended(1), ended(2, is_complete=False), ended(3), ended(4)]
    orders = Counter(tuple(keys(random(responses, round))) for round in range(600))
    assert set(map(frozenset, orders)) == {frozenset({1, 3, 4})} and len(orders) == 6
    assert all(60 <= count <= 140 for count in orders.values()), orders
    assert keys(random(responses[::-1], 3)) == keys(random(responses, 3))
    assert random([ended(2, is_complete=False)], 0) == []


def test_finished_first_takes_the_others_after_all_complete_ones():
    responses = [ended(k, is_complete=k % 2 == 0) for k in range(1, 7)]
    for round in range(20):
        order = keys(finished_first(responses, round))
        assert set(order[:3]) == {2, 4, 6} and set(order[3:]) == {1, 3, 5}
    assert len({tuple(keys(finished_first(responses, round))) for round in range(40)}) > 10


def test_longer_first_takes_long_complete_responses_first():
    responses = [ended(1, 3), ended(2, 9), ended(3, 20, is_complete=False), ended(4, 9)]
    orders = {tuple(keys(longer_first(responses, round))) for round in range(20)}
    assert orders == {(2, 4, 1), (4, 2, 1)}


# --- where it is cut ---


def test_a_segment_cut_is_uniform_over_the_borders():
    response = ended(1, 14, borders=(0, 4, 8, 12))
    assert [cut("segment", response, d) for d in (0.01, 0.24, 0.26, 0.51, 0.99)] == [0, 0, 4, 8, 12]


def test_a_cut_from_the_start_keeps_nothing():
    assert [cut("from_start", ended(1), draw) for draw in (0.01, 0.99)] == [0, 0]


def test_the_lowest_log_prob_is_drawn_again():
    assert cut("lowest_logprob", ended(1, logprobs=[-1, -2, -7, -3, -7]), 0.9) == 2
    assert cut("lowest_logprob", ended(1, logprobs=[-9, -2, -7]), 0.9) == 0
    # the last digits depend on the batch
    assert cut("lowest_logprob", ended(1, logprobs=[-1, -7, -3, -7 - 1e-6]), 0.9) == 1


# Blocks of 2 with mean log-probs -1, -3, and a last of one token with -2: softmax .6652, .0900,
# .2447, cumulative .6652, .7553, 1; its inverse .0900, .6652, .2447, cumulative .0900, .7553, 1.
BLOCKS = ended(1, logprobs=[-0.5, -1.5, -2, -4, -2])


@pytest.mark.parametrize(
    ("rule", "draw", "kept"),
    [
        ("block_softmax", 0.001, 0),
        ("block_softmax", 0.665, 0),
        ("block_softmax", 0.666, 2),
        ("block_softmax", 0.755, 2),
        ("block_softmax", 0.756, 4),
        ("block_softmax", 0.999, 4),
        ("block_softmax_inverse", 0.089, 0),
        ("block_softmax_inverse", 0.091, 2),
        ("block_softmax_inverse", 0.755, 2),
        ("block_softmax_inverse", 0.756, 4),
    ],
)
def test_blocks_are_drawn_by_their_mean_log_prob_by_hand(rule, draw, kept):
    assert cut(rule, BLOCKS, draw, fallback_block_length=2) == kept


@pytest.mark.parametrize(("sign", "rule"), [(1, "block_softmax"), (-1, "block_softmax_inverse")])
def test_block_cuts_have_the_frequencies_of_their_softmax(sign, rule):
    rng = np.random.default_rng(0)
    values = rng.normal(-2, 1, 23)
    x = np.array([values[i : i + 5].mean() for i in range(0, 23, 5)])
    expected = np.exp(sign * x) / np.exp(sign * x).sum()
    response = ended(1, logprobs=values)
    draws = (np.arange(20_000) + 0.5) / 20_000
    found = Counter(cut(rule, response, d, fallback_block_length=5) for d in draws[::20])
    assert set(found) <= {0, 5, 10, 15, 20}
    shares = np.array([found[5 * k] / 1000 for k in range(5)])
    assert np.abs(shares - expected).max() < 0.002


def test_misaligned_cuts_are_uniform_over_multiples_of_their_block():
    # blocks of 3 in 10 tokens: 0, 3, 6, 9; in 9 tokens: 0, 3, 6, for 9 would keep all
    ten, nine = ended(1, 10), ended(1, 9)
    draws = [0.01, 0.26, 0.51, 0.99]
    assert [cut("misaligned", ten, d, fallback_block_length=3) for d in draws] == [0, 3, 6, 9]
    assert [cut("misaligned", nine, d, fallback_block_length=3) for d in draws] == [0, 0, 3, 6]


def test_the_blocks_of_the_paper_are_the_defaults():
    def block(**changes):
        return TreePOSettings(**changes).block_length()

    assert block(fallback_cut="block_softmax") == block(fallback_cut="block_softmax_inverse") == 128
    paper = dict(segment_length=1024, max_depth=7)
    assert block(fallback_cut="misaligned", **paper) == 512
    assert block(fallback_cut="misaligned", fallback_block_length=300, **paper) == 300
    assert block(**LONG, fallback_cut="block_softmax") == 4  # no longer than a segment


@pytest.mark.parametrize("rule", list(FALLBACK_CUTS))
def test_every_cut_keeps_less_than_the_response(rule):
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 33))
        response = ended(1, logprobs=rng.normal(-1, 1, n), borders=tuple(range(0, n, 4)))
        for draw in (2.0**-53, 1 - 2.0**-53, float(rng.random())):
            assert 0 <= cut(rule, response, draw) < n


def test_each_round_draws_anew():
    draws = [ended(5).draw(round) for round in range(50)]
    assert len(set(draws)) == 50 and ended(5).draw(3) == draws[3] != ended(6).draw(3)
