"""Fuzz of the service: whatever the order of requests, the memory, the chunks, the number of
workers or the sharing, every prompt gets the same tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from rollout.engine import Engine
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from treepo.base.keys import root_key

STOP = 4
NUM_PROMPTS = 3
SETTINGS = {
    "flat": FlatSettings(n=4, max_response_length=90, temperature=1.3),
    "treepo": TreePOSettings(
        n=5,
        segment_length=70,  # longer than what a segment reserves at a time
        max_depth=2,
        max_response_length=90,
        initial_divergence_min=2,
        initial_divergence_max=3,
        stop_token_ids=[STOP],
        temperature=1.3,
        top_p=0.95,
    ),
}
PREEMPTING = 0.3  # share of the runs whose pool is so small that requests are put back


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One way to serve the prompts."""

    order_seed: int | None
    num_workers: int
    engine: EngineSettings

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Service:
        running = int(rng.choice([1, 2, 3, 7, 30]))
        tight = rng.random() < PREEMPTING
        return cls(
            order_seed=int(rng.integers(1 << 30)) if rng.random() < 0.8 else None,
            num_workers=int(rng.integers(1, 3)),
            engine=EngineSettings(
                num_kv_slots=int(rng.integers(125, 180) if tight else rng.integers(400, 3000)),
                max_running_requests=running,
                max_tokens_per_step=running + int(rng.choice([1, 5, 40, 4096])),
                share_prefixes=bool(rng.random() < 0.8),
                attention=str(rng.choice(["cpu", "cpu", "reference"])),
            ),
        )


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            problem_id=f"p{i}",
            token_ids=np.concatenate(
                [[7, 8, 9], rng.integers(0, VOCABULARY, int(rng.integers(1, 30)))]
            ).astype(np.int32),
            root_key=root_key(0, i),
        )
        for i in range(NUM_PROMPTS)
    ]


def serve(name: str, service: Service) -> tuple[list, int]:
    """(trees in the prompts' order, requests put back)."""
    strategy = STRATEGIES.get(name)(SETTINGS[name])
    order = np.random.default_rng(service.order_seed).permutation(NUM_PROMPTS)
    shares = [order[rank :: service.num_workers] for rank in range(service.num_workers)]
    trees, preempted = {}, 0
    for rank, share in enumerate(shares):
        engine = Engine(tiny_model("gpt2", torch.float64), service.engine)
        seed = None if service.order_seed is None else service.order_seed + rank
        for tree in generate_all(engine, strategy, [prompts()[i] for i in share], order_seed=seed):
            trees[tree.problem_id] = tree
        engine.check_integrity()
        assert engine.tree.num_protected == 0
        preempted += engine.metrics().preempted
    return [trees[f"p{i}"] for i in range(NUM_PROMPTS)], preempted


@cache
def expected(name: str) -> tuple:
    plain = Service(order_seed=None, num_workers=1, engine=EngineSettings(num_kv_slots=4096))
    return tuple(serve(name, plain)[0])


def check(name: str, seed: int) -> int:
    service = Service.draw(np.random.default_rng(seed))
    trees, preempted = serve(name, service)
    for one, other in zip(expected(name), trees, strict=True):
        assert one.same_tokens(other), f"{one.problem_id} differs under {service}"
    return preempted


def test_a_few_random_services_give_the_same_trees():
    assert sum(check("flat", seed) for seed in range(4)) > 0, "memory was never short"
    for seed in range(3):
        check("treepo", seed)


@pytest.mark.long
def test_many_random_services_give_the_same_trees():
    assert sum(check("flat", seed) for seed in range(100, 150)) > 0
    for seed in range(100, 160):
        check("treepo", seed)
