"""The engine against fresh forwards of every path, in exact arithmetic and in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, path_logprobs, tiny_model

from rollout.engine import Engine
from rollout.extend import LENGTH, STOP, ExtendSpec
from rollout.settings import EngineSettings

PROMPT = [3, 5, 7, 9, 11, 13, 2]


def make_engine(family="qwen3", dtype=torch.float32, **settings) -> Engine:
    settings.setdefault("num_kv_slots", 1024)
    return Engine(tiny_model(family, dtype), EngineSettings(**settings))


def sample_tree(engine, depth=3, width=2, spec=None, key=1):
    """Grow ``width`` forks below each of ``depth`` levels; returns all completions."""
    spec = spec or ExtendSpec(max_tokens=5)
    nodes, completions = [engine.prefill(PROMPT)], []
    for level in range(depth):
        items = [
            (node, spec, key + 1000 * level + 10 * i + j)
            for i, node in enumerate(nodes)
            for j in range(width)
        ]
        grown = list(engine.extend(items))
        completions += grown
        nodes = [c.node for c in grown]
    return completions


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", torch.float64, 1e-9),
        ("gpt_neox", torch.float64, 1e-9),
        ("qwen3", torch.float32, 1e-5),
        ("llama", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_logprobs_of_every_node_equal_a_fresh_forward_of_its_path(
    family, dtype, tolerance, attention
):
    engine = make_engine(family, dtype, attention=attention)
    for completion in sample_tree(engine):
        path = completion.node.path_token_ids()
        fresh = path_logprobs(engine.model, path)[-len(completion.token_ids) :]
        # the record itself is float32
        assert np.abs(fresh.astype(np.float32) - completion.logprobs).max() <= max(tolerance, 2e-6)
        assert np.array_equal(engine.path_token_ids(completion.node), path)
    engine.check_integrity()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_logits_of_a_tree_are_exact_in_float64(family, monkeypatch):
    engine = make_engine(family, torch.float64)
    seen = []
    inner = engine.runner.forward

    def spy(token_ids, positions, slots, plan, wanted):
        logits = inner(token_ids, positions, slots, plan, wanted)
        seen.append(torch.log_softmax(logits, dim=-1).numpy())
        return logits

    monkeypatch.setattr(engine.runner, "forward", spy)
    node = engine.prefill(PROMPT)
    (first,) = engine.extend([(node, ExtendSpec(max_tokens=6), 5)])
    seen.clear()
    (second,) = engine.extend([(first.node, ExtendSpec(max_tokens=8), 6)])
    path = second.node.path_token_ids()
    from tiny_models import plain_logprobs

    fresh = plain_logprobs(engine.model, path)[len(path) - 9 : -1]
    assert np.abs(fresh - np.concatenate(seen)).max() < 1e-9


def test_shared_tokens_are_forwarded_once():
    engine = make_engine()
    engine.reset_metrics()
    node = engine.prefill(PROMPT)
    spec = ExtendSpec(max_tokens=4)
    first = list(engine.extend([(node, spec, key) for key in range(8)]))
    # the prompt once, three of four drawn tokens a fork
    assert engine.metrics().query_tokens == len(PROMPT) + 8 * 3
    assert engine.metrics().sequential_steps == 4
    list(engine.extend([(first[0].node, spec, key) for key in range(8, 12)]))
    # the last drawn token of the parent once for all four forks
    assert engine.metrics().query_tokens == len(PROMPT) + 8 * 3 + 1 + 4 * 3


def test_two_forks_that_draw_equal_tokens_stay_two_nodes():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    spec = ExtendSpec(max_tokens=5, temperature=0.0)
    a, b = engine.extend([(node, spec, 1), (node, spec, 2)])
    assert np.array_equal(a.token_ids, b.token_ids)
    assert a.node.tree_node is not b.node.tree_node
    engine.check_integrity()
    engine.free(a.node, drop=True)
    engine.check_integrity()
    (c,) = engine.extend([(b.node, spec, 3)])
    path = c.node.path_token_ids()
    assert np.allclose(path_logprobs(engine.model, path)[-5:], c.logprobs, atol=1e-5)


def test_draws_do_not_depend_on_where_segments_are_cut():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    (whole,) = engine.extend([(node, ExtendSpec(max_tokens=9), 77)])
    (first,) = engine.extend([(node, ExtendSpec(max_tokens=4), 77)])
    (second,) = engine.extend([(first.node, ExtendSpec(max_tokens=5), 77)])
    assert whole.token_ids.tolist() == first.token_ids.tolist() + second.token_ids.tolist()


def test_a_segment_of_no_tokens_ends_by_length_without_a_forward():
    engine = make_engine()
    engine.reset_metrics()
    node = engine.prefill(PROMPT)
    (empty,) = engine.extend([(node, ExtendSpec(max_tokens=0), 1)])
    assert len(empty.token_ids) == 0 and empty.finish_reason == LENGTH
    assert engine.metrics().sequential_steps == 0
    (after,) = engine.extend([(empty.node, ExtendSpec(max_tokens=3), 2)])
    (direct,) = engine.extend([(node, ExtendSpec(max_tokens=3), 2)])
    assert after.token_ids.tolist() == direct.token_ids.tolist()


def test_a_stop_token_as_the_only_token_ends_the_segment_and_stays_in_it():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    everything = tuple(range(VOCABULARY))
    (only,) = engine.extend([(node, ExtendSpec(max_tokens=9, stop_token_ids=everything), 1)])
    assert len(only.token_ids) == 1 and only.finish_reason == STOP
    (free,) = engine.extend([(node, ExtendSpec(max_tokens=9), 1)])
    stop = int(free.token_ids[3])
    (cut,) = engine.extend([(node, ExtendSpec(max_tokens=9, stop_token_ids=(99, stop)), 1)])
    expected = free.token_ids[: free.token_ids.tolist().index(stop) + 1]
    assert cut.token_ids.tolist() == expected.tolist() and cut.finish_reason == STOP
    # something may follow a stop token all the same
    (after,) = engine.extend([(cut.node, ExtendSpec(max_tokens=3), 2)])
    path = after.node.path_token_ids()
    assert np.allclose(path_logprobs(engine.model, path)[-3:], after.logprobs, atol=1e-5)
    engine.check_integrity()


def test_a_stop_at_the_last_allowed_token_is_a_stop():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    (free,) = engine.extend([(node, ExtendSpec(max_tokens=1), 1)])
    stop = (int(free.token_ids[0]),)
    (one,) = engine.extend([(node, ExtendSpec(max_tokens=1, stop_token_ids=stop), 1)])
    assert one.finish_reason == STOP


def test_forced_tokens_and_splits_give_the_path_they_say():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    (drawn,) = engine.extend([(node, ExtendSpec(max_tokens=6), 1)])
    forced = engine.append(drawn.node, [4, 4, 8])
    cut = engine.split(drawn.node, len(PROMPT) + 2)
    for handle, expected in (
        (forced, [*PROMPT, *drawn.token_ids, 4, 4, 8]),
        (cut, [*PROMPT, *drawn.token_ids[:2]]),
        (engine.fork(cut, 2)[1], [*PROMPT, *drawn.token_ids[:2]]),
    ):
        assert engine.path_token_ids(handle).tolist() == list(expected)
        (after,) = engine.extend([(handle, ExtendSpec(max_tokens=4), 9)])
        fresh = path_logprobs(engine.model, after.node.path_token_ids())[-4:]
        assert np.allclose(fresh, after.logprobs, atol=1e-5)
    engine.check_integrity()
    with pytest.raises(ValueError, match="offset=99"):
        engine.split(node, 99)


def test_completions_stream_as_they_finish_and_closing_cancels_the_rest():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    stream = engine.extend(
        [(node, ExtendSpec(max_tokens=20), 1), (node, ExtendSpec(max_tokens=2), 2)]
    )
    first = next(stream)
    assert len(first.token_ids) == 2 and engine.num_running == 1
    stream.close()
    assert engine.is_idle
    engine.check_integrity()
    engine.free(first.node, drop=True)
    engine.free(node)
    assert engine.pool.num_held == len(PROMPT)  # the prompt stays as cache
    engine.tree.evict(1)
    assert engine.pool.num_held == 0
    engine.check_integrity()


def test_a_path_that_cannot_fit_is_one_clear_error_before_work():
    engine = make_engine(num_kv_slots=64)
    node = engine.prefill(PROMPT)
    with pytest.raises(ValueError, match="num_kv_slots=64 is too small: a path of 7 tokens"):
        engine.submit(node, ExtendSpec(max_tokens=58), 1)
    engine.submit(node, ExtendSpec(max_tokens=57), 1)
    with pytest.raises(ValueError, match="512 positions"):
        big = make_engine("gpt2", num_kv_slots=1024)
        big.submit(big.prefill(PROMPT), ExtendSpec(max_tokens=510), 1)


def test_live_handles_that_leave_no_slots_are_named():
    engine = make_engine(num_kv_slots=64)
    held = engine.prefill(PROMPT)
    (grown,) = engine.extend([(held, ExtendSpec(max_tokens=40), 1)])
    other = engine.prefill([1, 2, 3])
    engine.submit(other, ExtendSpec(max_tokens=40), 2)
    with pytest.raises(ValueError, match="live handles hold 47"):
        while not engine.is_idle:
            engine.step()
    engine.soften(grown.node)  # now it may give way
    while not engine.is_idle:
        engine.step()
    engine.check_integrity()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("slots", [96, 1024])
def test_preemption_and_sharing_change_no_token(share, slots):
    spec = ExtendSpec(max_tokens=30, stop_token_ids=(4,))
    reference = make_engine("qwen3", torch.float64)
    engine = make_engine("qwen3", torch.float64, num_kv_slots=slots, share_prefixes=share)

    def run(engine):
        node = engine.prefill(PROMPT)
        found = {}
        for completion in engine.extend([(node, spec, key) for key in range(12)]):
            engine.check_integrity()
            found[completion.request_id] = completion.token_ids.tolist()
            engine.free(completion.node, drop=True)
        return [tokens for _, tokens in sorted(found.items())]

    assert run(engine) == run(reference)
    engine.check_integrity()


def test_growing_segments_are_put_back_when_slots_run_short_and_go_on_as_before():
    # Ten segments of up to 150 tokens start with 64 slots each and outgrow a pool of 900.
    spec = ExtendSpec(max_tokens=150)
    small = make_engine("gpt2", torch.float64, num_kv_slots=700)
    large = make_engine("gpt2", torch.float64, num_kv_slots=4096)
    found = []
    for engine in (small, large):
        node = engine.prefill(PROMPT)
        tokens = {}
        for completion in engine.extend([(node, spec, key) for key in range(10)]):
            tokens[completion.request_id] = completion.token_ids.tolist()
            engine.free(completion.node, drop=True)
        engine.check_integrity()
        found.append([t for _, t in sorted(tokens.items())])
    assert found[0] == found[1]
    assert small.metrics().preempted > 0 and large.metrics().preempted == 0


def test_random_forks_cuts_frees_and_evictions_keep_exactness_and_integrity():
    rng = np.random.default_rng(0)
    engine = make_engine("gpt2", torch.float64, num_kv_slots=300, max_running_requests=5)
    nodes = [engine.prefill(PROMPT)]
    running = {}
    for step in range(120):
        choice = rng.integers(6)
        node = nodes[rng.integers(len(nodes))]
        if choice == 0 and len(node.path_token_ids()) < 60:
            spec = ExtendSpec(max_tokens=int(rng.integers(0, 9)), stop_token_ids=(3,))
            running[engine.submit(node, spec, step)] = True
        elif choice == 1 and len(node.path_token_ids()) < 60:
            nodes.append(engine.append(node, rng.integers(0, VOCABULARY, rng.integers(0, 5))))
        elif choice == 2:
            nodes.append(engine.split(node, int(rng.integers(1, len(node.path_token_ids()) + 1))))
        elif choice == 3 and len(nodes) > 6:
            gone = nodes.pop(int(rng.integers(len(nodes))))
            if all(
                request.node is not gone
                for request in (*engine._decoder.waiting, *engine._decoder.running)
            ):
                engine.free(gone, drop=bool(rng.integers(2)))
        elif choice == 4:
            engine.tree.evict(int(rng.integers(1, 40)))
        elif choice == 5:
            engine.soften(node)
        for completion in engine.step():
            path = engine.path_token_ids(completion.node)
            assert np.array_equal(path, completion.node.path_token_ids())
            if len(completion.token_ids):
                fresh = path_logprobs(engine.model, path)[-len(completion.token_ids) :]
                assert np.abs(fresh - completion.logprobs).max() < 2e-6
            nodes.append(completion.node)
        engine.check_integrity()
    assert engine.metrics().segments > 10


def test_scores_through_the_tree_equal_a_fresh_forward():
    engine = make_engine("gpt2", torch.float64)
    path = np.random.default_rng(0).integers(0, VOCABULARY, 40)
    scores = engine.score_path(path, 0.7)
    assert scores.dtype == np.float32 and scores[0] == 0
    fresh = path_logprobs(engine.model, path, 0.7)
    assert np.abs(scores - fresh).max() < 2e-6
    assert engine.score_path([5]).tolist() == [0.0]
    engine.check_integrity()
    assert engine.pool.num_held == 0


def test_an_engine_that_sleeps_says_so_and_handles_outlive_it():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    (before,) = engine.extend([(node, ExtendSpec(max_tokens=4), 1)])
    engine.sleep()
    assert engine.pool.num_held == 0 and not engine.pool.keys
    with pytest.raises(ValueError, match="asleep"):
        engine.submit(node, ExtendSpec(max_tokens=4), 1)
    engine.wake()
    (after,) = engine.extend([(node, ExtendSpec(max_tokens=4), 1)])
    assert before.token_ids.tolist() == after.token_ids.tolist()
    (more,) = engine.extend([(before.node, ExtendSpec(max_tokens=3), 2)])
    fresh = path_logprobs(engine.model, more.node.path_token_ids())[-3:]
    assert np.allclose(fresh, more.logprobs, atol=1e-5)
    engine.check_integrity()


def test_closing_a_stream_lets_go_of_segments_that_finished_in_the_same_step():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    stream = engine.extend([(node, ExtendSpec(max_tokens=3), key) for key in range(4)])
    first = next(stream)  # all four finish in one step; three are not handed out yet
    stream.close()
    assert engine.is_idle
    engine.free(first.node)
    engine.free(node)
    assert engine.tree.num_protected == 0
    engine.check_integrity()


def test_a_stream_leaves_other_requests_completions_to_whoever_asks_for_them():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    other = engine.submit(node, ExtendSpec(max_tokens=2), 1)
    stream = engine.extend(
        [(node, ExtendSpec(max_tokens=2), 2), (node, ExtendSpec(max_tokens=2), 3)]
    )
    next(stream)
    stream.close()
    (found,) = engine.step()
    assert found.request_id == other and engine.is_idle
