"""Trees grown in pieces: with constant weights any cutting gives the trees of one piece."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from growths import assert_same, grow_in_pieces
from tiny_models import VOCABULARY, tiny_model
from tiny_tokenizers import of_pieces
from tiny_work import numbered

from rollout.engine import Engine
from rollout.growth import Growth, GrowthLimits
from rollout.scheduler import generate_all, grow
from rollout.settings import EngineSettings
from rollout.strategies.arena import heads
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.rule_settings import FALLBACK_CUTS, FALLBACKS
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import ANSWER, EOS, REPETITION, TRUNCATED, Tree

PIECES = ["a", "b", "c", "ab", "ba", "bc", "Ġ", "Ġa", "Ã", "©", "<", ">", "</", "/>", "cab", "d"]
PIECES += ["\\boxed{", "\\bo", "xed{", "{", "}", "1}", "\\}", "4", "}}", "{1"]
PIECES += [chr(ord("e") + i) for i in range(VOCABULARY - len(PIECES))]
STOPS = dict(
    stop_token_ids=[4],
    stop_token_sequences=[[7, 2], [9, 9, 9], [20, 3]],
    stop_strings=["</a", "é", "c a", "bca", "ef", "ab4", "4b", "d}"],
)
ROUNDS = dict(
    n=9, segment_length=4, max_depth=4, max_response_length=16, initial_divergence_max=3,
    stop_token_ids=list(range(0, VOCABULARY, 3)), temperature=1.2,
)  # fmt: skip
FEW_STOPS = dict(n=24, max_depth=3, max_response_length=12, stop_token_ids=[4, 9, 14, 19])
BLOCKS = dict.fromkeys(["block_softmax", "block_softmax_inverse"], dict(fallback_block_length=2))

SETTINGS = {
    "flat": FlatSettings(n=4, max_response_length=24, stop_token_ids=[4]),
    "flat, stops, penalty": FlatSettings(
        n=6, max_response_length=24, repetition_penalty=1.4, ban_token_ids=[1, 30],
        temperature=1.3, top_k=20, top_p=0.9, **STOPS,
    ),
    "treepo, stops, penalty": TreePOSettings(
        n=6, segment_length=5, max_depth=5, max_response_length=24, repetition_penalty=1.3,
        temperature=1.3, min_p=0.02, **STOPS,
    ),
    "treepo, entropy": TreePOSettings(
        n=9, segment_length=5, max_depth=4, max_response_length=20, branching="entropy",
        branching_temperature=[0.05], stop_token_ids=[4, 9],
    ),
    "treepo, repetition": TreePOSettings(
        n=6, segment_length=5, max_depth=4, max_response_length=20, temperature=0.4,
        repetition_ngram=2, repetition_count=2,
    ),
    **{
        f"treepo, fallback {name}": TreePOSettings(**ROUNDS, fallback=name)
        for name in (*FALLBACKS, "none")
    },
    **{
        f"treepo, cut {name}": TreePOSettings(
            **{**ROUNDS, **FEW_STOPS}, fallback="finished_first", fallback_cut=name,
            **BLOCKS.get(name, {}),
        )
        for name in FALLBACK_CUTS
    },
}  # fmt: skip


def prompts(n=3) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return numbered(([7, 8, *rng.integers(0, VOCABULARY, 1 + i)] for i in range(n)), seed=5)


def make_engine(**settings) -> Engine:
    settings = {"num_kv_slots": 2048, **settings}
    model = tiny_model("gpt2", torch.float64)
    return Engine(model, EngineSettings(**settings), tokenizer=of_pieces(PIECES))


@cache
def engines() -> tuple[Engine, ...]:
    """Two of one kind, one short of memory, one that shares nothing."""
    tight = make_engine(num_kv_slots=90, max_running_requests=4, max_tokens_per_step=9)
    return make_engine(), make_engine(), tight, make_engine(share_prefixes=False)


def strategy_of(settings):
    return STRATEGIES.get("flat" if isinstance(settings, FlatSettings) else "treepo")(settings)


@cache
def uncut(name: str) -> tuple[Tree, ...]:
    return tuple(generate_all(engines()[0], strategy_of(SETTINGS[name]), prompts()))


@pytest.mark.parametrize("name", SETTINGS)
def test_any_cutting_gives_the_trees_of_one_piece(name):
    calls = 0
    for seed in range(2):
        strategy = strategy_of(SETTINGS[name])
        trees, num_calls = grow_in_pieces(engines(), strategy, prompts(), seed)
        assert_same(trees, uncut(name))
        calls += num_calls
    assert calls >= 8


def test_the_settings_above_end_and_restart_responses_in_every_way():
    """Otherwise the test above would test little."""
    ends = {s.finish_reason for tree in uncut("flat, stops, penalty") for s in tree.segments[1:]}
    assert ends == {EOS, TRUNCATED}
    for name in ("finished_first", "random", "longer_first"):
        assert sum(t.counters.fallbacks for t in uncut(f"treepo, fallback {name}")) >= 3
    assert sum(len(heads(t.segments)) for t in uncut("treepo, cut misaligned")) >= 3
    repetitive = uncut("treepo, repetition")
    assert any(s.finish_reason == REPETITION for tree in repetitive for s in tree.segments)


def test_requests_that_were_put_back_for_lack_of_memory_are_cut_with_what_they_drew():
    strategy = strategy_of(FlatSettings(n=4, max_response_length=100, temperature=1.3))
    engine = make_engine(num_kv_slots=150, max_running_requests=4)
    expected = generate_all(engines()[0], strategy, prompts())
    items, kept = prompts(), 0
    while not all(isinstance(item, Tree) for item in items):
        work = [item for item in items if not isinstance(item, Tree)]
        limits = GrowthLimits(segment_length=75, stop_when_finished=1)
        for index, tree in grow(engine, strategy, work, limits, order_seed=len(work)):
            items[items.index(work[index])] = tree
            if isinstance(tree, Growth):
                kept += sum(partial.num_tokens for partial in tree.partials)
        engine.check_integrity()
    assert engine.metrics().preempted > 0 and kept > 0
    assert_same(items, expected)


@pytest.mark.parametrize("finish", ["boxed_and_eos", "boxed_as_eos"])
def test_boxed_answers_are_found_across_a_cut(finish, tmp_path):
    of_pieces(PIECES).save_pretrained(tmp_path)
    settings = TreePOSettings(
        n=8, segment_length=6, max_depth=4, max_response_length=24, finish=finish,
        stop_token_ids=[4, 9], answer_tokenizer=str(tmp_path), temperature=1.5,
    )  # fmt: skip
    strategy = strategy_of(settings)
    expected = generate_all(engines()[0], strategy, prompts(8))
    assert any(s.finish_reason == ANSWER for tree in expected for s in tree.segments)
    trees, _ = grow_in_pieces(engines(), strategy, prompts(8), 1)
    assert_same(trees, expected)
