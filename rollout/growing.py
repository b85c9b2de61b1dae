"""A tree in the making: its strategy's state, and where its paths stand in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.engine import Engine
from rollout.growth import Growth, Partial
from rollout.store import Node
from rollout.strategies.arena import path

Place = tuple[int, int]  # (path key of the segment that ends there, depth in tokens)


@dataclass(eq=False, slots=True)
class Growing:
    """See the module.

    Attributes:
        index: in the work.
        rank: in the order of service.
        partials: what earlier calls drew of requests that go on, by request id.
        put_aside: requests that this call serves no further, by request id.
        handles: engine node of each place that was asked for. Indices shift when a strategy cuts a
            segment; places stay.
        drawn: engine nodes of drawn tokens, kept so that what was computed is found again.
        begun: depth of the first token that this call draws of a segment, by its path key.
        outstanding: requests that are queued or submitted.
        num_tokens: of the tree so far.
        num_expected: slots that its outstanding requests take at first.
    """

    index: int
    rank: int
    problem_id: str
    state: Any
    num_tokens: int
    partials: dict[int, Partial] = field(default_factory=dict)
    put_aside: dict[int, Partial] = field(default_factory=dict)
    handles: dict[Place, Node] = field(default_factory=dict)
    drawn: list[Node] = field(default_factory=list)
    begun: dict[int, int] = field(default_factory=dict)
    outstanding: int = 0
    num_expected: int = 0

    @property
    def segments(self) -> Sequence[Any]:
        """The strategy's arena."""
        return self.state.segments

    def depth(self, index: int) -> int:
        """Tokens from the root to the end of segment ``index``."""
        return sum(self.segments[i].num_tokens for i in path(self.segments, index))

    def num_drawn_here(self, index: int) -> int:
        """Tokens on the path to segment ``index`` that this call has drawn."""
        start = total = 0
        for i in path(self.segments, index):
            segment = self.segments[i]
            end = start + segment.num_tokens
            # A piece of a cut segment may lie before or behind where this call went on.
            total += max(0, end - max(start, self.begun.get(segment.path_key, end)))
            start = end
        return total

    def node(self, engine: Engine, partial: Partial) -> Node:
        """Engine node at the end of what was drawn for a request."""
        parent = self._handle(engine, partial.request.parent)
        if not partial.num_tokens:
            node = parent
        else:
            depth = self.depth(partial.request.parent) + partial.num_tokens
            place = partial.request.path_key, depth
            if place not in self.handles:
                self.handles[place] = node = engine.append(parent, partial.token_ids)
                engine.soften(node)
            node = self.handles[place]
        # Invariant: what the model will see is what the record says.
        recorded = [self.segments[i].token_ids for i in path(self.segments, partial.request.parent)]
        assert np.array_equal(
            engine.path_token_ids(node), np.concatenate([*recorded, partial.token_ids])
        ), "the engine's path differs from the recorded one"
        return node

    def _handle(self, engine: Engine, index: int) -> Node:
        """Engine node of an arena segment; what was sampled before is found by its tokens."""
        segment = self.segments[index]
        place = segment.path_key, self.depth(index)
        if place not in self.handles:
            if segment.parent < 0:
                node = engine.prefill(segment.token_ids)
            else:
                node = engine.append(self._handle(engine, segment.parent), segment.token_ids)
            engine.soften(node)
            self.handles[place] = node
        return self.handles[place]

    def growth(self) -> Growth:
        """The unfinished tree as a record; nothing is outstanding."""
        assert self.put_aside and not self.outstanding
        partials = tuple(self.put_aside[i] for i in sorted(self.put_aside))
        return Growth(problem_id=self.problem_id, state=self.state, partials=partials)

    def free(self, engine: Engine, *, drop: bool) -> None:
        """End all handles. With ``drop`` the tree's keys and values leave the cache, but for its
        prompt's, which other trees may share.
        """
        for node in reversed(self.drawn):
            engine.free(node, drop=drop)
        root = self.segments[0].path_key
        deepest_first = sorted(self.handles.items(), key=lambda item: -item[0][1])
        for (path_key, _), node in deepest_first:
            engine.free(node, drop=drop and path_key != root)
        self.drawn.clear()
        self.handles.clear()
