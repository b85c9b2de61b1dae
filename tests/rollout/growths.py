"""Trees grown in pieces: what is put aside goes through a file to any engine, until all end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.engine import Engine
from rollout.growth import Growth, GrowthLimits, dump_growths, load_growths
from rollout.scheduler import grow_all
from rollout.tree import Tree


def random_limits(rng: np.random.Generator) -> GrowthLimits:
    """Pieces of a few tokens, calls that end after a tree or two, or both."""
    kind = rng.integers(3)
    return GrowthLimits(
        segment_length=int(rng.integers(1, 7)) if kind != 1 else 0,
        stop_when_finished=1 if kind != 0 else 0,
    )


def grow_in_pieces(
    engines: Sequence[Engine], strategy, work: Sequence, seed: int
) -> tuple[list[Tree], int]:
    """(trees in the order of ``work``, number of calls). Each call has random limits, a random
    order of service, a random part of the unfinished trees and one of the engines.
    """
    rng = np.random.default_rng(seed)
    items, num_calls = list(work), 0
    while unfinished := [i for i, item in enumerate(items) if not isinstance(item, Tree)]:
        num_calls += 1
        assert num_calls < 5000, "no end"
        engine = engines[rng.integers(len(engines))]
        some = rng.permutation(unfinished)[: rng.integers(1, len(unfinished) + 1)].tolist()
        given = [items[i] for i in some]
        expected = rng.random(len(some)).tolist() if rng.integers(2) else None
        order_seed = int(rng.integers(1 << 30)) if rng.integers(2) else None
        grown = grow_all(
            engine, strategy, given, random_limits(rng), expected, order_seed=order_seed
        )
        assert engine.is_idle and engine.tree.num_protected == 0
        engine.check_integrity()
        for i, tree in zip(some, grown, strict=True):
            items[i] = load_growths(dump_growths([tree]))[0] if isinstance(tree, Growth) else tree
    return items, num_calls


def assert_same(trees: Sequence[Tree], others: Sequence[Tree]) -> None:
    """The same tokens, and log-probs up to the order of sums in float64."""
    for tree, other in zip(trees, others, strict=True):
        assert tree.problem_id == other.problem_id
        assert tree.same_tokens(other) and tree.counters == other.counters
        for a, b in zip(tree.segments, other.segments, strict=True):
            assert np.abs(a.logprobs - b.logprobs).max(initial=0) < 1e-9
            assert np.abs(a.sampling_logprobs - b.sampling_logprobs).max(initial=0) < 1e-9
            assert np.array_equal(a.policy_versions, b.policy_versions)
