"""New weights while requests are unfinished: none of them, and none that follow, reads keys and
values of older weights, but those that are told to keep theirs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, path_logprobs, tiny_model

from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.settings import EngineSettings
from rollout.weights import stored_state
from treepo.base.digest import manifest_of

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(**settings) -> Engine:
    settings = {"num_kv_slots": 512, "max_running_requests": 6, **settings}
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(**settings))


def weight_sets(count: int) -> list:
    """Models with different weights; number 0 is the engines' own."""
    return [tiny_model("gpt2", torch.float64, seed=seed) for seed in range(count)]


def load(engine: Engine, version: int, model, in_flight: str) -> None:
    state = stored_state(model)
    engine.load_weights(version, manifest_of(state), state, in_flight=in_flight)


def check_against_versions(completion, models) -> None:
    """Log-probs of tokens drawn under each version equal a fresh forward with its weights."""
    ids = completion.node.path_token_ids()
    count = len(completion.token_ids)
    for version in np.unique(completion.policy_versions):
        of_version = completion.policy_versions == version
        fresh = path_logprobs(models[version], ids)[-count:]
        assert np.abs(fresh - completion.logprobs)[of_version].max() < 2e-6


def test_recompute_goes_on_with_what_was_drawn_under_the_new_weights():
    engine, models = make_engine(), weight_sets(2)
    node = engine.prefill(PROMPT)
    for key in range(3):
        engine.submit(node, ExtendSpec(max_tokens=12), key)
    for _ in range(5):
        engine.step()
    load(engine, 1, models[1], "recompute")
    engine.check_integrity()
    assert engine.pool.num_held == 0  # all older keys and values are gone
    found = []
    while not engine.is_idle:
        found += engine.step()
    assert len(found) == 3
    for completion in found:
        assert completion.policy_versions.tolist() == [0] * 5 + [1] * 7
        check_against_versions(completion, models)


def test_kept_requests_go_on_from_their_keys_and_take_them_along_when_they_end():
    engine, models = make_engine(), weight_sets(2)
    node = engine.prefill(PROMPT)
    engine.submit(node, ExtendSpec(max_tokens=12), 1)
    for _ in range(5):
        engine.step()
    queries = engine.metrics().query_tokens
    load(engine, 1, models[1], "keep")
    engine.check_integrity()
    # a request that starts now computes the prompt anew, though the old one is still held
    engine.submit(node, ExtendSpec(max_tokens=3), 2)
    found = {}
    while not engine.is_idle:
        for completion in engine.step():
            found[completion.request_id] = completion
            engine.check_integrity()
    # the old one is not computed again: six further tokens; the new one: its prompt and two
    assert engine.metrics().query_tokens == queries + 7 + len(PROMPT) + 2
    kept, new = found[0], found[1]
    assert kept.policy_versions.tolist() == [0] * 5 + [1] * 7
    assert new.policy_versions.tolist() == [1] * 3
    check_against_versions(new, models)
    first = path_logprobs(models[0], kept.node.path_token_ids())[-12:]
    assert np.abs(first - kept.logprobs)[:5].max() < 2e-6
    # what follows the kept one is computed from scratch under the new weights
    (after,) = engine.extend([(kept.node, ExtendSpec(max_tokens=3), 3)])
    check_against_versions(after, models)
    engine.free(kept.node), engine.free(new.node), engine.free(after.node), engine.free(node)
    engine.tree.evict(512)
    assert engine.pool.num_held == 0
    engine.check_integrity()


def test_unfinished_requests_are_refused_by_default_and_nothing_is_copied():
    engine, models = make_engine(), weight_sets(2)
    before = engine.digests()
    engine.submit(engine.prefill(PROMPT), ExtendSpec(max_tokens=4), 1)
    with pytest.raises(ValueError, match="1 requests are unfinished.*in_flight='recompute'"):
        load(engine, 1, models[1], "refuse")
    with pytest.raises(ValueError, match="in_flight='drop': choose one of refuse"):
        load(engine, 1, models[1], "drop")
    assert engine.digests() == before and engine.policy_version == 0


def test_a_set_that_does_not_fit_leaves_requests_in_flight_alone():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    (expected,) = engine.extend([(node, ExtendSpec(max_tokens=9), 1)])
    engine.submit(node, ExtendSpec(max_tokens=9), 1)
    engine.step()
    wrong = tiny_model("gpt_neox", torch.float64)
    with pytest.raises(ValueError, match="does not fit"):
        load(engine, 1, wrong, "keep")
    found: list = []
    while not found:
        found = engine.step()
    assert found[0].token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_no_new_request_reads_keys_of_older_weights(in_flight, seed):
    """Random requests, cancels, evictions, tight memory, and weights that change under them."""
    rng = np.random.default_rng(seed)
    budget = int(rng.choice([7, 32, 1024]))
    engine = make_engine(num_kv_slots=int(rng.choice([160, 512])), max_tokens_per_step=budget)
    models = weight_sets(3)
    # The versions that a load may use: weights of version v are those of model v % 3.
    version, loads, checked = 0, 0, 0
    nodes = [engine.prefill(PROMPT)]
    started: dict[int, int] = {}  # request -> version in force when it was submitted
    for step in range(150):
        choice = rng.integers(8)
        node = nodes[rng.integers(len(nodes))]
        if choice <= 3 and len(node.path_token_ids()) < 70:
            spec = ExtendSpec(max_tokens=int(rng.integers(1, 14)))
            started[engine.submit(node, spec, step)] = version
        elif choice == 4 and started:
            request = int(rng.choice(list(started)))
            if engine.cancel(request):
                started.pop(request)
        elif choice == 5:
            engine.tree.evict(int(rng.integers(1, 60)))
        elif choice == 6 and rng.integers(3) == 0:
            version, loads = version + 1, loads + 1
            load(engine, version, models[version % 3], in_flight)
        elif choice == 7:
            nodes.append(engine.append(node, rng.integers(0, VOCABULARY, 3)))
        for completion in engine.step():
            versions = completion.policy_versions
            ids, count = completion.node.path_token_ids(), len(completion.token_ids)
            assert versions.min() >= started.pop(completion.request_id)
            assert (np.diff(versions) >= 0).all()
            # Kept requests read older keys after their first version only.
            trusted = versions == versions[0] if in_flight == "keep" else versions >= 0
            for v in np.unique(versions[trusted]):
                fresh = path_logprobs(models[v % 3], ids)[-count:]
                where = trusted & (versions == v)
                assert np.abs(fresh - completion.logprobs)[where].max() < 2e-6
                checked += int(where.sum())
            engine.soften(completion.node)
            nodes.append(completion.node)
        engine.check_integrity()
        for node in nodes[:]:
            if len(nodes) > 5 and node is not nodes[0]:
                if all(r.node is not node for r in _requests(engine)):
                    nodes.remove(node)
                    engine.free(node, drop=bool(rng.integers(2)))
    assert loads >= 2 and checked > 50


def _requests(engine):
    return (*engine._decoder.waiting, *engine._decoder.running)
