"""What ends a call, what is put aside then, and under which weights it goes on."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_scheduler import FirstTwo
from tiny_models import VOCABULARY, path_logprobs, tiny_model
from tiny_work import numbered, tiny_engine

from rollout.engine import Engine
from rollout.extend import LENGTH, ExtendSpec
from rollout.growing import Growing
from rollout.growth import Growth, GrowthLimits, dump_growths, load_growths
from rollout.scheduler import generate_all, grow, grow_all
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Segment, Tree
from rollout.weights import stored_state
from treepo.base.digest import manifest_of

FLAT = STRATEGIES.get("flat")(FlatSettings(n=5, max_response_length=20, stop_token_ids=[4]))
TREE = STRATEGIES.get("treepo")(
    TreePOSettings(
        n=8,
        segment_length=6,
        max_depth=4,
        max_response_length=24,
        branching="entropy",
        stop_token_ids=[4, 9],
        fallback_cut="lowest_logprob",
    )
)
STRATEGY = {"flat": FLAT, "treepo": TREE}


def prompts(n=5) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return numbered((rng.integers(0, VOCABULARY, 4) for _ in range(n)), seed=2)


def load(engine: Engine, version: int, model) -> None:
    state = stored_state(model)
    engine.load_weights(version, manifest_of(state), state)


def calls_under_new_weights(strategy, limits: GrowthLimits) -> tuple[list[Tree], int]:
    """(trees, number of calls); the weights of call v are those of model v % 3."""
    models = [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(3)]
    engine, items, version = tiny_engine(), list(prompts()), 0
    while not all(isinstance(item, Tree) for item in items):
        if version:
            load(engine, version, models[version % 3])
        work = [item for item in items if not isinstance(item, Tree)]
        for index, tree in grow(engine, strategy, work, limits):
            items[items.index(work[index])] = tree
        engine.check_integrity()
        version += 1
    return items, version


@pytest.mark.parametrize("name", STRATEGY)
def test_each_token_has_the_log_prob_of_the_weights_that_drew_it(name):
    models = [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(3)]
    trees, num_calls = calls_under_new_weights(STRATEGY[name], GrowthLimits(segment_length=4))
    assert num_calls >= 5
    mixed = 0
    for tree in trees:
        for leaf in tree.leaves:
            path, ids = tree.path(leaf), tree.path_token_ids(leaf)
            start = tree.segments[0].num_tokens
            versions = np.concatenate([tree.segments[i].policy_versions for i in path])[start:]
            recorded = np.concatenate([tree.segments[i].logprobs for i in path])[start:]
            assert (np.diff(versions) >= 0).all()
            for version in np.unique(versions):
                of_it = versions == version
                fresh = path_logprobs(models[version % 3], ids)[start:]
                assert np.abs(fresh - recorded)[of_it].max() < 2e-6
        mixed += sum(len(np.unique(s.policy_versions)) > 1 for s in tree.segments[1:])
    assert mixed > 5


@pytest.mark.parametrize("name", STRATEGY)
@pytest.mark.parametrize("length", [1, 4, 7])
def test_no_path_grows_by_more_than_the_segment_length_in_a_call(name, length):
    trees, _ = calls_under_new_weights(STRATEGY[name], GrowthLimits(segment_length=length))
    full = 0
    for tree in trees:
        for leaf in tree.leaves:
            versions = [v for i in tree.path(leaf)[1:] for v in tree.segments[i].policy_versions]
            counts = Counter(versions)
            assert max(counts.values()) <= length
            full += sum(count == length for count in counts.values())
            if name == "flat":  # every call but the last draws as many as it may
                assert list(counts.values())[:-1] == [length] * (len(counts) - 1)
    assert full > 10


def test_a_call_stops_when_enough_trees_are_finished_and_loses_nothing():
    engine, items, num_calls = tiny_engine(max_running_requests=10), list(prompts(6)), 0
    settings = FlatSettings(n=3, max_response_length=40, stop_token_ids=[4])
    strategy = STRATEGIES.get("flat")(settings)
    while not all(isinstance(item, Tree) for item in items):
        work = [i for i, item in enumerate(items) if not isinstance(item, Tree)]
        limits = GrowthLimits(stop_when_finished=2)
        grown = grow_all(engine, strategy, [items[i] for i in work], limits)
        assert sum(isinstance(tree, Tree) for tree in grown) >= min(2, len(work))
        for i, tree in zip(work, grown, strict=True):
            items[i] = tree
        num_calls += 1
    assert num_calls >= 2
    expected = generate_all(tiny_engine(), strategy, prompts(6))
    assert all(a.same_tokens(b) for a, b in zip(items, expected, strict=True))
    drawn = sum(segment.num_tokens for tree in items for segment in tree.segments[1:])
    assert engine.metrics().generated_tokens == drawn  # each once


def test_what_waits_in_the_queue_when_a_call_stops_keeps_what_it_drew_before():
    """Two trees of two responses of six tokens, five of which the first call draws, three rows: in
    one step the first tree is finished, and one response of the second has not gone on.
    """
    strategy = STRATEGIES.get("flat")(FlatSettings(n=2, max_response_length=6))
    engine = tiny_engine(max_running_requests=3)
    work = grow_all(engine, strategy, prompts(2), GrowthLimits(segment_length=5))
    first, second = grow_all(engine, strategy, work, GrowthLimits(stop_when_finished=1), [2, 1])
    assert isinstance(first, Tree) and isinstance(second, Growth)
    assert [partial.num_tokens for partial in second.partials] == [5]
    assert [len(result.token_ids) for result in second.state.received] == [6]


def test_what_a_call_did_not_come_to_is_an_unfinished_tree_of_no_token():
    engine = tiny_engine(max_running_requests=5)
    grown = grow_all(engine, FLAT, prompts(), GrowthLimits(stop_when_finished=1))
    last = grown[-1]
    assert isinstance(last, Growth) and last.problem_id == "p4"
    assert [partial.num_tokens for partial in last.partials] == [0] * 5
    assert last.num_tokens == 4  # the prompt's
    again = grow_all(engine, FLAT, [last], GrowthLimits(stop_when_finished=1))
    assert again[0].same_tokens(generate_all(engine, FLAT, prompts())[-1])


def test_an_unfinished_tree_counts_its_tokens_and_knows_the_weights_of_each():
    engine = tiny_engine()
    load(engine, 3, tiny_model("gpt2", torch.float64, seed=1))
    (growth,) = grow_all(engine, TREE, prompts(1), GrowthLimits(segment_length=8))
    waited_for = [request.request_id for request in growth.state.outstanding]
    assert [partial.request_id for partial in growth.partials] == waited_for
    assert isinstance(growth, Growth) and growth.root_key == prompts(1)[0].root_key
    drawn = engine.metrics().generated_tokens
    assert growth.num_tokens == drawn + 4
    parts = (*growth.state.segments[1:], *growth.state.received, *growth.partials)
    assert np.concatenate([part.policy_versions for part in parts]).tolist() == [3] * drawn


def equal(a, b) -> bool:
    """Whether two records hold the same, arrays bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def test_tokens_that_a_call_drew_are_counted_by_hand_where_segments_are_cut():
    """A prompt of 4 tokens, then a segment that was cut in pieces of 2, 3 and 4 tokens, of which
    this call drew those from depth 7 on, then one of 5 tokens that it drew whole.
    """

    def segment(parent: int, path_key: int, n: int) -> Segment:
        floats, ints = np.zeros(n, np.float32), np.zeros(n, np.int32)
        return Segment(
            parent=parent,
            level=1,
            path_key=path_key,
            token_ids=ints,
            logprobs=floats,
            sampling_logprobs=floats,
            sampled=True,
            policy_versions=ints,
        )

    arena = [segment(-1, 1, 4), *(segment(i, 2, n) for i, n in enumerate((2, 3, 4))),
             segment(3, 3, 5)]  # fmt: skip
    growing = Growing(0, 0, "p", SimpleNamespace(segments=arena), 18, begun={2: 7, 3: 13})
    assert [growing.depth(i) for i in range(5)] == [4, 6, 9, 13, 18]
    assert [growing.num_drawn_here(i) for i in range(5)] == [0, 0, 2, 6, 11]


def test_an_unfinished_tree_goes_through_a_file_bit_for_bit():
    grown = grow_all(tiny_engine(), TREE, prompts(), GrowthLimits(segment_length=8))
    growths = [tree for tree in grown if isinstance(tree, Growth)]
    assert any(p.num_tokens and p.entropy is not None for g in growths for p in g.partials)
    assert equal(load_growths(dump_growths(growths)), growths)
    assert equal(pickle.loads(pickle.dumps(growths)), growths)
    drawn = sum(growth.num_tokens for growth in growths)
    assert len(dump_growths(growths)) < 3000 * len(growths) + 40 * drawn


def test_unfinished_trees_of_another_format_are_refused():
    _, records = pickle.loads(dump_growths([]))
    with pytest.raises(ValueError, match="in format 99: this version reads format 1"):
        load_growths(pickle.dumps((99, records)))


def test_longest_first_takes_fewer_steps_and_draws_the_same_tokens():
    """One response a prompt, two at a time, the long ones last in the work."""
    strategy = STRATEGIES.get("flat")(FlatSettings(n=1, max_response_length=60, stop_token_ids=[4]))
    work = prompts(12)
    trees = generate_all(tiny_engine(), strategy, work)
    order = np.argsort([tree.segments[1].num_tokens for tree in trees])
    work, trees = [work[i] for i in order], [trees[i] for i in order]
    lengths = [tree.segments[1].num_tokens for tree in trees]
    steps = {}
    for name, expected in (("as they come", None), ("longest first", lengths)):
        engine = tiny_engine(max_running_requests=2)
        grown = grow_all(engine, strategy, work, GrowthLimits(), expected)
        assert all(a.same_tokens(b) for a, b in zip(grown, trees, strict=True))
        steps[name] = engine.metrics().sequential_steps
    assert steps["longest first"] < steps["as they come"]
    # List scheduling, longest first, by hand: the next response goes to the row that is free first.
    free = [0, 0]
    for length in sorted(lengths, reverse=True):
        free[free.index(min(free))] += length
    assert steps["longest first"] == max(free)


def test_requests_of_long_trees_overtake_those_that_wait():
    """Two trees: the one expected to be longer is served first though it stands behind."""
    engine = tiny_engine(max_running_requests=5)
    first = [
        next(grow(engine, FLAT, prompts(2), GrowthLimits(), expected))[0]
        for expected in (None, [1.0, 2.0])
    ]
    assert first == [0, 1]


def test_one_long_path_goes_before_many_short_ones_that_draw_more_together():
    flat = STRATEGIES.get("flat")(FlatSettings(n=3, max_response_length=60, stop_token_ids=[4]))
    grown = grow_all(tiny_engine(), flat, prompts(12), GrowthLimits(segment_length=20))
    lonely = [g for g in grown if isinstance(g, Growth) and len(g.partials) == 1]
    assert lonely, "the case did not arise"
    new = next(p for p in prompts(12) if p.problem_id != lonely[0].problem_id)
    engine = tiny_engine(max_running_requests=1)
    first, _ = next(grow(engine, flat, [new, lonely[0]], GrowthLimits(), [3 * 5.0, 9.0]))
    assert first == 1
    first, _ = next(grow(engine, flat, [new, lonely[0]], GrowthLimits(), [3 * 5.0, 4.0]))
    assert first == 0


@pytest.mark.parametrize("field", ["segment_length", "stop_when_finished"])
def test_a_negative_limit_is_refused(field):
    with pytest.raises(ValueError, match=f"growth limit {field}=-1: it must be >= 0"):
        GrowthLimits(**{field: -1})


def test_an_unfinished_tree_of_another_strategy_is_refused():
    (growth,) = grow_all(tiny_engine(), FLAT, prompts(1), GrowthLimits(segment_length=2))
    with pytest.raises(ValueError, match=r"work\[0\] is an unfinished tree with a FlatState"):
        grow_all(tiny_engine(), TREE, [growth], GrowthLimits())


@pytest.mark.parametrize("expected", [[1.0], [1.0, float("nan")]])
def test_there_is_one_expectation_for_each_tree(expected):
    with pytest.raises(ValueError, match="for 2 trees: it must have one finite number for each"):
        grow_all(tiny_engine(), FLAT, prompts(2), GrowthLimits(), expected)


def test_a_path_that_will_not_fit_is_refused_at_its_first_piece():
    engine = tiny_engine(num_kv_slots=64)
    flat = STRATEGIES.get("flat")(FlatSettings(n=2, max_response_length=70))
    with pytest.raises(ValueError, match="path of 4 tokens plus max_tokens=70 needs 74"):
        grow_all(engine, flat, prompts(1), GrowthLimits(segment_length=2))
    assert engine.is_idle and engine.tree.num_protected == 0


def test_a_cut_request_gives_back_what_it_drew_wherever_it_is():
    """Running, waiting, half computed, finished but not fetched, of no token, unknown."""
    engine = tiny_engine(max_running_requests=2, max_tokens_per_step=6)
    node = engine.prefill(np.arange(20, dtype=np.int32))
    spec = ExtendSpec(max_tokens=9, wants_entropy=True, num_top_logprobs=2)
    (whole,) = engine.extend([(node, spec, 1)])
    running = engine.submit(node, spec, 1)
    for _ in range(4):
        engine.step()
    fresh = engine.submit(engine.prefill(np.arange(1, 21, dtype=np.int32)), spec, 1)
    engine.step()
    waiting = engine.submit(node, spec, 2)
    empty = engine.submit(node, ExtendSpec(max_tokens=0), 3)
    found = {name: engine.cut(i) for name, i in
             dict(running=running, fresh=fresh, waiting=waiting, empty=empty).items()}  # fmt: skip
    assert engine.is_idle and engine.cut(running) is None
    assert found["running"].token_ids.tolist() == whole.token_ids[:5].tolist()
    assert np.array_equal(found["running"].top_logprobs, whole.top_logprobs[:5])
    for name in ("fresh", "waiting"):
        cut = found[name]
        assert len(cut.token_ids) == len(cut.entropy) == len(cut.top_token_ids) == 0
    assert {c.finish_reason for c in found.values()} == {LENGTH}
    # what the cut one computed is found again: its last token alone is forwarded, and the rest
    before = engine.metrics().query_tokens
    rest = ExtendSpec(max_tokens=4)
    (after,) = engine.extend([(found["running"].node, rest, 1)])
    assert after.token_ids.tolist() == whole.token_ids[5:].tolist()
    assert engine.metrics().query_tokens - before == 4
    engine.check_integrity()


@pytest.mark.parametrize("order_seed", [None, 1, 2])
def test_a_tree_that_is_finished_without_what_was_put_aside_is_handed_on(order_seed):
    engine = tiny_engine()
    settings = FlatSettings(n=6, max_response_length=60, stop_token_ids=[4])
    strategy = FirstTwo(STRATEGIES.get("flat")(settings))
    items: list = prompts()
    while not all(isinstance(item, Tree) for item in items):
        work = [item for item in items if not isinstance(item, Tree)]
        limits = GrowthLimits(segment_length=5)
        for index, tree in grow(engine, strategy, work, limits, order_seed=order_seed):
            items[items.index(work[index])] = tree
        assert engine.is_idle and engine.tree.num_protected == 0
    whole = {r.path_key: r for t in generate_all(engine, strategy.flat, prompts())
             for r in t.segments}  # fmt: skip
    for tree in items:
        assert tree.num_leaves == 2
        for segment in tree.segments[1:]:
            assert np.array_equal(segment.token_ids, whole[segment.path_key].token_ids)


def test_a_request_cut_while_its_own_tokens_are_computed_anew_leaves_no_hole_behind():
    models = [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(2)]
    engine = tiny_engine(max_running_requests=2, max_tokens_per_step=6)
    request = engine.submit(
        engine.prefill(np.arange(8, dtype=np.int32)), ExtendSpec(max_tokens=20), 1
    )
    for _ in range(12):
        engine.step()
    state = stored_state(models[1])
    engine.load_weights(1, manifest_of(state), state, in_flight="recompute")
    for _ in range(2):  # of 18 tokens twelve are computed
        engine.step()
    cut = engine.cut(request)
    assert cut.policy_versions.tolist() == [0] * 11 and engine.is_idle
    engine.check_integrity()
    (after,) = engine.extend([(cut.node, ExtendSpec(max_tokens=4), 1)])
    fresh = path_logprobs(models[1], engine.path_token_ids(after.node))[-4:]
    assert np.abs(fresh - after.logprobs).max() < 2e-6
