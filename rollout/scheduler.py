"""Many prompts' strategies as one continuous batch on one engine.

There is no barrier between prompts: a tree is handed on as soon as it is finished, and the next
prompt starts when the running ones leave room, for requests and for keys and values. Where memory
is short all the same, the youngest trees wait, so that none is computed again and again. Which
request is served first changes nothing in the trees: draws are named by path keys and positions,
and strategies do not look at the order of results.

Trees may be served in pieces (``grow``): a call ends by its limits, what is unfinished comes back
as a ``Growth`` and goes on in a later call. What a request drew is its path then; stops and
penalties read it as if it had never been cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rollout.engine import Engine
from rollout.growth import Growth, GrowthLimits
from rollout.length_statistics import longest_first
from rollout.service import Service, Work
from rollout.strategies.base import Prompt, Strategy
from rollout.tree import Tree


def generate(
    engine: Engine,
    strategy: Strategy,
    prompts: Sequence[Prompt],
    *,
    order_seed: int | None = None,
) -> Iterator[Tree]:
    """Grow one tree a prompt; yields each as it is finished.

    Args:
        order_seed: serve requests and deliver results in a random order drawn from this seed, to
            show that it changes nothing; None serves them as they come.

    Raises:
        ValueError: a path cannot fit the engine's pool or the model's positions.
    """
    for _, tree in grow(engine, strategy, prompts, GrowthLimits(), order_seed=order_seed):
        assert isinstance(tree, Tree)
        yield tree


def generate_all(
    engine: Engine,
    strategy: Strategy,
    prompts: Sequence[Prompt],
    *,
    order_seed: int | None = None,
) -> list[Tree]:
    """As ``generate``; all trees, in the order of ``prompts``."""
    grown = grow_all(engine, strategy, prompts, GrowthLimits(), order_seed=order_seed)
    return [tree for tree in grown if isinstance(tree, Tree)]


def grow(
    engine: Engine,
    strategy: Strategy,
    work: Sequence[Work],
    limits: GrowthLimits,
    expected_tokens: Sequence[float] | None = None,
    *,
    order_seed: int | None = None,
) -> Iterator[tuple[int, Tree | Growth]]:
    """Grow trees, new and unfinished ones, until they are finished or the limits are reached;
    yields (index in ``work``, tree) of each as it is finished or put aside.

    Args:
        expected_tokens: how many tokens each tree is expected to need yet: those with the most a
            path that they wait for begin and are served first, which shortens the end of a call,
            where few are left (Seer, arXiv 2511.14617). None: in the order of ``work``.
        order_seed: see ``generate``.

    Raises:
        ValueError: a path cannot fit the engine's pool or the model's positions, an unfinished tree
            is another strategy's, or there is not one expectation for each tree.
    """
    ranks = _ranks(strategy, work, expected_tokens)
    for index, item in enumerate(work):
        _check_state(strategy, index, item)
    service = Service(
        engine,
        strategy,
        limits,
        ranks,
        longest_first=expected_tokens is not None,
        order_seed=order_seed,
    )
    try:
        yield from service.trees(work)
    finally:
        service.release()


def grow_all(
    engine: Engine,
    strategy: Strategy,
    work: Sequence[Work],
    limits: GrowthLimits,
    expected_tokens: Sequence[float] | None = None,
    *,
    order_seed: int | None = None,
) -> list[Tree | Growth]:
    """As ``grow``; all in the order of ``work``."""
    grown = dict(grow(engine, strategy, work, limits, expected_tokens, order_seed=order_seed))
    return [grown[index] for index in range(len(work))]


def _ranks(
    strategy: Strategy, work: Sequence[Work], expected_tokens: Sequence[float] | None
) -> list[int]:
    """Each tree's place in the order of service. Slots are held by paths: one long path is to begin
    before eight short ones that draw more together.
    """
    if expected_tokens is None:
        return list(range(len(work)))
    if len(expected_tokens) != len(work) or not all(map(math.isfinite, expected_tokens)):
        raise ValueError(
            f"expected_tokens={list(expected_tokens)!r} for {len(work)} trees: it must have one "
            "finite number for each"
        )
    ranks = [0] * len(work)
    a_path = [
        expected / max(1, _num_paths(strategy, item))
        for item, expected in zip(work, expected_tokens, strict=True)
    ]
    for rank, index in enumerate(longest_first(a_path)):
        ranks[index] = rank
    return ranks


def _num_paths(strategy: Strategy, item: Work) -> int:
    """That a tree waits for when it begins or goes on."""
    return len(item.partials if isinstance(item, Growth) else strategy.start(item)[1])


def _check_state(strategy: Strategy, index: int, item: Work) -> None:
    if isinstance(item, Growth):
        root = item.state.segments[0]
        prompt = Prompt(
            problem_id=item.problem_id, token_ids=root.token_ids, root_key=root.path_key
        )
        own, found = type(strategy.start(prompt)[0]), type(item.state)
        if own is not found:
            raise ValueError(
                f"work[{index}] is an unfinished tree with a {found.__name__}, but strategy "
                f"{type(strategy).__name__} goes on from a {own.__name__}: go on with the strategy "
                "that began it"
            )
