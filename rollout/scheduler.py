"""Many prompts' strategies as one continuous batch on one engine.

There is no barrier between prompts: a tree is handed on as soon as it is finished, and the next
prompt starts when the running ones leave room, for requests and for keys and values. Where memory
is short all the same, the youngest trees wait, so that none is computed again and again. Which
request is served first changes nothing in the trees: draws are named by path keys and positions,
and strategies do not look at the order of results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.engine import Engine
from rollout.extend import ExtendRequest, ExtendResult
from rollout.kv_pool import MAX_EXTENT
from rollout.metrics import CostLedger
from rollout.requests import Completion
from rollout.store import Node
from rollout.strategies.arena import path
from rollout.strategies.base import Prompt, Strategy
from rollout.tree import Tree
from rollout.tree_room import TreeRoom


@dataclass(eq=False, slots=True)
class _Growing:
    """A tree in the making.

    Attributes:
        handles: engine node of each place that was asked for: (path key of the segment that ends
            there, depth in tokens). Indices shift when a strategy cuts a segment; places stay.
        segments: engine nodes of sampled segments, kept so that what was computed is found again.
        num_tokens: of the tree so far.
        num_expected: slots that its outstanding requests take at first.
    """

    index: int
    state: Any
    handles: dict[tuple[int, int], Node] = field(default_factory=dict)
    segments: list[Node] = field(default_factory=list)
    outstanding: int = 0
    num_tokens: int = 0
    num_expected: int = 0


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
    run = _Run(engine, strategy, order_seed)
    try:
        for _, tree in run.trees(prompts):
            yield tree
    finally:
        run.release()


def generate_all(
    engine: Engine,
    strategy: Strategy,
    prompts: Sequence[Prompt],
    *,
    order_seed: int | None = None,
) -> list[Tree]:
    """As ``generate``; all trees, in the order of ``prompts``."""
    run = _Run(engine, strategy, order_seed)
    try:
        return [tree for _, tree in sorted(run.trees(prompts), key=lambda pair: pair[0])]
    finally:
        run.release()


class _Run:
    def __init__(self, engine: Engine, strategy: Strategy, order_seed: int | None) -> None:
        self.engine = engine
        self.strategy = strategy
        self.rng = None if order_seed is None else np.random.default_rng(order_seed)
        self.room = TreeRoom(strategy, engine.pool.num_slots)
        self.growing: dict[int, _Growing] = {}
        self.queue: list[tuple[_Growing, ExtendRequest]] = []  # asked for, not yet submitted
        self.submitted: dict[int, tuple[_Growing, ExtendRequest]] = {}  # by the engine's id

    def trees(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Tree]]:
        """(index of its prompt, tree) of each tree as it is finished."""
        todo = list(enumerate(prompts))[::-1]
        while todo or self.growing:
            while todo and self._has_room(todo[-1][1]):
                index, prompt = todo.pop()
                finished = self._begin(index, prompt)
                if finished is not None:
                    yield index, finished
            self._submit()
            for growing, results in self._deliveries(self.engine.collect(self.submitted)):
                if growing.index not in self.growing:  # finished without these, in this very step
                    continue
                growing.outstanding -= len(results)
                growing.state, requests = self.strategy.advance(growing.state, results)
                finished = self._take(growing, requests)
                if finished is not None:
                    yield growing.index, finished

    def release(self) -> None:
        """Cancel what is unfinished and free its handles."""
        for request_id in self.submitted:
            self.engine.cancel(request_id)
        for growing in self.growing.values():
            self._free(growing)
        self.growing.clear()

    def _has_room(self, prompt: Prompt) -> bool:
        asked = len(self.queue) + len(self.submitted)
        if asked >= self.engine.settings.max_running_requests:
            return False
        return self.room.has_room(len(self.growing), len(prompt.token_ids))

    def _begin(self, index: int, prompt: Prompt) -> Tree | None:
        state, requests = self.strategy.start(prompt)
        growing = _Growing(index, state, num_tokens=len(prompt.token_ids))
        self.growing[index] = growing
        return self._take(growing, requests)

    def _take(self, growing: _Growing, requests: Sequence[ExtendRequest]) -> Tree | None:
        """Queue a tree's requests; returns the tree if it is finished."""
        self.queue.extend((growing, request) for request in requests)
        growing.outstanding += len(requests)
        growing.num_expected += sum(_first_slots(request) for request in requests)
        tree = self.strategy.tree(growing.state)
        if tree is None:
            assert growing.outstanding, "the strategy waits for results it has not asked for"
            return None
        if growing.outstanding:
            self._cancel(growing)
        self._free(growing)
        del self.growing[growing.index]
        self.room.note(tree)
        self.engine.add_costs(CostLedger(unique_tokens=num_unique_tokens(tree)))
        return tree

    def _cancel(self, growing: _Growing) -> None:
        """Forget what a strategy asked for and no longer wants."""
        self.queue = [pair for pair in self.queue if pair[0] is not growing]
        for request_id in [i for i, (owner, _) in self.submitted.items() if owner is growing]:
            self.engine.cancel(request_id)
            del self.submitted[request_id]

    def _submit(self) -> None:
        if not self.queue:
            return
        served = self._served()
        batch = [pair for pair in self.queue if pair[0].index in served]
        self.queue = [pair for pair in self.queue if pair[0].index not in served]
        if self.rng is not None and batch:
            order = [batch[i] for i in self.rng.permutation(len(batch))]
            count = int(self.rng.integers(1, len(order) + 1))
            batch, self.queue = order[:count], order[count:] + self.queue
        for growing, request in batch:
            segments = growing.state.segments
            node = self._handle(growing, segments, request.parent)
            # Invariant: what the model will see is what the record says.
            assert np.array_equal(
                self.engine.path_token_ids(node), _recorded_path(segments, request.parent)
            ), "the engine's path differs from the recorded one"
            request_id = self.engine.submit(node, request.spec, request.path_key)
            self.submitted[request_id] = (growing, request)

    def _served(self) -> set[int]:
        """Trees whose requests go to the engine: the oldest, as many as the pool can hold."""
        served: set[int] = set()
        left = self.engine.pool.num_slots
        for index, growing in sorted(self.growing.items()):
            left -= growing.num_tokens + growing.num_expected
            if left < 0 and served:
                break
            served.add(index)
        return served

    def _handle(self, growing: _Growing, segments: Sequence[Any], index: int) -> Node:
        """Engine node of an arena segment; what was sampled before is found by its tokens."""
        segment = segments[index]
        depth = sum(segments[i].num_tokens for i in path(segments, index))
        place = segment.path_key, depth
        if place not in growing.handles:
            if segment.parent < 0:
                node = self.engine.prefill(segment.token_ids)
            else:
                parent = self._handle(growing, segments, segment.parent)
                node = self.engine.append(parent, segment.token_ids)
            self.engine.soften(node)
            growing.handles[place] = node
        return growing.handles[place]

    def _deliveries(
        self, completions: Sequence[Completion]
    ) -> list[tuple[_Growing, list[ExtendResult]]]:
        """Results by tree; in random order each alone where an order seed is set."""
        results: list[tuple[_Growing, ExtendResult]] = []
        for completion in completions:
            growing, request = self.submitted.pop(completion.request_id)
            self.engine.soften(completion.node)
            growing.segments.append(completion.node)
            growing.num_tokens += len(completion.token_ids)
            growing.num_expected -= _first_slots(request)
            results.append((growing, _result(request, completion)))
        if self.rng is not None:
            return [(results[i][0], [results[i][1]]) for i in self.rng.permutation(len(results))]
        grouped: dict[int, tuple[_Growing, list[ExtendResult]]] = {}
        for growing, result in results:
            grouped.setdefault(growing.index, (growing, []))[1].append(result)
        return list(grouped.values())

    def _free(self, growing: _Growing) -> None:
        """Drop all the tree's keys and values but its prompt's, which stay as cache."""
        for node in reversed(growing.segments):
            self.engine.free(node, drop=True)
        root = growing.state.segments[0].path_key
        deepest_first = sorted(growing.handles.items(), key=lambda item: -item[0][1])
        for (path_key, _), node in deepest_first:
            self.engine.free(node, drop=path_key != root)
        growing.segments.clear()
        growing.handles.clear()


def num_unique_tokens(tree: Tree) -> int:
    """Tokens of a tree from which another token was predicted, each counted once: what must at
    least be forwarded to grow it without a cache from earlier trees.
    """
    has_next = {segment.parent for segment in tree.segments if segment.num_tokens}
    total = 0
    for index, segment in enumerate(tree.segments):
        if segment.num_tokens:
            total += segment.num_tokens - (0 if _is_continued(tree, index, has_next) else 1)
    return total


def _is_continued(tree: Tree, index: int, has_next: set[int]) -> bool:
    """Whether some segment with tokens follows, perhaps after empty ones."""
    if index in has_next:
        return True
    empty = [i for i, s in enumerate(tree.segments) if s.parent == index and not s.num_tokens]
    return any(_is_continued(tree, i, has_next) for i in empty)


def _first_slots(request: ExtendRequest) -> int:
    return min(MAX_EXTENT, request.spec.max_tokens)


def _recorded_path(segments: Sequence[Any], index: int) -> np.ndarray:
    return np.concatenate([segments[i].token_ids for i in path(segments, index)])


def _result(request: ExtendRequest, completion: Completion) -> ExtendResult:
    return ExtendResult(
        request=request,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        sampling_logprobs=completion.sampling_logprobs,
        finish_reason=completion.finish_reason,
        policy_versions=completion.policy_versions,
        stop_reason=completion.stop_reason,
        entropy=completion.entropy,
        top_token_ids=completion.top_token_ids,
        top_logprobs=completion.top_logprobs,
    )
