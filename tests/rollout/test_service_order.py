"""Fuzz of the service: whatever the order of requests, the memory, the chunks, the number of
workers or the sharing, every prompt gets the same tree: in float64 always, in float32 up to draws
whose uniform lies on the border of two tokens. What holds below float32 is in
``test_service_rounding.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, plain_logprobs, tiny_model
from tiny_work import numbered

from rollout.engine import Engine
from rollout.scheduler import generate_all
from rollout.settings import EngineSettings
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Tree
from treepo.base.keys import Purpose, uniform

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
# Cumulative probabilities of a float32 model move by about 1e-6 with the company of a row.
BORDER = 1e-4


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
    tails = (rng.integers(0, VOCABULARY, int(rng.integers(1, 30))) for _ in range(NUM_PROMPTS))
    return numbered(([7, 8, 9, *tail] for tail in tails), seed=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A tiny model: its family (see ``tiny_models.py``) and dtype."""

    family: str = "gpt2"
    dtype: torch.dtype = torch.float64

    def make(self):
        return tiny_model(self.family, self.dtype)


def serve(name: str, service: Service, model: Model) -> tuple[list[Tree], int]:
    """(trees in the prompts' order, requests put back)."""
    strategy = STRATEGIES.get(name)(SETTINGS[name])
    order = np.random.default_rng(service.order_seed).permutation(NUM_PROMPTS)
    shares = [order[rank :: service.num_workers] for rank in range(service.num_workers)]
    trees, preempted = {}, 0
    for rank, share in enumerate(shares):
        engine = Engine(model.make(), service.engine)
        seed = None if service.order_seed is None else service.order_seed + rank
        for tree in generate_all(engine, strategy, [prompts()[i] for i in share], order_seed=seed):
            trees[tree.problem_id] = tree
        engine.check_integrity()
        assert engine.tree.num_protected == 0
        preempted += engine.metrics().preempted
    return [trees[f"p{i}"] for i in range(NUM_PROMPTS)], preempted


@cache
def expected(name: str, model: Model) -> tuple[Tree, ...]:
    plain = Service(order_seed=None, num_workers=1, engine=EngineSettings(num_kv_slots=4096))
    return tuple(serve(name, plain, model)[0])


def check(name: str, seed: int, model: Model | None = None) -> int:
    """How many requests were put back."""
    model = model or Model()
    service = Service.draw(np.random.default_rng(seed))
    trees, preempted = serve(name, service, model)
    for one, other in zip(expected(name, model), trees, strict=True):
        assert one.same_tokens(other), f"{one.problem_id} differs under {service}"
    return preempted


def border_distances(model: Model, one: Tree, other: Tree) -> list[float]:
    """Of two flat trees of a prompt: for each response that differs, how far its uniform was from
    a border of the cumulative distribution at the first token that does, by a fresh forward.
    """
    prompt = one.segments[0].token_ids
    theirs = {segment.path_key: segment.token_ids for segment in other.segments[1:]}
    found = []
    for segment in one.segments[1:]:
        ids, others = segment.token_ids, theirs[segment.path_key]
        if np.array_equal(ids, others):
            continue
        count = next(i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
        path = np.concatenate([prompt, ids[:count]])
        borders = np.exp(plain_logprobs(model.make(), path, one.temperature)[-1]).cumsum()
        drawn_by = uniform(segment.path_key, len(path), Purpose.TOKEN)
        found.append(float(np.abs(borders - drawn_by).min()))
    return found


def test_a_few_random_services_give_the_same_trees():
    assert sum(check("flat", seed) for seed in range(4)) > 0, "memory was never short"
    for seed in range(3):
        check("treepo", seed)


def test_a_few_random_services_give_the_same_trees_where_layers_have_windows():
    mistral = Model(family="mistral")
    assert check("flat", 2, mistral) > 0, "memory was never short"
    check("treepo", 1, mistral)


@pytest.mark.parametrize(
    ("family", "seeds"),
    [
        *((family, range(2)) for family in ("gpt2", "mistral")),
        *(pytest.param(f, range(20), marks=pytest.mark.long) for f in ("gpt2", "mistral")),
    ],
)
def test_in_float32_only_draws_on_the_border_of_two_tokens_depend_on_the_service(family, seeds):
    model = Model(family=family, dtype=torch.float32)
    distances = []
    for seed in seeds:
        trees, _ = serve("flat", Service.draw(np.random.default_rng(seed)), model)
        for one, other in zip(expected("flat", model), trees, strict=True):
            distances += border_distances(model, one, other)
    assert all(distance < BORDER for distance in distances), distances
    assert len(distances) <= len(seeds), f"{len(distances)} of {12 * len(seeds)} responses differ"


def test_a_response_that_differs_off_the_border_is_noticed():
    model = Model()
    (one, *_) = expected("flat", model)
    segment = one.segments[1]
    changed = segment.token_ids.copy()
    changed[5] = (changed[5] + 1) % VOCABULARY
    segments = (one.segments[0], replace(segment, token_ids=changed), *one.segments[2:])
    (distance,) = border_distances(model, one, replace(one, segments=segments))
    assert distance > BORDER


@pytest.mark.long
def test_many_random_services_give_the_same_trees():
    assert sum(check("flat", seed) for seed in range(100, 150)) > 0
    for seed in range(100, 160):
        check("treepo", seed)
    for seed in range(200, 220):
        check("flat", seed, Model(family="mistral"))
        check("treepo", seed, Model(family="mistral"))
