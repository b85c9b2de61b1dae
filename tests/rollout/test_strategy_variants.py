"""Every variant of TreePO's sampling on a real model: the same trees under every order, sharing,
number of engines and resumption.
"""

from __future__ import annotations

import pickle
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, path_logprobs, tiny_model
from tiny_work import numbered

from rollout.engine import Engine
from rollout.extend import ExtendResult
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies.arena import heads
from rollout.strategies.base import Prompt
from rollout.strategies.rule_settings import (
    BRANCHING_SCHEDULES,
    BRANCHING_SCORES,
    BRANCHINGS,
    BUDGETS,
    FALLBACK_CUTS,
    FALLBACKS,
)
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO

# About a third of the tokens end a response, so that paths end early and fallbacks happen.
BASE = dict(
    n=24, segment_length=4, max_depth=4, max_response_length=16, initial_divergence_max=3,
    stop_token_ids=list(range(0, VOCABULARY, 3)), temperature=1.2,
)  # fmt: skip
INSIDE = ("lowest_logprob", "block_softmax", "block_softmax_inverse", "misaligned")
BLOCKS = dict.fromkeys(["block_softmax", "block_softmax_inverse"], dict(fallback_block_length=2))
# Few stops and low temperatures, so that many paths go on and are weighed differently.
FEW = dict(n=14, stop_token_ids=[4, 9])
COLD = dict(FEW, branching_temperature=[0.05])
LOW = dict(COLD, branching="low_logprob")
# Two levels, so that many responses are cut off by their length.
SHALLOW = dict(stop_token_ids=[4, 9, 14, 19], max_depth=2, max_response_length=8)
# Several rounds of cuts, below and above each other.
ROUNDS = dict(SHALLOW, max_depth=3, max_response_length=12, fallback="finished_first")
SCHEDULES = {"linear": [0.05, 20.0], "sinusoidal": [20.0, 0.05]}
# (setting, name) -> settings; the defaults of a setting are part of another's variants
VARIANTS: dict[tuple[str, str], dict] = {
    **{("branching", name): dict(COLD, branching=name) for name in BRANCHINGS},
    ("branching", "even"): FEW,
    **{("branching_score", name): dict(LOW, branching_score=name) for name in BRANCHING_SCORES},
    **{
        ("branching_schedule", name): dict(
            LOW, branching_schedule=name, branching_temperature=temperatures
        )
        for name, temperatures in SCHEDULES.items()
    },
    **{
        ("budget", name): dict(budget=name, budget_tokens=0 if name == "width" else 24)
        for name in BUDGETS
    },
    **{("fallback", name): dict(SHALLOW, fallback=name) for name in (*FALLBACKS, "none")},
    **{
        ("fallback_cut", name): dict(ROUNDS, fallback_cut=name, **BLOCKS.get(name, {}))
        for name in FALLBACK_CUTS
    },
}
del VARIANTS["branching_score", "last_segment"]  # of ("branching", "low_logprob")


def settings(name: tuple[str, str]) -> TreePOSettings:
    return TreePOSettings(**{**BASE, **VARIANTS[name]})


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return numbered(([7, 8, 9, *rng.integers(0, VOCABULARY, 1 + i)] for i in range(3)), seed=5)


@cache
def engine(**changes) -> Engine:
    values = {"num_kv_slots": 2048, **changes}
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(**values))


def grow(name, order_seed=None, some=slice(None), **changes):
    used = engine(**changes)
    trees = generate_all(used, TreePO(settings(name)), prompts()[some], order_seed=order_seed)
    assert used.is_idle and used.tree.num_protected == 0
    used.check_integrity()
    return trees


@cache
def expected(name):
    return tuple(grow(name))


def same(trees, others):
    return all(a.same_tokens(b) for a, b in zip(trees, others, strict=True))


def grow_resumed(name, prompt, seed):
    """One tree; after each few results the state is pickled and another engine and strategy go on
    with it, segments in random order.
    """
    rng = np.random.default_rng(seed)
    engines = [engine(), engine(share_prefixes=False)]
    state, _ = TreePO(settings(name)).start(prompt)
    while state.outstanding:
        used = engines[int(rng.integers(2))]
        some = rng.permutation(len(state.outstanding))[: int(rng.integers(1, 5))]
        requests = [state.outstanding[i] for i in some]
        nodes = []
        for request in requests:
            tokens, index = [], request.parent
            while index >= 0:
                tokens.append(state.segments[index].token_ids)
                index = state.segments[index].parent
            nodes.append(used.prefill(np.concatenate(tokens[::-1])))
        asked = [(n, r.spec, r.path_key) for n, r in zip(nodes, requests, strict=True)]
        found = sorted(used.extend(asked), key=lambda completion: completion.request_id)
        results = [
            ExtendResult(
                request=request,
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                sampling_logprobs=completion.sampling_logprobs,
                finish_reason=completion.finish_reason,
                policy_versions=completion.policy_versions,
                entropy=completion.entropy,
            )
            for request, completion in zip(requests, found, strict=True)
        ]
        for node in (*nodes, *(completion.node for completion in found)):
            used.free(node)
        state, _ = TreePO(settings(name)).advance(state, results)
        state = pickle.loads(pickle.dumps(state))
    return TreePO(settings(name)).tree(state)


@pytest.mark.parametrize("name", VARIANTS, ids="=".join)
def test_a_variant_gives_the_same_trees_under_every_service(name):
    trees = expected(name)
    assert same(trees, grow(name, order_seed=1))
    assert same(trees, grow(name, order_seed=2, share_prefixes=False))
    assert same(trees, grow(name, order_seed=3, num_kv_slots=96, max_running_requests=4))
    one, other = grow(name, some=slice(0, 2)), grow(name, some=slice(2, 3), num_kv_slots=512)
    assert same(trees, [*one, *other])


@pytest.mark.parametrize("name", VARIANTS, ids="=".join)
def test_a_variant_s_unfinished_tree_goes_on_from_its_pickle_on_another_engine(name):
    for seed, prompt in enumerate(prompts()[:2]):
        assert expected(name)[seed].same_tokens(grow_resumed(name, prompt, seed))


@pytest.mark.parametrize("name", VARIANTS, ids="=".join)
def test_a_variant_fills_its_width_within_the_length(name):
    chosen = settings(name)
    for tree in expected(name):
        if chosen.budget == "response_tokens" or chosen.fallback == "none":
            assert 2 <= tree.num_leaves <= chosen.n
        else:
            assert tree.num_leaves == chosen.n
        for leaf in tree.leaves:
            response = tree.path_token_ids(leaf, with_prompt=False)
            assert 1 <= len(response) <= chosen.max_response_length


@pytest.mark.parametrize("cut", INSIDE)
def test_log_probs_above_and_below_a_cut_are_those_of_a_fresh_forward(cut):
    name = ("fallback_cut", cut)
    for tree in expected(name)[:2]:
        start = tree.segments[0].num_tokens
        for leaf in tree.leaves:
            recorded = np.concatenate([tree.segments[i].logprobs for i in tree.path(leaf)])
            fresh = path_logprobs(
                engine().model, tree.path_token_ids(leaf), temperature=settings(name).temperature
            )
            assert np.abs(recorded - fresh)[start:].max() < 2e-6


def test_every_registered_name_is_a_variant_here():
    found = {setting: {name for s, name in VARIANTS if s == setting} for setting, _ in VARIANTS}
    assert found == {
        "branching": set(BRANCHINGS),
        "branching_score": set(BRANCHING_SCORES) - {"last_segment"},
        "branching_schedule": set(BRANCHING_SCHEDULES) - {"constant"},
        "budget": set(BUDGETS),
        "fallback": {*FALLBACKS, "none"},
        "fallback_cut": set(FALLBACK_CUTS),
    }


def test_the_variants_differ_where_they_should_and_fallbacks_happen():
    """Otherwise the tests above would test one thing many times."""
    assert sum(tree.counters.fallbacks for tree in expected(("fallback_cut", "segment"))) >= 6
    for name in INSIDE:
        assert sum(len(heads(t.segments)) for t in expected(("fallback_cut", name))) >= 6, name
    default_of = {
        "branching_score": ("branching", "low_logprob"),
        "branching_schedule": ("branching", "low_logprob"),
    }
    for setting in {setting for setting, _ in VARIANTS}:
        names = [name for name in VARIANTS if name[0] == setting]
        names += [default_of[setting]] if setting in default_of else []
        for one, other in combinations(names, 2):
            alike = same(expected(one), expected(other))
            assert not alike, f"{one} and {other} grew the same trees"


@pytest.mark.parametrize("branching", ["low_logprob", "entropy"])
def test_equal_paths_tie_although_a_batch_changes_the_last_digits_of_their_log_probs(branching):
    """Greedy paths are all the same; in float32 their log-probs are not, and change with the
    service. Ties have to go by path key all the same.
    """
    greedy = TreePOSettings(
        n=11, segment_length=4, max_depth=5, max_response_length=20, repetition_count=0,
        branching=branching, temperature=0.0, initial_divergence_min=3, initial_divergence_max=3,
    )  # fmt: skip
    trees = []
    for order_seed, changes in enumerate(
        [{}, {"share_prefixes": False}, {"max_running_requests": 3}, {"max_running_requests": 2}]
    ):
        used = Engine(
            tiny_model("gpt2", torch.float32), EngineSettings(num_kv_slots=2048, **changes)
        )
        trees.append(generate_all(used, TreePO(greedy), prompts(), order_seed=order_seed))
    assert all(same(trees[0], others) for others in trees[1:])
