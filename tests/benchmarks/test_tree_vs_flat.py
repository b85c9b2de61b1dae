"""The counts behind the tree-against-flat benchmark: query tokens and KV slots carry no noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tree_vs_flat
from shapes import qwen3_7m
from tree_vs_flat import FLAT, TREE, Workload

from rollout import Engine, EngineSettings, Segment, Tree


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(qwen3_7m(), EngineSettings(num_kv_slots=16384))


@pytest.mark.parametrize(("depth", "ratio"), [(4, 2.13), (7, 1.44), (14, 1.18)])
def test_long_segments_give_the_token_ratios_of_the_paper_s_shape(depth, ratio):
    work = Workload(depth=depth, segment_length=100_000, num_prompts=3)
    expected = work.expected_query_tokens()
    assert round(expected[FLAT] / expected[TREE], 2) == ratio


def test_the_expected_count_is_the_one_worked_out_by_hand():
    # 2 + 4 + 8 + 16 + 16 = 46 segments of 10 tokens, 7 prompt tokens, 16 last tokens not forwarded
    work = Workload(depth=5, segment_length=10, num_prompts=2, prompt_length=7)
    assert work.expected_query_tokens() == {
        TREE: 2 * (7 + 460 - 16),
        FLAT: 2 * (7 + 800 - 16),
    }


@pytest.mark.parametrize("depth", [4, 6])
def test_the_engine_forwards_exactly_the_expected_tokens(engine, depth):
    work = Workload(depth=depth, segment_length=3, num_prompts=2)
    _, found = tree_vs_flat.measure(engine, work, 1, itertools.count(100 * depth))
    counted = {name: sampled.costs.query_tokens for name, sampled in found.items()}
    assert counted == work.expected_query_tokens()
    assert {sampled.response_tokens for sampled in found.values()} == {2 * 16 * 3 * depth}


def test_kv_slots_stay_within_five_percent_of_the_unique_tokens(engine):
    work = Workload(depth=4, segment_length=12, num_prompts=1)
    found = tree_vs_flat.kv_over_unique(engine, work, itertools.count(7000))
    for strategy in (TREE, FLAT):
        assert 1.0 <= found[strategy]["segment_unique"] <= 1.05
        assert found[strategy]["trie_unique"] >= found[strategy]["segment_unique"]


def test_early_ends_are_filled_up_by_the_fallback(engine):
    work = Workload(depth=4, segment_length=4, num_prompts=1, num_stops=2048)
    _, found = tree_vs_flat.measure(engine, work, 1, itertools.count(8000))
    assert found[TREE].num_leaves == found[FLAT].num_leaves == 16
    assert found[FLAT].response_tokens < 16 * work.length


def test_distinct_prefixes_are_those_of_a_trie():
    def segment(parent: int, *tokens: int) -> Segment:
        ids = np.array(tokens, np.int32)
        zeros = np.zeros(len(ids), np.float32)
        return Segment(
            parent=parent,
            level=0,
            path_key=0,
            token_ids=ids,
            logprobs=zeros,
            sampling_logprobs=zeros,
            sampled=True,
            policy_versions=np.zeros(len(ids), np.int32),
        )

    # paths 5 6 7 8, 5 6 7 9 and 5 6 4: without their last tokens 5, 5 6, 5 6 7
    segments = (segment(-1, 5), segment(0, 6, 7, 8), segment(0, 6, 7, 9), segment(0, 6, 4))
    tree = Tree(problem_id="", segments=segments, leaves=(1, 2, 3), temperature=1.0)
    assert tree_vs_flat.num_distinct_prefixes(tree) == 3
