"""Wrong use of the engine: an error that says what is wrong, and an engine that serves on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from rollout.drafts import DraftTree
from rollout.engine import Engine
from rollout.extend import ExtendSpec
from rollout.scheduler import generate
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.flat import Flat
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.weights import stored_state
from treepo.base.digest import manifest_of
from treepo.base.keys import root_key

PROMPT = [3, 5, 7, 9, 11, 13, 2]
GREEDY = ExtendSpec(max_tokens=6, temperature=0.0)


def make_engine(**settings) -> Engine:
    settings.setdefault("num_kv_slots", 600)
    settings.setdefault("max_running_requests", 12)
    settings.setdefault("max_tokens_per_step", 64)
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(dtype="float64", **settings))


def greedy(engine: Engine, prompt=PROMPT) -> list[int]:
    node = engine.prefill(prompt)
    (completion,) = engine.extend([(node, GREEDY, 1)])
    engine.free(completion.node)
    engine.free(node)
    return completion.token_ids.tolist()


def assert_sound(engine: Engine) -> None:
    """Nothing is held, and the engine gives what a fresh one does."""
    assert engine.is_idle
    engine.check_integrity()
    assert engine.tree.num_protected == 0
    assert greedy(engine) == greedy(make_engine())


# Several callers.


def test_streams_that_take_turns_each_get_all_their_completions():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    first = engine.extend([(node, ExtendSpec(max_tokens=n), n) for n in (1, 3, 9)])
    got = [next(first)]
    second = engine.extend([(node, ExtendSpec(max_tokens=n), 10 + n) for n in (2, 5)])
    others = [next(second)]
    got += list(first)
    others += list(second)
    assert [len(c.token_ids) for c in got] == [1, 3, 9]
    assert [len(c.token_ids) for c in others] == [2, 5]
    for completion in got + others:
        engine.free(completion.node)
    engine.free(node)
    assert_sound(engine)


def test_a_consumer_may_use_the_engine_inside_its_stream():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    seen = []
    for completion in engine.extend([(node, ExtendSpec(max_tokens=n), n) for n in range(1, 6)]):
        seen.append(len(completion.token_ids))
        engine.free(completion.node)
        assert greedy(engine) == greedy(make_engine())
    engine.free(node)
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert_sound(engine)


def test_trees_grow_beside_other_requests_and_beside_each_other():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    asked = engine.submit(node, ExtendSpec(max_tokens=3), 2)
    prompts = [
        Prompt(problem_id=str(i), token_ids=np.array(PROMPT[i:]), root_key=root_key("misuse", i))
        for i in range(3)
    ]
    settings = FlatSettings(n=3, max_response_length=7)
    alone = list(generate(make_engine(), Flat(settings), prompts))
    streams = [generate(engine, Flat(settings), prompts) for _ in range(2)]
    for tree, again, expected in zip(*streams, alone, strict=True):
        assert tree.same_tokens(expected) and again.same_tokens(expected)
    (completion,) = engine.step()
    assert completion.request_id == asked
    engine.free(completion.node)
    engine.free(node)
    assert_sound(engine)


def test_one_invalid_item_takes_the_others_of_its_stream_back():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    spec = ExtendSpec(max_tokens=3)
    stream = engine.extend(
        [(node, spec, 1), (node, spec, 2), (node, ExtendSpec(max_tokens=999), 3)]
    )
    with pytest.raises(ValueError, match="num_kv_slots=600 is too small"):
        list(stream)
    engine.free(node)
    assert_sound(engine)


# Handles.


def test_a_handle_may_be_freed_while_a_request_grows_from_it():
    for share in (True, False):
        engine = make_engine(share_prefixes=share)
        node = engine.prefill(PROMPT)
        engine.submit(node, GREEDY, 1)
        engine.free(node)
        finished = []
        while not engine.is_idle:
            finished += engine.step()
        assert finished[0].token_ids.tolist() == greedy(make_engine())
        engine.free(finished[0].node)
        assert_sound(engine)


def test_freed_and_foreign_handles_are_refused():
    engine, other = make_engine(), make_engine()
    node, foreign = engine.prefill(PROMPT), other.prefill(PROMPT)
    engine.free(node)
    for use in (
        lambda handle: engine.free(handle),
        lambda handle: engine.soften(handle),
        lambda handle: engine.append(handle, [1]),
        lambda handle: engine.submit(handle, GREEDY, 1),
        lambda handle: engine.forward(handle, DraftTree.chain([1])),
    ):
        with pytest.raises(ValueError, match=r"this handle \(of 7 tokens\) was freed"):
            use(node)
        with pytest.raises(ValueError, match="belongs to another engine"):
            use(foreign)
    with pytest.raises(ValueError, match="list is no handle: prefill"):
        engine.submit(PROMPT, GREEDY, 1)  # type: ignore[arg-type]
    other.free(foreign)
    assert_sound(engine)
    assert_sound(other)


# What a caller does with its arrays afterwards.


def test_arrays_that_a_caller_changes_afterwards_change_nothing():
    engine = make_engine()
    buffer = np.array(PROMPT, np.int32)
    node = engine.prefill(buffer)
    (completion,) = engine.extend([(node, GREEDY, 1)])
    buffer[1:] = 1
    before = completion.node.path_token_ids()
    completion.token_ids[:] = 0
    assert np.array_equal(completion.node.path_token_ids(), before)
    chain = np.array([4, 5], np.int32)
    draft = engine.forward(completion.node, DraftTree.chain(chain))
    chain[:] = 9
    kept = engine.commit(draft, [0, 1])
    assert engine.path_token_ids(kept)[-2:].tolist() == [4, 5]
    for handle in (kept, completion.node, node):
        engine.free(handle)
    assert greedy(engine, [3, 1, 1, 1, 1, 1, 1]) == greedy(make_engine(), [3, 1, 1, 1, 1, 1, 1])
    assert_sound(engine)


# Tokens, specs, keys, versions.


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([31], "token id 31 at place 0 is outside the model's vocabulary of 31"),
        ([1, -1], "token id -1 at place 1"),
        (np.array([2**32 + 5]), "outside the model's vocabulary"),
        ([1.7], "must be a flat sequence of integers, not float64"),
        (["1"], "must be a flat sequence of integers"),
        ([True], "must be a flat sequence of integers, not bool"),
        ([[1, 2]], r"must be a flat sequence of integers, not int64 of shape \(1, 2\)"),
        (5, "must be a flat sequence of integers"),
        (None, "must be a flat sequence of integers"),
    ],
)
def test_tokens_that_the_model_lacks_are_refused_by_every_verb(tokens, message):
    engine = make_engine()
    node = engine.prefill(PROMPT)
    for use in (
        lambda: engine.prefill(tokens),
        lambda: engine.append(node, tokens),
        lambda: engine.score_path(tokens),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    engine.free(node)
    assert_sound(engine)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 31], "draft: token id 31 at place 1 is outside the model's vocabulary of 31"),
        ([1, -1], "draft: token id -1 at place 1"),
        ([2**32 + 5], "draft: token id 4294967301 at place 0"),
        (np.array([2**32 + 5]), "draft: token id 4294967301 at place 0"),
        ([1.9, 2.2], "draft tree: token_ids must be integers, not float64"),
        (["1"], "draft tree: token_ids must be integers, not <U1"),
        ([True], "draft tree: token_ids must be integers, not bool"),
        ([[1, 2]], r"draft tree: parents \(2,\) and token_ids \(1, 2\) must be vectors"),
        (5, r"draft tree: parents \(1,\) and token_ids \(\) must be vectors"),
        (None, "draft tree: token_ids must be integers, not object"),
    ],
)
def test_tokens_that_the_model_lacks_are_refused_in_a_draft(tokens, message):
    engine = make_engine()
    node = engine.prefill(PROMPT)
    with pytest.raises(ValueError, match=message):
        engine.forward(node, DraftTree.chain(tokens))
    engine.free(node)
    assert_sound(engine)


def test_a_draft_of_another_shape_or_path_leaves_nothing_behind():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    with pytest.raises(ValueError, match="parents must be integers, not float64"):
        DraftTree(parents=np.array([-1.0, 0.0]), token_ids=np.array([1, 2]))
    draft = engine.forward(node, DraftTree.chain([1, 2]))
    with pytest.raises(ValueError, match="'a' is no index of a draft token"):
        engine.commit(draft, ["a"])  # type: ignore[list-item]
    kept = engine.commit(draft, iter([0, 1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not open here"):
        engine.commit(draft, [])
    engine.free(kept)
    engine.free(node)
    assert_sound(engine)


def test_a_forward_that_fails_gives_its_slots_back(monkeypatch):
    engine = make_engine()
    node = engine.prefill(PROMPT)
    run = engine.runner.forward

    def fails(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.runner, "forward", fails)
    for use in (
        lambda: engine.forward(node, DraftTree.chain([1, 2])),
        lambda: engine.score_path(PROMPT),
    ):
        with pytest.raises(RuntimeError, match="no memory"):
            use()
    monkeypatch.setattr(engine.runner, "forward", run)
    engine.free(node)
    assert_sound(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_tokens=2.5), "max_tokens=2.5: it must be an integer"),
        (dict(max_tokens=True), "max_tokens=True: it must be an integer"),
        (dict(top_k=2**63), "top_k=.*: it must be an integer"),
        (dict(temperature=float("nan")), "temperature=nan: it must be a finite number"),
        (dict(temperature=1e-320), "temperature=.* it must be 0 .greedy. or >= 1e-05"),
        (dict(repetition_penalty=1e-320), "repetition_penalty=.* it must be in"),
        (dict(ban_token_ids={1, 2}), "ban_token_ids=.*: it must be a sequence of integers"),
        (dict(ban_token_ids=(1.5,)), "ban_token_ids=.*: it must be a sequence of integers"),
        (dict(stop_strings="</answer>"), "stop_strings='</answer>': it must be a sequence of str"),
        (dict(stop_strings=("\ud800",)), "stop_strings=.*: it must be a sequence of strings"),
        (dict(wants_entropy="yes"), "wants_entropy='yes': it must be True or False"),
    ],
)
def test_a_spec_of_wrong_types_names_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        ExtendSpec(**{"max_tokens": 3, **change})


@pytest.mark.parametrize("temperature", [-1.0, 1e-6, 1e-320, float("nan"), float("inf")])
def test_a_temperature_that_no_segment_could_have_scores_no_path(temperature):
    engine = make_engine()
    with pytest.raises(ValueError, match="temperature=.*: it must be 0 .greedy. or >= 1e-05"):
        engine.score_path(PROMPT, temperature)
    assert_sound(engine)


def test_numpy_numbers_and_lists_in_a_spec_are_as_good_as_pythons():
    spec = ExtendSpec(
        max_tokens=np.int64(4), ban_token_ids=np.array([1, 2]), stop_token_sequences=[[3, 4]]
    )
    plain = ExtendSpec(max_tokens=4, ban_token_ids=(1, 2), stop_token_sequences=((3, 4),))
    assert spec == plain and hash(spec) == hash(plain)


def test_settings_of_wrong_types_name_field_and_value():
    for build, message in (
        (lambda: EngineSettings(share_prefixes="False"), "share_prefixes='False': .*True or False"),
        (lambda: EngineSettings(num_kv_slots=float("nan")), "num_kv_slots=nan: .*an integer"),
        (lambda: EngineSettings(max_tokens_per_step=64.5), "max_tokens_per_step=64.5: .*an int"),
        (lambda: FlatSettings(n=1.5), "^rollout.n=1.5: it must be an integer"),
        (lambda: FlatSettings(stop_strings="ab"), "stop_strings='ab': .*list of strings"),
        (lambda: TreePOSettings(max_depth=4.5), "max_depth=4.5: it must be an integer"),
        (lambda: TreePOSettings(answer_token_ids=[[1.5]]), "answer_token_ids=.*: it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_devices_that_are_not_there_are_named():
    model = tiny_model("gpt2", torch.float64)
    with pytest.raises(ValueError, match="device='nope' is no device"):
        Engine(model, EngineSettings(device="nope"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda': this torch sees no GPU"):
            Engine(model, EngineSettings(device="cuda"))
    with pytest.raises(ValueError, match="device='meta' does not fit a model on cpu"):
        Engine(model, EngineSettings(device="meta"))


@pytest.mark.parametrize("key", ["x", None, 1.5, -1, 2**64, True])
def test_a_path_key_must_be_an_unsigned_word(key):
    engine = make_engine()
    node = engine.prefill(PROMPT)
    for _ in range(13):  # more than the engine has rows
        with pytest.raises(ValueError, match="path_key=.* integer in"):
            list(engine.extend([(node, GREEDY, key)]))
    engine.free(node)
    assert_sound(engine)


@pytest.mark.parametrize("number", ["x", None, 1.5, -1, 8, 2**31, True])
def test_forks_and_offsets_are_integers_in_range(number):
    engine = make_engine()
    node = engine.prefill(PROMPT)
    with pytest.raises(ValueError, match="split offset=.*: it must be an integer in 1..7"):
        engine.split(node, number)
    if number != 8:
        with pytest.raises(ValueError, match="fork n=.*: it must be an integer >= 0"):
            engine.fork(node, number)
    engine.free(node)
    assert_sound(engine)


def test_numpys_integers_are_as_good_as_pythons():
    engine = make_engine()
    state = stored_state(engine.model)
    engine.load_weights(np.int64(3), manifest_of(state), state)
    assert type(engine.policy_version) is int
    node = engine.prefill(PROMPT)
    upper = engine.split(node, np.int64(2))
    assert upper.path_token_ids().tolist() == PROMPT[:2]
    for handle in (node, upper, *engine.fork(node, np.int64(2))):
        engine.free(handle)
    assert_sound(engine)


@pytest.mark.parametrize("version", ["x", None, 1.5, 2**31, 2, True])
def test_versions_are_integers_that_never_fall(version):
    engine = make_engine()
    state = stored_state(engine.model)
    engine.load_weights(3, manifest_of(state), state)
    with pytest.raises(ValueError, match="weights version=.* not older than"):
        engine.load_weights(version, manifest_of(state), state)
    assert engine.policy_version == 3
    engine.load_weights(3, manifest_of(state), state)  # again: a publication may be repeated
    assert_sound(engine)


def test_no_work_is_done_while_parts_of_new_weights_arrive():
    engine = make_engine()
    state = stored_state(engine.model)

    def parts():
        with pytest.raises(ValueError, match="a weight load is under way"):
            engine.score_path(PROMPT)
        raise RuntimeError("the line is dead")
        yield

    with pytest.raises(RuntimeError, match="the line is dead"):
        engine.load_weights(1, manifest_of(state), parts())
    assert_sound(engine)  # nothing had been copied


# Accounts.


def test_drafts_and_scores_stay_out_of_the_sharing_ratio_and_open_drafts_are_live():
    engine = make_engine()
    before = engine.metrics()
    engine.score_path(PROMPT * 8)
    node = engine.prefill(PROMPT)
    draft = engine.forward(node, DraftTree.chain([1] * 100))
    taken = engine.metrics() - before
    assert taken.other_query_tokens == taken.query_tokens == 55 + 7 + 100
    assert taken.wall_seconds > 0 and taken.shared_token_ratio == 0
    assert engine.gauges().slots_live == 107 and engine.gauges().slots_cached == 0
    engine.free(engine.commit(draft))
    engine.free(node)
    assert_sound(engine)


def test_no_forward_of_a_draft_or_a_score_exceeds_the_budget(monkeypatch):
    engine = make_engine(max_tokens_per_step=16)
    rows: list[int] = []
    run = engine.runner.forward

    def counted(token_ids, *others):
        rows.append(len(token_ids))
        return run(token_ids, *others)

    monkeypatch.setattr(engine.runner, "forward", counted)
    node = engine.prefill(PROMPT * 7)
    parents = np.array([-1, 0, 0, 2, 2, 4, -1, 6, *range(7, 37)])
    tokens = np.arange(len(parents)) % 31
    draft = engine.forward(node, DraftTree(parents=parents, token_ids=tokens))
    engine.score_path(PROMPT * 40)
    assert max(rows) == 16
    whole = make_engine()
    expected = whole.forward(
        whole.prefill(PROMPT * 7), DraftTree(parents=parents, token_ids=tokens)
    )
    assert torch.allclose(draft.logits, expected.logits, atol=1e-9, rtol=0)


def test_matchers_of_stops_that_are_no_longer_used_are_forgotten():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    for number in range(300):
        spec = ExtendSpec(max_tokens=1, stop_token_sequences=((number % 31, number // 31),))
        engine.cancel(engine.submit(node, spec, 1))
    assert len(engine._stops._kept) == 256
    engine.free(node)
    assert_sound(engine)


def test_a_bound_method_is_one_scorer():
    class Mean:
        calls = 0

        def score(self, paths):
            self.calls += 1
            return [float(np.mean(path)) for path in paths]

    engine, mean = make_engine(), Mean()
    nodes = [engine.prefill(PROMPT[: n + 1]) for n in range(3)]
    assert engine.score([(node, mean.score) for node in nodes]) == [3.0, 4.0, 5.0]
    assert mean.calls == 1
