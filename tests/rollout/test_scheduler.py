"""Many trees as one batch: the same trees under every order, sharing and shortage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import VOCABULARY, path_logprobs
from tiny_work import numbered, tiny_engine

from rollout.extend import ExtendSpec
from rollout.scheduler import generate, generate_all
from rollout.strategies.arena import sampled_segment
from rollout.strategies.base import STRATEGIES
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Tree, num_unique_tokens

STOP = 4
FLAT = FlatSettings(n=5, max_response_length=20, stop_token_ids=[STOP])
TREE = TreePOSettings(
    n=6,
    segment_length=5,
    max_depth=4,
    max_response_length=20,
    initial_divergence_min=2,
    initial_divergence_max=3,
    stop_token_ids=[STOP],
)
STRATEGY = {"flat": FLAT, "treepo": TREE}


def prompts(n=5):
    rng = np.random.default_rng(0)
    tails = (rng.integers(0, VOCABULARY, int(rng.integers(1, 7))) for _ in range(n))
    return numbered(([7, 8, 9, *tail] for tail in tails), seed=0)


def grow(name, order_seed=None, **settings):
    engine = tiny_engine(**settings)
    strategy = STRATEGIES.get(name)(STRATEGY[name])
    trees = generate_all(engine, strategy, prompts(), order_seed=order_seed)
    assert engine.is_idle
    engine.check_integrity()
    return trees, engine


@pytest.mark.parametrize("name", ["flat", "treepo"])
@pytest.mark.parametrize(
    "change",
    [
        {"order_seed": 1},
        {"order_seed": 2},
        {"share_prefixes": False},
        {"share_prefixes": False, "order_seed": 3},
        {"attention": "reference"},
        {"num_kv_slots": 72},
        {"max_running_requests": 1},
        {"max_running_requests": 3, "order_seed": 4, "num_kv_slots": 128},
    ],
    ids=str,
)
def test_trees_do_not_depend_on_service_order_sharing_or_shortage(name, change):
    expected, _ = grow(name)
    found, _ = grow(name, **change)
    assert [tree.problem_id for tree in found] == [f"p{i}" for i in range(5)]
    assert all(a.same_tokens(b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["flat", "treepo"])
def test_recorded_log_probs_are_those_of_a_fresh_forward(name):
    trees, engine = grow(name)
    for tree in trees:
        for leaf in tree.leaves:
            path = tree.path(leaf)
            recorded = np.concatenate([tree.segments[i].logprobs for i in path])
            fresh = path_logprobs(engine.model, tree.path_token_ids(leaf))
            start = tree.segments[0].num_tokens
            assert np.abs(recorded - fresh)[start:].max() < 2e-6


def test_two_workers_give_the_trees_of_one():
    expected, _ = grow("treepo")
    strategy = STRATEGIES.get("treepo")(TREE)
    halves = [prompts()[0::2], prompts()[1::2]]
    found = {
        tree.problem_id: tree for half in halves for tree in generate(tiny_engine(), strategy, half)
    }
    assert all(tree.same_tokens(found[tree.problem_id]) for tree in expected)


def test_sharing_forwards_each_token_once_and_no_sharing_forwards_more():
    trees, engine = grow("treepo")
    costs = engine.metrics()
    generated = sum(s.num_tokens for tree in trees for s in tree.segments if s.sampled)
    # A fallback cuts trees, so some sampled tokens may be recorded twice.
    assert costs.generated_tokens <= generated + sum(t.counters.fallbacks for t in trees) * 20
    assert costs.unique_tokens == sum(num_unique_tokens(tree) for tree in trees)
    _, private = grow("treepo", share_prefixes=False)
    assert private.metrics().query_tokens > 1.5 * costs.query_tokens
    assert private.metrics().generated_tokens == costs.generated_tokens


def test_the_unique_minimum_of_flat_sampling_is_reached_less_shared_prompt_tokens():
    trees, engine = grow("flat")
    by_hand = sum(
        tree.segments[0].num_tokens + sum(s.num_tokens - 1 for s in tree.segments[1:])
        for tree in trees
    )
    assert sum(map(num_unique_tokens, trees)) == by_hand
    shared = 3 * (len(trees) - 1)  # all prompts begin with the same three tokens
    assert engine.metrics().query_tokens <= by_hand
    assert engine.metrics().query_tokens >= by_hand - shared - len(trees)


def test_only_prompts_stay_cached_when_the_trees_are_done():
    _, engine = grow("treepo")
    distinct = {tuple(p.token_ids[: i + 1]) for p in prompts() for i in range(len(p.token_ids))}
    assert engine.pool.num_held == len(distinct)
    assert engine.tree.num_protected == 0


def test_trees_are_handed_on_as_they_finish():
    engine = tiny_engine(max_running_requests=5)
    stream = generate(engine, STRATEGIES.get("flat")(FLAT), prompts())
    first = next(stream)
    assert first.problem_id == "p0" and not engine.is_idle
    stream.close()
    assert engine.is_idle
    engine.check_integrity()
    assert engine.tree.num_protected == 0


def test_a_path_too_long_for_the_pool_is_one_clear_error_and_leaves_nothing_behind():
    engine = tiny_engine(num_kv_slots=64)
    strategy = STRATEGIES.get("flat")(FlatSettings(n=2, max_response_length=60))
    with pytest.raises(ValueError, match="num_kv_slots=64 is too small"):
        list(generate(engine, strategy, prompts()))
    assert engine.is_idle and engine.tree.num_protected == 0
    engine.check_integrity()


def test_an_engine_path_that_differs_from_the_record_is_caught():
    engine = tiny_engine()
    strategy = STRATEGIES.get("treepo")(TREE)
    inner = engine.prefill
    engine.prefill = lambda token_ids: inner(token_ids[:-1])
    with pytest.raises(AssertionError, match="differs from the recorded"):
        list(generate(engine, strategy, prompts()))


class FirstTwo:
    """Asks for responses and is content with the first two that arrive."""

    def __init__(self, flat):
        self.flat = flat

    def start(self, prompt):
        return self.flat.start(prompt)

    def advance(self, state, results):
        received = (*state.received, *results)
        left = tuple(r for r in state.outstanding if r not in [x.request for x in received])
        return replace(state, outstanding=left, received=received), []

    def tree(self, state):
        if len(state.received) < 2:
            return None
        found = [sampled_segment(r, "length") for r in state.received[:2]]
        return Tree(
            problem_id=state.problem_id,
            segments=(*state.segments, *found),
            leaves=(1, 2),
            temperature=1.0,
        )


@pytest.mark.parametrize("order_seed", [None, 3])
def test_what_a_strategy_no_longer_wants_is_cancelled(order_seed):
    engine = tiny_engine(max_running_requests=9)
    settings = FlatSettings(n=6, max_response_length=60, stop_token_ids=[STOP])
    strategy = FirstTwo(STRATEGIES.get("flat")(settings))
    trees = generate_all(engine, strategy, prompts(), order_seed=order_seed)
    assert [tree.num_leaves for tree in trees] == [2] * 5
    costs = engine.metrics()
    assert engine.is_idle and engine.tree.num_protected == 0
    assert costs.cancelled > 0 and costs.segments + costs.cancelled <= 5 * 6
    engine.check_integrity()


def test_a_completion_that_nobody_fetched_can_be_cancelled():
    engine = tiny_engine()
    node = engine.prefill([1, 2, 3])
    request = engine.submit(node, ExtendSpec(max_tokens=0), 1)
    assert not engine.is_idle
    assert engine.cancel(request) and engine.is_idle
    assert not engine.cancel(request)
    engine.free(node)
    assert engine.tree.num_protected == 0
