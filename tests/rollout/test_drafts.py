"""Draft trees: their logits are those of fresh forwards, and what is committed is as if drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, path_logprobs, plain_logprobs, tiny_model

from rollout.drafts import DraftTree
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(family="gpt2", dtype=torch.float64, **settings) -> Engine:
    settings = {"num_kv_slots": 512, "max_running_requests": 8, **settings}
    return Engine(tiny_model(family, dtype), EngineSettings(**settings))


def random_tree(rng: np.random.Generator, size: int) -> DraftTree:
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(size)], np.int64)
    return DraftTree(parents=parents, token_ids=rng.integers(0, VOCABULARY, size).astype(np.int32))


def tree_path(tree: DraftTree, index: int) -> list[int]:
    indices: list[int] = []
    while index >= 0:
        indices.append(index)
        index = int(tree.parents[index])
    return indices[::-1]


def check_logits(engine, node, draft, tolerance):
    """Every row of the draft against a fresh forward of its path."""
    found = torch.log_softmax(draft.logits.double(), dim=-1).numpy()
    above = node.path_token_ids()
    assert found.shape == (len(draft.tree) + 1, VOCABULARY)
    for index in range(-1, len(draft.tree)):
        ids = np.concatenate([above, draft.tree.token_ids[tree_path(draft.tree, index)]])
        fresh = plain_logprobs(engine.model, ids.astype(np.int64))[-1]
        assert np.abs(fresh - found[index + 1]).max() < tolerance


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-9),
        ("gpt_neox", torch.float64, 1e-9),
        ("mistral", torch.float32, 5e-5),
    ],
)
@pytest.mark.parametrize("attention", ["cpu", "reference"])
@pytest.mark.parametrize("seed", range(3))
def test_logits_of_a_random_draft_equal_fresh_forwards(family, dtype, tolerance, attention, seed):
    rng = np.random.default_rng(seed)
    engine = make_engine(family, dtype, attention=attention)
    node = engine.prefill(PROMPT)
    (drawn,) = engine.extend([(node, ExtendSpec(max_tokens=4), 1)])
    for place in (node, drawn.node, engine.append(drawn.node, [4, 4])):
        draft = engine.forward(place, random_tree(rng, int(rng.integers(1, 12))))
        check_logits(engine, place, draft, tolerance)
        engine.check_integrity()
        engine.commit(draft)
        engine.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_what_is_committed_is_as_if_it_had_been_drawn(seed):
    rng = np.random.default_rng(seed)
    engine = make_engine()
    node = engine.prefill(PROMPT)
    for step in range(5):
        tree = random_tree(rng, 10)
        draft = engine.forward(node, tree)
        check_logits(engine, node, draft, 1e-9)
        path = tree_path(tree, int(rng.integers(-1, 10)))
        before = node.path_token_ids()
        node = engine.commit(draft, path)
        assert node.path_token_ids().tolist() == [*before, *tree.token_ids[path]]
        assert engine.path_token_ids(node).tolist() == node.path_token_ids().tolist()
        engine.check_integrity()
        queries = engine.metrics().query_tokens
        (after,) = engine.extend([(node, ExtendSpec(max_tokens=3), step)])
        # nothing that was committed is computed again, but for the last token's logits
        assert engine.metrics().query_tokens == queries + 1 + 2
        fresh = path_logprobs(engine.model, after.node.path_token_ids())[-3:]
        assert np.abs(fresh - after.logprobs).max() < 2e-6
        node = after.node


def test_nothing_of_a_dropped_draft_stays():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    draft = engine.forward(node, DraftTree.chain([1, 2, 3, 4]))
    assert engine.pool.num_held == len(PROMPT) + 4
    same = engine.commit(draft)
    assert same.path_token_ids().tolist() == PROMPT
    assert engine.pool.num_held == len(PROMPT)
    costs = engine.metrics()
    assert (costs.draft_tokens, costs.wasted_draft_tokens) == (4, 4)
    assert costs.query_tokens == len(PROMPT) + 4 and costs.sequential_steps == 1


def test_an_empty_draft_gives_the_logits_at_the_node():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    draft = engine.forward(node, DraftTree.chain([]))
    check_logits(engine, node, draft, 1e-9)
    engine.commit(draft)


def test_a_long_path_below_a_draft_is_computed_in_parts():
    engine = make_engine(max_tokens_per_step=9)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, 60)
    node = engine.prefill(ids)
    draft = engine.forward(node, DraftTree.chain([4, 5]))
    check_logits(engine, node, draft, 1e-9)
    assert engine.metrics().sequential_steps == 7
    engine.commit(draft, [0, 1])


def test_drafts_beside_running_requests_change_none_of_their_tokens():
    rng = np.random.default_rng(0)
    alone, company = make_engine(), make_engine()
    spec = ExtendSpec(max_tokens=40)
    (expected,) = alone.extend([(alone.prefill(PROMPT), spec, 3)])
    node = company.prefill(PROMPT)
    company.submit(node, spec, 3)
    done: list = []
    while not done:
        done = company.step()
        draft = company.forward(node, random_tree(rng, 6))
        check_logits(company, node, draft, 1e-9)
        company.check_integrity()
        company.commit(draft, tree_path(draft.tree, 5))
    assert done[0].token_ids.tolist() == expected.token_ids.tolist()


def test_bad_drafts_and_bad_paths_are_named():
    with pytest.raises(ValueError, match=r"parents\[1\]=1"):
        DraftTree(parents=np.array([-1, 1]), token_ids=np.array([1, 2], np.int32))
    with pytest.raises(ValueError, match="vectors of one length"):
        DraftTree(parents=np.array([-1]), token_ids=np.array([1, 2], np.int32))
    engine = make_engine()
    draft = engine.forward(engine.prefill(PROMPT), DraftTree.chain([1, 2, 3]))
    with pytest.raises(ValueError, match="token 2 is not a child of token 0"):
        engine.commit(draft, [0, 2])
    with pytest.raises(ValueError, match="1 drafts are open"):
        engine.sleep()
    engine.commit(draft, [0])
    with pytest.raises(ValueError, match="committed before"):
        engine.commit(draft, [0])
    small = make_engine(num_kv_slots=64)
    held = small.prefill(np.arange(50) % VOCABULARY)
    with pytest.raises(ValueError, match="a draft of 20 tokens"):
        other = small.prefill([1] * 30)
        small.forward(held, DraftTree.chain([]))
        small.forward(other, DraftTree.chain([1] * 20))
    small.check_integrity()


def test_each_scorer_is_asked_once_for_all_its_paths():
    engine = make_engine()
    calls = []

    def total(paths):
        calls.append(len(paths))
        return [float(path.sum()) for path in paths]

    def length(paths):
        calls.append(len(paths))
        return [len(path) for path in paths]

    node = engine.prefill(PROMPT)
    below = engine.append(node, [1, 1])
    scores = engine.score([(node, total), (below, length), (below, total)])
    assert scores == [sum(PROMPT), len(PROMPT) + 2, sum(PROMPT) + 2]
    assert calls == [2, 1] and engine.metrics().scorer_passes == 3
    with pytest.raises(ValueError, match="gave 1 scores for 2 paths"):
        engine.score([(node, lambda paths: [0.0]), (below, total)][:1] * 2)
