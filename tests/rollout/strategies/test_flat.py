import pickle

import numpy as np

from rollout.strategies.base import STRATEGIES
from rollout.strategies.settings import FlatSettings
from rollout.tree import EOS, TRUNCATED


def flat(**changes):
    settings = FlatSettings(**{"n": 5, "max_response_length": 12, "stop_token_ids": [1], **changes})
    return STRATEGIES.get("flat")(settings)


def test_every_response_is_one_segment_below_the_prompt(drive):
    tree = drive.grow(flat(), drive.prompt(), drive.ScriptedEngine(drive.random_script(0.06)))
    assert tree.leaves == (1, 2, 3, 4, 5)
    assert all((s.parent, s.level, s.sampled) == (0, 1, True) for s in tree.segments[1:])
    assert not tree.segments[0].sampled
    assert tree.segments[0].token_ids.tolist() == [40, 41, 42]
    for segment in tree.segments[1:]:
        ended = segment.token_ids[-1] == 1
        assert segment.finish_reason == (EOS if ended else TRUNCATED)
        assert ended or segment.num_tokens == 12
    assert {s.finish_reason for s in tree.segments[1:]} == {EOS, TRUNCATED}


def test_the_order_of_arrival_leaves_no_trace(drive):
    expected = drive.grow(flat(), drive.prompt(), drive.ScriptedEngine(drive.random_script(0.1)))
    for seed in range(20):
        engine = drive.ScriptedEngine(drive.random_script(0.1))
        rng = np.random.default_rng(seed)
        tree = drive.grow_in_disorder(
            flat(), drive.prompt(), engine, rng, between=lambda s: pickle.loads(pickle.dumps(s))
        )
        assert tree.same_tokens(expected)


def test_equal_responses_stay_separate_leaves(drive):
    tree = drive.grow(flat(), drive.prompt(), drive.ScriptedEngine(lambda c, r: [9, 9, 1]))
    assert tree.num_leaves == 5
    assert len({s.path_key for s in tree.segments}) == 6


def test_a_response_of_only_eos_is_a_leaf(drive):
    tree = drive.grow(flat(n=1), drive.prompt(), drive.ScriptedEngine(lambda c, r: [1]))
    assert tree.segments[1].token_ids.tolist() == [1]
    assert tree.segments[1].finish_reason == EOS


def test_the_spec_carries_the_settings(drive):
    strategy = flat(temperature=0.7, top_p=0.9, top_k=11, min_p=0.05, stop_token_ids=[1, 8])
    _, requests = strategy.start(drive.prompt())
    spec = requests[0].spec
    assert (spec.max_tokens, spec.temperature, spec.top_p, spec.top_k, spec.min_p) == (
        12, 0.7, 0.9, 11, 0.05,
    )  # fmt: skip
    assert spec.stop_token_ids == (1, 8)
    assert (spec.repetition_penalty, spec.ban_token_ids, spec.stop_strings) == (1.0, (), ())
    strategy = flat(
        repetition_penalty=1.2,
        ban_token_ids=[3, 4],
        stop_token_sequences=[[5, 6], [7]],
        stop_strings=["</answer>"],
    )
    spec = strategy.start(drive.prompt())[1][0].spec
    assert (spec.repetition_penalty, spec.ban_token_ids) == (1.2, (3, 4))
    assert (spec.stop_token_sequences, spec.stop_strings) == (((5, 6), (7,)), ("</answer>",))
    assert spec.num_response_tokens == 0


def test_a_response_that_ends_with_a_stop_sequence_is_an_end_of_sequence(drive):
    strategy = flat(n=2, stop_token_sequences=[[6, 7]])
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(lambda c, r: [6, 6, 7, 5]))
    for segment in tree.segments[1:]:
        assert segment.token_ids.tolist() == [6, 6, 7]
        assert segment.finish_reason == EOS


def test_the_finished_part_is_the_responses_that_came_so_far(drive):
    strategy, engine = flat(), drive.ScriptedEngine(drive.random_script(0.1))
    state, requests = strategy.start(drive.prompt())
    assert strategy.finished_part(state).num_leaves == 0
    late = [engine.extend(state.segments, requests[i]) for i in (3, 1)]
    state, _ = strategy.advance(state, late)
    part = strategy.finished_part(state)
    rest = [engine.extend(state.segments, requests[i]) for i in (0, 2, 4)]
    state, _ = strategy.advance(state, rest)
    whole = strategy.tree(state)
    assert strategy.finished_part(state).same_tokens(whole)
    # the part's leaves are leaves of the whole: the same path key, tokens and reason
    for leaf, in_whole in zip(part.leaves, (2, 4), strict=True):
        one, other = part.segments[leaf], whole.segments[in_whole]
        assert (one.path_key, one.finish_reason) == (other.path_key, other.finish_reason)
        assert np.array_equal(one.token_ids, other.token_ids)
