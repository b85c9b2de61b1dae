"""Keys and values of trees that are put aside, over new weights: computed anew, or kept, in the
pool or on the host.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from growths import assert_same, grow_in_pieces
from tiny_models import VOCABULARY, path_logprobs, tiny_model
from tiny_work import numbered, tiny_engine
from transformers import DynamicCache

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.growth import Growth, GrowthLimits, nothing_drawn
from rollout.scheduler import generate_all, grow_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Tree
from rollout.weights import stored_state
from treepo.base.digest import manifest_of

FLAT = STRATEGIES.get("flat")(FlatSettings(n=3, max_response_length=22, stop_token_ids=[4]))
TREE = TreePOSettings(
    n=8,
    segment_length=5,
    max_depth=5,
    max_response_length=25,
    initial_divergence_max=3,
    stop_token_ids=[4],
    fallback="none",
)
STRATEGY = {"flat": FLAT, "treepo": STRATEGIES.get("treepo")(TREE)}
KEEP = dict(kv_over_update="keep")
HOST = dict(kv_over_update="keep", kv_on_host=True)


@cache
def models() -> list:
    return [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(3)]


def prompts(n=4) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return numbered(([7, 8, *rng.integers(0, VOCABULARY, 3)] for _ in range(n)), seed=2)


@cache
def plain_engine() -> Engine:
    return tiny_engine()


def load(engine: Engine, version: int) -> None:
    state = stored_state(models()[version % 3])
    engine.load_weights(version, manifest_of(state), state)
    engine.check_integrity()


def grow_under_new_weights(engine: Engine, strategy, limits: GrowthLimits, sleeps=False):
    """The trees, each call under newer weights, and [query tokens, drawn tokens] of each call."""
    items, costs, version = list(prompts()), [], 0
    while not all(isinstance(item, Tree) for item in items):
        if version:
            load(engine, version)
        if sleeps:
            engine.sleep()
            engine.wake()
        engine.reset_metrics()
        todo = [i for i, item in enumerate(items) if not isinstance(item, Tree)]
        grown = grow_all(engine, strategy, [items[i] for i in todo], limits)
        for i, tree in zip(todo, grown, strict=True):
            items[i] = tree
        engine.check_integrity()
        assert engine.is_idle and engine.tree.num_protected == 0
        assert engine.gauges().num_paused == sum(isinstance(i, Growth) for i in items) * (
            engine.settings.keeps_kv
        )
        costs.append([engine.metrics().query_tokens, engine.metrics().generated_tokens])
        version += 1
    return items, costs


@torch.inference_mode()
def mixed_logprobs(ids: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """float64 [n], of the n drawn tokens at the end of ``ids``, by dense forwards.

    The weights that drew a token have computed the keys and values of the token before it, on top
    of what others computed above; the prompt's are those of the weights that drew the first token.
    """
    count, start = len(versions), len(ids) - len(versions)
    cache = DynamicCache()
    found, done = [], 0
    for first in [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist()]:
        last = first
        while last < count and versions[last] == versions[first]:
            last += 1
        model = models()[versions[first] % 3]
        some = torch.tensor(ids[done : start + last - 1], dtype=torch.int64)[None]
        logits = model(input_ids=some, past_key_values=cache, use_cache=True).logits[0]
        table = torch.log_softmax(logits.double()[first - last :], dim=-1).numpy()
        found.append(table[np.arange(last - first), ids[start + first : start + last]])
        done = start + last - 1
    return np.concatenate(found)


def of_leaf(tree: Tree, leaf: int):
    """(path, versions and recorded log-probs of the tokens below the prompt)."""
    below = tree.path(leaf)[1:]
    versions = np.concatenate([tree.segments[i].policy_versions for i in below])
    recorded = np.concatenate([tree.segments[i].logprobs for i in below])
    return tree.path_token_ids(leaf), versions, recorded


def test_the_dense_reference_is_a_fresh_forward_where_all_tokens_are_of_one_version():
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 20)
    for version in range(3):
        fresh = path_logprobs(models()[version], ids)[-12:]
        assert np.abs(mixed_logprobs(ids, np.full(12, version)) - fresh).max() < 1e-9


@pytest.mark.parametrize("name", STRATEGY)
@pytest.mark.parametrize(
    ("settings", "sleeps"),
    [(KEEP, False), (HOST, False), (HOST, True)],
    ids=["pool", "host", "host, asleep"],
)
def test_kept_keys_give_the_log_probs_of_mixed_keys_and_leave_with_their_trees(
    name, settings, sleeps
):
    engine = tiny_engine(**settings)
    limits = GrowthLimits(segment_length=4)
    trees, costs = grow_under_new_weights(engine, STRATEGY[name], limits, sleeps)
    assert len(costs) >= 5
    differ = 0.0
    for tree in trees:
        for leaf in tree.leaves:
            ids, versions, recorded = of_leaf(tree, leaf)
            assert np.abs(mixed_logprobs(ids, versions) - recorded).max() < 2e-6
            fresh = path_logprobs(models()[versions[-1] % 3], ids)[-len(versions) :]
            differ = max(differ, np.abs(fresh - recorded).max())
    assert differ > 0.1  # the reference is not that of keys computed anew
    # Only what draws is forwarded: the prompts and all drawn tokens but the last of a path.
    if name == "flat":
        assert all(queries == drawn for queries, drawn in costs[1:])
    assert engine.gauges().kv_host_bytes == 0
    engine.tree.evict(2048)
    assert engine.pool.num_held == 0 and set(engine.tree.nodes()) <= {engine.store.root}


def test_a_call_that_stops_early_keeps_what_was_cut():
    engine = tiny_engine(**KEEP, max_running_requests=7)
    trees, _ = grow_under_new_weights(engine, FLAT, GrowthLimits(stop_when_finished=1))
    mixed = 0
    for tree in trees:
        for leaf in tree.leaves:
            ids, versions, recorded = of_leaf(tree, leaf)
            assert np.abs(mixed_logprobs(ids, versions) - recorded).max() < 2e-6
            mixed += len(np.unique(versions)) > 1
    assert mixed >= 2


@pytest.mark.parametrize("name", STRATEGY)
def test_recomputed_keys_are_those_of_the_weights_in_force(name):
    engine = tiny_engine()
    trees, costs = grow_under_new_weights(engine, STRATEGY[name], GrowthLimits(segment_length=4))
    for tree in trees:
        for leaf in tree.leaves:
            ids, versions, recorded = of_leaf(tree, leaf)
            for version in np.unique(versions):
                fresh = path_logprobs(models()[version % 3], ids)[-len(versions) :]
                assert np.abs(fresh - recorded)[versions == version].max() < 2e-6
    assert sum(queries for queries, _ in costs) > 1.5 * sum(drawn for _, drawn in costs)


@pytest.mark.parametrize("settings", [KEEP, HOST], ids=["pool", "host"])
def test_any_cutting_under_constant_weights_gives_the_trees_of_one_piece(settings):
    restarts = TreePOSettings(
        n=9,
        segment_length=4,
        max_depth=4,
        max_response_length=16,
        stop_token_ids=list(range(0, VOCABULARY, 3)),
        fallback_cut="lowest_logprob",
    )
    tight = dict(num_kv_slots=90, max_running_requests=4)
    engines = [tiny_engine(**settings), tiny_engine(**settings, **tight)]
    for strategy in (FLAT, STRATEGIES.get("treepo")(restarts)):
        expected = generate_all(plain_engine(), strategy, prompts(3))
        trees, _ = grow_in_pieces(engines, strategy, prompts(3), seed=1)
        assert_same(trees, expected)


def test_paths_on_the_host_leave_the_pool_free_and_are_counted_in_bytes():
    engine = tiny_engine(**HOST)
    strategy = STRATEGIES.get("flat")(FlatSettings(n=3, max_response_length=22))
    growths = grow_all(engine, strategy, prompts(), GrowthLimits(segment_length=4))
    gauges = engine.gauges()
    assert gauges.slots_free == 2048 and gauges.num_paused == 4
    # Two tokens that all prompts share, three of each; of four drawn tokens three were computed.
    tokens = 2 + 4 * 3 + 4 * 3 * 3
    assert gauges.kv_bytes_per_slot == 2 * 2 * 32 * 8  # layers, keys and values, width, float64
    assert gauges.kv_host_bytes == tokens * gauges.kv_bytes_per_slot
    load(engine, 1)
    assert engine.gauges().kv_host_bytes == gauges.kv_host_bytes
    grow_all(engine, strategy, growths, GrowthLimits())
    assert engine.gauges().kv_host_bytes == 0


@pytest.mark.parametrize("settings", [KEEP, HOST], ids=["pool", "host"])
def test_new_requests_never_read_kept_keys(settings):
    """Neither another tree of the same prompt, nor one who asks for the kept path itself."""
    engine = tiny_engine(**settings)
    growths = grow_all(engine, FLAT, prompts(), GrowthLimits(segment_length=6))
    load(engine, 1)
    fresh_tree = generate_all(engine, FLAT, [prompts()[0]])[0]
    ids, versions, recorded = of_leaf(fresh_tree, fresh_tree.leaves[0])
    fresh = path_logprobs(models()[1], ids)[-len(versions) :]
    assert set(versions) == {1} and np.abs(fresh - recorded).max() < 2e-6
    kept = np.concatenate([prompts()[1].token_ids, growths[1].partials[0].token_ids])
    (found,) = engine.extend([(engine.prefill(kept), ExtendSpec(max_tokens=4), 5)])
    fresh = path_logprobs(models()[1], engine.path_token_ids(found.node))[-4:]
    assert np.abs(fresh - found.logprobs).max() < 2e-6


def test_what_was_given_up_is_computed_anew():
    """Evicted, or asleep: the log-probs are those of the weights in force alone."""
    for give_up in (
        lambda engine: engine.tree.evict(2048),
        lambda engine: (engine.sleep(), engine.wake()),
        lambda engine: engine.drop_cache(),
    ):
        engine = tiny_engine(**KEEP)
        strategy = STRATEGIES.get("flat")(FlatSettings(n=2, max_response_length=12))
        growths = grow_all(engine, strategy, prompts(), GrowthLimits(segment_length=6))
        give_up(engine)
        load(engine, 1)
        for tree in grow_all(engine, strategy, growths, GrowthLimits()):
            for leaf in tree.leaves:
                ids, versions, recorded = of_leaf(tree, leaf)
                fresh = path_logprobs(models()[1], ids)[-6:]
                assert np.abs(fresh - recorded[6:]).max() < 2e-6


def test_nothing_is_left_on_the_host_when_the_cache_is_dropped():
    engine = tiny_engine(**HOST)
    grow_all(engine, FLAT, prompts(), GrowthLimits(segment_length=6))
    assert engine.gauges().kv_host_bytes
    engine.drop_cache()
    gauges = engine.gauges()
    assert gauges.kv_host_bytes == gauges.num_paused == gauges.slots_held == 0


@pytest.mark.parametrize("settings", [KEEP, HOST], ids=["pool", "host"])
def test_trees_that_do_not_go_on_here_are_given_up_after_two_weight_sets(settings):
    engine = tiny_engine(**settings)
    grow_all(engine, FLAT, prompts(), GrowthLimits(segment_length=6))
    for version, paused in ((1, 4), (2, 4), (3, 0)):
        load(engine, version)
        assert engine.gauges().num_paused == paused
    assert engine.gauges().kv_host_bytes == 0 and engine.pool.num_held == 0
    assert list(engine.tree.nodes()) == []


@pytest.mark.parametrize("name", STRATEGY)
def test_a_tree_that_grew_on_elsewhere_does_not_read_the_keys_of_other_tokens(name):
    """From one unfinished tree two engines go on under different weights, to equal places: what one
    has kept is not what the other drew.
    """
    strategy, here, elsewhere = STRATEGY[name], tiny_engine(**KEEP), tiny_engine()
    growths = grow_all(here, strategy, prompts(), GrowthLimits(segment_length=7))
    load(here, 1)
    grow_all(here, strategy, growths, GrowthLimits(segment_length=3))
    load(here, 2)
    load(elsewhere, 2)
    other = grow_all(elsewhere, strategy, growths, GrowthLimits(segment_length=3))
    work = [tree for tree in other if isinstance(tree, Growth)]
    assert len(work) >= 3
    found = grow_all(here, strategy, work, GrowthLimits())
    assert_same(found, grow_all(elsewhere, strategy, work, GrowthLimits()))
    here.check_integrity()


def test_the_end_of_a_whole_segment_is_kept_while_its_level_is_not_complete():
    """Two paths of segments of four tokens. One has drawn two and the other none when they go on
    for three: the first waits for the second. Then three more each, under new weights: the second
    one's last token, and three and two tokens below, and nothing else is forwarded.
    """
    settings = TreePOSettings(
        n=2, segment_length=4, max_depth=4, max_response_length=16, fallback="none"
    )
    strategy, engine = STRATEGIES.get("treepo")(settings), tiny_engine(**KEEP)
    (growth,) = grow_all(engine, strategy, prompts(1), GrowthLimits(segment_length=2))
    first, second = growth.partials
    uneven = replace(growth, partials=(first, nothing_drawn(second.request)))
    (growth,) = grow_all(engine, strategy, [uneven], GrowthLimits(segment_length=3))
    assert [len(result.token_ids) for result in growth.state.received] == [4]
    assert [partial.num_tokens for partial in growth.partials] == [3]
    load(engine, 1)
    engine.reset_metrics()
    grow_all(engine, strategy, [growth], GrowthLimits(segment_length=3))
    assert engine.metrics().query_tokens == engine.metrics().generated_tokens == 1 + 3 + 2


def test_a_node_on_the_host_is_split_where_a_path_leaves_it():
    engine = tiny_engine(**HOST)
    strategy = STRATEGIES.get("flat")(FlatSettings(n=1, max_response_length=12))
    growths = grow_all(engine, strategy, prompts(1), GrowthLimits(segment_length=8))
    bytes_before = engine.gauges().kv_host_bytes
    path = np.concatenate([prompts(1)[0].token_ids, growths[0].partials[0].token_ids])
    engine.reset_metrics()
    node = engine.prefill(path[:8])  # three tokens into the response
    (found,) = engine.extend([(node, ExtendSpec(max_tokens=1), 9)])
    assert engine.metrics().query_tokens == 1  # the path came back from the host
    assert engine.gauges().kv_host_bytes == bytes_before * 4 // 12
    fresh = path_logprobs(models()[0], engine.path_token_ids(found.node))[-1:]
    assert np.abs(fresh - found.logprobs).max() < 2e-6
    engine.free(found.node, drop=True), engine.free(node)
    engine.check_integrity()
    # Whom everybody below waits on the host goes there, too, where slots are short.
    assert engine.tree.evict(2048) == 8 and engine.pool.num_held == 0
    assert engine.gauges().kv_host_bytes == bytes_before
    engine.check_integrity()
    engine.reset_metrics()
    (tree,) = grow_all(engine, strategy, growths, GrowthLimits())
    assert engine.metrics().query_tokens == 4
    assert tree.same_tokens(generate_all(plain_engine(), strategy, prompts(1))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_over_update": "drop"}, "kv_over_update='drop' is unknown: choose one of recompute"),
        ({"kv_over_update": "keep", "share_prefixes": False}, "needs share_prefixes=True"),
        ({"kv_on_host": True}, "kv_on_host=True needs kv_over_update='keep'"),
    ],
)
def test_a_wrong_combination_says_which_one_is_right(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(**settings)


def live(seed: int, **settings) -> tuple[int, float]:
    """Trees grown in random pieces while weights come, slots are short and the engine sleeps; (most
    bytes that waited on the host, forwarded tokens a drawn one).
    """
    rng = np.random.default_rng(seed)
    engine = tiny_engine(num_kv_slots=int(rng.choice([130, 200, 400])), **settings)
    restarts = TreePOSettings(
        n=6,
        segment_length=30,
        max_depth=3,
        max_response_length=90,
        stop_token_ids=[4],
        fallback_cut="lowest_logprob",
    )
    strategy = STRATEGIES.get("treepo")(restarts) if rng.integers(2) else FLAT
    items, version, most = list(prompts(5)), 0, 0
    while todo := [i for i, item in enumerate(items) if not isinstance(item, Tree)]:
        act = rng.integers(6)
        if act < 2:
            version += 1
            load(engine, version)
        elif act == 2:
            engine.sleep()
            engine.wake()
        elif act == 3:
            engine.tree.evict(int(rng.integers(1, 100)))
        some = rng.permutation(todo)[: rng.integers(1, len(todo) + 1)].tolist()
        limits = GrowthLimits(
            segment_length=int(rng.integers(1, 40)), stop_when_finished=int(rng.integers(3))
        )
        order_seed = int(rng.integers(1 << 30)) if rng.integers(2) else None
        given = [items[i] for i in some]
        grown = grow_all(engine, strategy, given, limits, order_seed=order_seed)
        for i, tree in zip(some, grown, strict=True):
            items[i] = tree
        engine.check_integrity()
        gauges = engine.gauges()
        assert engine.is_idle and gauges.slots_live == 0
        assert gauges.num_paused <= sum(isinstance(item, Growth) for item in items)
        most = max(most, gauges.kv_host_bytes)
    for _ in range(3):
        version += 1
        load(engine, version)
    assert engine.pool.num_held == 0 and engine.gauges().kv_host_bytes == 0
    costs = engine.metrics()
    return most, costs.query_tokens / costs.generated_tokens


@pytest.mark.parametrize("settings", [KEEP, HOST], ids=["pool", "host"])
def test_whatever_comes_between_calls_no_slot_is_lost(settings):
    lives = [live(seed, **settings) for seed in range(2)]
    assert any(most for most, _ in lives) == ("kv_on_host" in settings)
    assert any(queries > 1.3 for _, queries in lives), "nothing was ever given up"


@pytest.mark.long
@pytest.mark.parametrize("settings", [KEEP, HOST], ids=["pool", "host"])
def test_the_same_for_long(settings):
    for seed in range(100, 120):
        live(seed, **settings)
