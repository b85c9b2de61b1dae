"""Trees start only if all that grow should fit, and the youngest wait where they do not, so that
nothing is computed again and again.
"""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import VOCABULARY, tiny_model

from rollout.engine import Engine
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree_room import TreeRoom
from treepo.base.keys import root_key


def narrow_trees(depth: int) -> TreePOSettings:
    return TreePOSettings(
        n=8,
        segment_length=4,
        max_depth=depth,
        max_response_length=4 * depth,
        fallback="none",
        repetition_count=0,
    )


def test_before_a_tree_has_finished_its_limit_counts_but_an_eighth_of_the_pool_at_most():
    flat = STRATEGIES.get("flat")
    small = TreeRoom(flat(FlatSettings(n=4, max_response_length=20)), 1000)
    assert [small.has_room(n, 10) for n in (0, 5, 9, 10, 11)] == [True] * 3 + [True, False]
    large = TreeRoom(flat(FlatSettings(n=16, max_response_length=7000)), 1000)
    assert [large.has_room(n, 0) for n in (0, 7, 8)] == [True, True, False]
    unknown = TreeRoom(object(), 1000)  # a strategy of one's own
    assert [unknown.has_room(n, 0) for n in (0, 7, 8)] == [True, True, False]
    assert TreeRoom(object(), 10).has_room(0, 500)  # the engine says if one alone cannot fit


def test_trees_that_begin_narrow_are_not_computed_again_and_again_for_lack_of_memory():
    """Each tree has 2 requests at first and 8 later: by requests alone all ten would start, and
    more than four times the tokens would be computed.
    """
    settings = narrow_trees(depth=10)
    strategy = STRATEGIES.get("treepo")(settings)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            problem_id=str(i),
            token_ids=np.array([i, *rng.integers(0, VOCABULARY, 7)], np.int32),
            root_key=root_key(i),
        )
        for i in range(10)
    ]
    tokens = 8 + 4 * (2 + 4 + 8 * 8)  # of a tree
    engine = Engine(
        tiny_model("gpt2", torch.float64),
        EngineSettings(num_kv_slots=3 * tokens + 40, max_running_requests=20),
    )
    trees = generate_all(engine, strategy, prompts)
    assert [sum(s.num_tokens for s in tree.segments) for tree in trees] == [tokens] * 10
    costs = engine.metrics()
    # Eight start before one has finished, three fit: the others wait and are computed once more.
    assert costs.query_tokens <= 1.4 * costs.unique_tokens
    assert costs.preempted == 0
    large = Engine(tiny_model("gpt2", torch.float64), EngineSettings(num_kv_slots=8192))
    expected = generate_all(large, strategy, prompts)
    assert all(a.same_tokens(b) for a, b in zip(expected, trees, strict=True))
