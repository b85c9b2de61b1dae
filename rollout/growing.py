"""A tree in the making: its strategy's state, and where its paths stand in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.engine import Engine
from rollout.growth import Growth, Partial
from rollout.paused import Place
from rollout.store import Node
from rollout.strategies.arena import path


@dataclass(eq=False, slots=True)
class Growing:
    """See the module.

    Attributes:
        index: in the work.
        rank: in the order of service.
        put_aside: requests that this call serves no further, by request id.
        handles: engine node of each place that was asked for. Indices shift when a strategy cuts a
            segment; places stay.
        drawn: engine nodes behind what this call drew.
        stopped: of these, the places where a stop was drawn.
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
    put_aside: dict[int, Partial] = field(default_factory=dict)
    handles: dict[Place, Node] = field(default_factory=dict)
    drawn: dict[Place, Node] = field(default_factory=dict)
    stopped: set[Place] = field(default_factory=set)
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
        if not partial.num_tokens:
            node = self._handle(engine, partial.request.parent)
        else:
            place = self.end_of(partial)
            if place not in self.handles:
                parent = self._handle(engine, partial.request.parent)
                self.handles[place] = engine.append(parent, partial.token_ids)
                engine.soften(self.handles[place])
            node = self.handles[place]
        # Invariant: what the model will see is what the record says.
        recorded = [self.segments[i].token_ids for i in path(self.segments, partial.request.parent)]
        assert np.array_equal(
            engine.path_token_ids(node), np.concatenate([*recorded, partial.token_ids])
        ), "the engine's path differs from the recorded one"
        return node

    def end_of(self, partial: Partial) -> Place:
        """The place behind what was drawn for a request."""
        parent = partial.request.parent
        depth = self.depth(parent) + partial.num_tokens
        return (
            partial.request.path_key if partial.num_tokens else self.segments[parent].path_key,
            depth,
        )

    def _handle(self, engine: Engine, index: int) -> Node:
        """Engine node of an arena segment."""
        segment = self.segments[index]
        place = segment.path_key, self.depth(index)
        if place in self.drawn:
            return self.drawn[place]
        if place not in self.handles:
            if segment.parent < 0:
                node = engine.prefill(segment.token_ids)
            else:
                node = engine.append(self._handle(engine, segment.parent), segment.token_ids)
            engine.soften(node)
            self.handles[place] = node
        return self.handles[place]

    def pause(self, engine: Engine, growth: Growth) -> None:
        """Leave the places from which paths will go on with the engine: the ends of requests that
        were put aside, and of segments that the strategy has yet to use. New paths leave the prompt
        under the weights that are then in force, so its own place is none of them.
        """
        in_arena = {segment.path_key for segment in self.segments}
        ends = {self.end_of(partial) for partial in self.put_aside.values()}
        deepest: dict[int, int] = {}  # by path key, of segments that are not in the arena
        for path_key, depth in (*self.handles, *self.drawn):
            if path_key not in in_arena:
                deepest[path_key] = max(depth, deepest.get(path_key, 0))
        ends |= set(deepest.items()) - self.stopped
        ends -= {(self.segments[0].path_key, self.segments[0].num_tokens)}
        kept: dict[Place, Node] = {}
        for place in sorted(ends, key=lambda place: place[1]):
            for nodes in (self.drawn, self.handles):
                if place in nodes and place not in kept:
                    kept[place] = nodes.pop(place)
        self.free(engine, drop=False)
        engine.paused.put(growth, kept)

    def growth(self) -> Growth:
        """The unfinished tree as a record; nothing is outstanding."""
        assert self.put_aside and not self.outstanding
        partials = tuple(self.put_aside[i] for i in sorted(self.put_aside))
        return Growth(problem_id=self.problem_id, state=self.state, partials=partials)

    def free(self, engine: Engine, *, drop: bool) -> None:
        """End all handles. With ``drop`` the tree's keys and values leave the cache, but for its
        prompt's, which other trees may share.
        """
        for node in reversed(self.drawn.values()):
            engine.free(node, drop=drop)
        root = self.segments[0].path_key
        deepest_first = sorted(self.handles.items(), key=lambda item: -item[0][1])
        for (path_key, _), node in deepest_first:
            engine.free(node, drop=drop and path_key != root)
        self.drawn.clear()
        self.handles.clear()
