"""How far apart log-probs must be for the branching temperature to change a tree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from rollout.engine import Engine
from rollout.scheduler import generate
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.branching import ActivePath, low_logprob
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO
from rollout.tree import Tree
from treepo.base.keys import root_key

# Without stops every path goes on to the end: 16 leaves at 2, 4, 8 and 16 paths a level.
SHAPE = dict(n=16, segment_length=4, max_depth=4, max_response_length=16, repetition_count=0)
LOW = dict(branching="low_logprob")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("gpt2", torch.float64), EngineSettings(num_kv_slots=2048))


def grow(engine: Engine, divergence: int, **settings) -> list[Tree]:
    chosen = TreePOSettings(
        initial_divergence_min=divergence, initial_divergence_max=divergence, **SHAPE, **settings
    )
    prompts = [
        Prompt(
            problem_id=f"p{i}",
            token_ids=np.array([7, 8, i % VOCABULARY], np.int32),
            root_key=root_key(5, i),
        )
        for i in range(3)
    ]
    trees = sorted(generate(engine, TreePO(chosen), prompts), key=lambda tree: tree.problem_id)
    assert [tree.num_leaves for tree in trees] == [16, 16, 16]
    return trees


def same(trees: list[Tree], others: list[Tree]) -> list[bool]:
    return [a.same_tokens(b) for a, b in zip(trees, others, strict=True)]


def test_a_low_temperature_and_divergence_2_give_other_trees_than_the_even_split(engine):
    even = grow(engine, 2, branching="even")
    for branching in ("low_logprob", "high_logprob"):
        cold = grow(engine, 2, branching=branching, branching_temperature=[0.05])
        assert not any(same(even, cold)), branching


def test_divergence_8_of_16_leaves_every_path_two_copies_at_the_paper_s_temperature(engine):
    even = grow(engine, 8, branching="even")
    assert all(same(even, grow(engine, 8, **LOW)))
    assert not all(same(even, grow(engine, 8, **LOW, branching_temperature=[0.05])))


@pytest.mark.parametrize("temperature", [0.05, 2.0])
def test_two_paths_split_unevenly_from_a_difference_of_ln_3_temperatures(temperature):
    """Two copies more for two paths: weights w and 1 - w give both to one from w = 3/4 on, that is
    from exp(difference / T) = 3 on.
    """
    border = temperature * math.log(3)
    settings = TreePOSettings(**SHAPE, **LOW, branching_temperature=[temperature])

    def copies(difference: float) -> list[int]:
        paths = [
            ActivePath(path_key=k, level=1, logprobs=values, segment_logprobs=values)
            for k, values in enumerate(np.array([[-1.0], [-1.0 - difference]], np.float32))
        ]
        return low_logprob(paths, 4, settings)

    assert copies(0.9 * border) == [2, 2]
    assert copies(1.1 * border) == [1, 3]
