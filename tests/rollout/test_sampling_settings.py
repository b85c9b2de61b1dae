"""Stops, bans, penalties and reports through engine and strategies, against plain forwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, plain_logprobs, tiny_model
from tiny_tokenizers import of_pieces
from tiny_work import numbered
from transformers import RepetitionPenaltyLogitsProcessor

from rollout.engine import Engine
from rollout.extend import LENGTH, STOP, ExtendSpec
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import EOS

# "Ã©" are the two bytes of an e with acute; the pieces overlap in many ways.
PIECES = ["a", "b", "c", "ab", "ba", "bc", "Ġ", "Ġa", "Ã", "©", "<", ">", "</", "/>", "cab", "d"]
PIECES += [chr(ord("e") + i) for i in range(VOCABULARY - len(PIECES))]
TOKENIZER = of_pieces(PIECES)
PROMPT = [3, 5, 7, 9, 11, 13, 2]

STOPS = dict(
    stop_token_ids=[4],
    stop_token_sequences=[[7, 2], [9, 9, 9], [20, 3]],
    stop_strings=["</a", "é", "c a", "bca", *("ef fg gh hi ij jk kl lm mn no ed db".split())],
)
FLAT = FlatSettings(n=8, max_response_length=24, **STOPS)
TREE = TreePOSettings(
    n=8,
    segment_length=2,
    max_depth=12,
    max_response_length=24,
    repetition_count=0,
    **STOPS,
)
CHANGED = dict(repetition_penalty=1.4, ban_token_ids=[1, 30], temperature=1.3, top_k=20)


def make_engine(**settings):
    settings.setdefault("num_kv_slots", 2048)
    model = tiny_model("gpt2", torch.float64)
    return Engine(model, EngineSettings(**settings), tokenizer=TOKENIZER)


def prompts(n=6):
    rng = np.random.default_rng(1)
    return numbered((rng.integers(0, VOCABULARY, 5) for _ in range(n)), seed=3)


def grow(settings, order_seed=None, **engine_settings):
    name = "flat" if isinstance(settings, FlatSettings) else "treepo"
    engine = make_engine(**engine_settings)
    trees = generate_all(engine, STRATEGIES.get(name)(settings), prompts(), order_seed=order_seed)
    engine.check_integrity()
    return trees


def has_ended(response, settings):
    """Whether a response holds a stop, found the plain way."""
    ids = response.tolist()
    if set(ids) & set(settings.stop_token_ids):
        return True
    for sequence in settings.stop_token_sequences:
        n = len(sequence)
        if any(ids[i : i + n] == sequence for i in range(len(ids))):
            return True
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    return any(string in text for string in settings.stop_strings)


@pytest.mark.parametrize(
    "settings", [FLAT, TREE, replace(FLAT, **CHANGED), replace(TREE, **CHANGED)]
)
def test_every_response_ends_with_its_first_stop_and_with_nothing_else(settings):
    reasons, inside = [], 0
    for tree in grow(settings):
        for leaf in tree.leaves:
            response = tree.path_token_ids(leaf, with_prompt=False)
            ended = tree.segments[leaf].finish_reason == EOS
            assert has_ended(response, settings) == ended
            assert not has_ended(response[:-1], settings)
            reasons.append(ended)
            # ended by what the last segment alone doesn't hold?
            inside += ended and not has_ended(tree.segments[leaf].token_ids, settings)
            assert not set(response.tolist()) & set(settings.ban_token_ids)
    assert any(reasons) and not all(reasons)
    if settings.__class__ is TreePOSettings:
        assert inside > 3, "too few stops crossed a segment's border to test anything"


@pytest.mark.parametrize("settings", [replace(FLAT, **CHANGED), replace(TREE, **CHANGED)])
@pytest.mark.parametrize(
    "change",
    [
        {"order_seed": 1},
        {"share_prefixes": False},
        {"max_running_requests": 3},
        {"num_kv_slots": 96},
    ],
)
def test_trees_with_stops_and_penalties_do_not_depend_on_the_service(settings, change):
    expected = grow(settings)
    found = grow(settings, **change)
    assert all(a.same_tokens(b) for a, b in zip(found, expected, strict=True))


def test_recorded_log_probs_are_those_of_the_processed_logits():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    spec = ExtendSpec(
        max_tokens=12,
        temperature=0.8,
        top_k=9,
        repetition_penalty=1.5,
        ban_token_ids=(3, 8),
        num_top_logprobs=5,
        wants_entropy=True,
    )
    done = list(engine.extend([(node, replace(spec, **_some(i)), 50 + i) for i in range(12)]))
    for completion in done:
        path = completion.node.path_token_ids()
        logits = torch.from_numpy(plain_logprobs(engine.model, path))  # up to a constant a row
        raw = _raw_logits(engine, path)
        for i, token in enumerate(completion.token_ids.tolist()):
            at = len(PROMPT) + i
            plain = torch.log_softmax(logits[at - 1] / 0.8, 0)
            assert abs(float(plain[token]) - completion.logprobs[i]) < 1e-6
            scores = raw[at - 1].clone()
            scores[[3, 8]] = -torch.inf
            processor = RepetitionPenaltyLogitsProcessor(1.5)
            scores = processor(torch.from_numpy(path[None, :at]).long(), scores[None])[0] / 0.8
            kept = scores.topk(9).indices
            assert token in kept
            behaviour = scores[token] - torch.logsumexp(scores[kept], 0)
            assert abs(float(behaviour) - completion.sampling_logprobs[i]) < 1e-6
            if completion.entropy is not None:
                entropy = float(-(plain.exp() * plain).sum())
                assert abs(entropy - completion.entropy[i]) < 1e-6
            if completion.top_logprobs is not None:
                values, tokens = plain.topk(5)
                assert completion.top_token_ids[i].tolist() == tokens.tolist()
                assert np.abs(completion.top_logprobs[i] - values.numpy()).max() < 1e-6
    assert (
        {c.entropy is None for c in done} == {c.top_logprobs is None for c in done} == {True, False}
    )


def _some(i):
    """Reports that some requests of a batch ask for."""
    return dict(num_top_logprobs=5 * (i % 2), wants_entropy=i % 3 == 0)


def _raw_logits(engine, path):
    model = engine.model
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        raw = model(input_ids=torch.from_numpy(path[None]).long(), use_cache=False).logits[0]
    model.set_attn_implementation("tree")
    return raw.double().clone()


def test_a_completion_names_its_stop():
    engine = make_engine()
    node = engine.prefill(PROMPT)
    everything = tuple(range(VOCABULARY))
    for spec, kind in (
        (ExtendSpec(max_tokens=9, stop_token_ids=everything), int),
        (ExtendSpec(max_tokens=9, stop_token_sequences=tuple((i,) for i in everything)), tuple),
        (ExtendSpec(max_tokens=9, stop_strings=tuple("abcdefghij")), str),
        (ExtendSpec(max_tokens=2), type(None)),
        (ExtendSpec(max_tokens=0, wants_entropy=True), type(None)),
    ):
        (completion,) = engine.extend([(node, spec, 7)])
        assert isinstance(completion.stop_reason, kind)
        assert completion.finish_reason == (LENGTH if kind is type(None) else STOP)


def test_a_stop_string_spread_over_three_segments_ends_the_third():
    engine = make_engine()
    ids = [PIECES.index("</"), PIECES.index("a"), PIECES.index("c"), PIECES.index("/>")]
    node = engine.prefill(PROMPT)
    # Bans force each token: what is left is the next of "</ac/>".
    for i, token in enumerate(ids):
        spec = ExtendSpec(
            max_tokens=1,
            ban_token_ids=tuple(t for t in range(VOCABULARY) if t != token),
            stop_strings=("</ac/",),
            num_response_tokens=i,
        )
        (completion,) = engine.extend([(node, spec, 11 + i)])
        assert completion.token_ids.tolist() == [token]
        assert completion.stop_reason == ("</ac/" if i == 3 else None)
        node = completion.node


def test_the_same_tokens_as_a_prompt_begin_no_stop():
    engine = make_engine()
    node = engine.prefill([*PROMPT, 12, 0, 2])  # ... "</", "a", "c"
    for num_response_tokens, ends in ((0, False), (2, False), (3, True), (10, True)):
        spec = ExtendSpec(
            max_tokens=1,
            ban_token_ids=tuple(t for t in range(VOCABULARY) if t != 13),
            stop_strings=("</ac/",),
            num_response_tokens=num_response_tokens,
        )
        (completion,) = engine.extend([(node, spec, 3)])
        assert (completion.finish_reason == STOP) == ends


def test_requests_the_engine_cannot_serve_are_refused_when_they_are_submitted():
    engine = Engine(tiny_model("gpt2", torch.float64), EngineSettings(num_kv_slots=256))
    node = engine.prefill(PROMPT)
    for changes, message in (
        (dict(stop_strings=("a",)), "without one.*tokenizer="),
        (dict(ban_token_ids=(VOCABULARY,)), "ban_token_ids=.*< 31"),
        (dict(num_top_logprobs=VOCABULARY + 1), "num_top_logprobs=32.*<= 31"),
        (dict(num_response_tokens=8), "num_response_tokens=8.*<= 7"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(node, ExtendSpec(max_tokens=3, **changes), 1)
    assert engine.is_idle
    banned = ExtendSpec(max_tokens=3, ban_token_ids=tuple(range(VOCABULARY)))
    with pytest.raises(ValueError, match="bans all 31 tokens"):
        engine.submit(node, banned, 1)
