"""One call of the scheduler: which trees grow, which requests are with the engine, and what is put
aside when the limits are reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout.engine import Engine
from rollout.extend import STOP, ExtendRequest, ExtendResult, ExtendSpec
from rollout.growing import Growing
from rollout.growth import Growth, GrowthLimits, Partial, joined, nothing_drawn, result
from rollout.kv_pool import MAX_EXTENT
from rollout.metrics import CostLedger
from rollout.requests import Completion
from rollout.strategies.base import Prompt, Strategy
from rollout.tree import Tree, num_unique_tokens
from rollout.tree_room import TreeRoom

Work = Prompt | Growth


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """The part of a request that one call serves: at most ``max_tokens`` behind ``partial``."""

    growing: Growing
    partial: Partial
    max_tokens: int

    @property
    def first_slots(self) -> int:
        return min(MAX_EXTENT, self.max_tokens)

    @property
    def spec(self) -> ExtendSpec:
        spec, drawn = self.partial.request.spec, self.partial.num_tokens
        return replace(
            spec,
            max_tokens=self.max_tokens,
            num_response_tokens=spec.num_response_tokens + drawn,
        )


class Service:
    """See the module.

    Args:
        ranks: each tree's place in the order of service.
        longest_first: requests are served in that order too, not as they come.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        limits: GrowthLimits,
        ranks: Sequence[int],
        *,
        longest_first: bool,
        order_seed: int | None,
    ) -> None:
        self.engine = engine
        self.strategy = strategy
        self.limits = limits
        self.ranks = ranks
        self.longest_first = longest_first
        self.rng = None if order_seed is None else np.random.default_rng(order_seed)
        self.room = TreeRoom(strategy, engine.pool.num_slots, limits.segment_length)
        self.growing: dict[int, Growing] = {}
        self.queue: list[_Piece] = []  # asked for, not yet submitted
        self.submitted: dict[int, _Piece] = {}  # by the engine's id

    def trees(self, work: Sequence[Work]) -> Iterator[tuple[int, Tree | Growth]]:
        """(index in ``work``, tree) of each as it is finished or put aside."""
        todo = sorted(range(len(work)), key=lambda index: -self.ranks[index])
        num_finished, enough = 0, self.limits.stop_when_finished or math.inf
        while (todo or self.growing) and num_finished < enough:
            ended: list[tuple[int, Tree | Growth]] = []
            while todo and self._has_room(work[todo[-1]]):
                index = todo.pop()
                ended += self._begin(index, work[index])
            self._submit()
            for growing, served in self._deliveries(self.engine.collect(self.submitted)):
                if growing.index in self.growing:  # else finished without these, in this very step
                    ended += self._deliver(growing, served)
            num_finished += sum(isinstance(tree, Tree) for _, tree in ended)
            yield from ended
        for growing in list(self.growing.values()):
            self._cut(growing)
            yield self._put_aside(growing)
        for index in reversed(todo):
            yield index, self._unbegun(work[index])

    def release(self) -> None:
        """Cancel what is unfinished and free its handles."""
        for request_id in self.submitted:
            self.engine.cancel(request_id)
        for growing in self.growing.values():
            growing.free(self.engine, drop=True)
        self.growing.clear()

    # Trees begin and end.

    def _has_room(self, item: Work) -> bool:
        asked = len(self.queue) + len(self.submitted)
        if asked >= self.engine.settings.max_running_requests:
            return False
        return self.room.has_room(len(self.growing), _num_tokens(item))

    def _begin(self, index: int, item: Work) -> list[tuple[int, Tree | Growth]]:
        if isinstance(item, Prompt):
            state, requests = self.strategy.start(item)
            partials = [nothing_drawn(request) for request in requests]
        else:
            state, partials = item.state, list(item.partials)
        growing = Growing(index, self.ranks[index], item.problem_id, state, _num_tokens(item))
        self.growing[index] = growing
        if isinstance(item, Growth):
            growing.handles.update(self.engine.paused.take(item))
        return self._take(growing, partials)

    def _unbegun(self, item: Work) -> Tree | Growth:
        """A tree that this call did not come to."""
        if isinstance(item, Growth):
            return item
        state, requests = self.strategy.start(item)
        partials = tuple(nothing_drawn(request) for request in requests)
        tree = self.strategy.tree(state)
        if tree is not None:
            return tree
        return Growth(problem_id=item.problem_id, state=state, partials=partials)

    def _deliver(
        self, growing: Growing, served: Sequence[ExtendResult | Partial]
    ) -> list[tuple[int, Tree | Growth]]:
        """Whole segments to the strategy; what is at the limit is put aside."""
        growing.outstanding -= len(served)
        results = [each for each in served if isinstance(each, ExtendResult)]
        for partial in served:
            if isinstance(partial, Partial):
                growing.put_aside[partial.request_id] = partial
        requests: Sequence[ExtendRequest] = ()
        if results:
            growing.state, requests = self.strategy.advance(growing.state, results)
        return self._take(growing, [nothing_drawn(request) for request in requests])

    def _take(
        self, growing: Growing, partials: Sequence[Partial]
    ) -> list[tuple[int, Tree | Growth]]:
        """Queue what a tree asks for, as far as the limits go; the tree, if it has ended."""
        tree = self.strategy.tree(growing.state)
        if tree is not None:
            self._cancel(growing)
            self.engine.add_costs(CostLedger(unique_tokens=num_unique_tokens(tree)))
            growing.free(self.engine, drop=True)
            self._end(growing, sum(segment.num_tokens for segment in tree.segments))
            return [(growing.index, tree)]
        for partial in partials:
            left = partial.request.spec.max_tokens - partial.num_tokens
            allowed = left
            if self.limits.segment_length:
                used = growing.num_drawn_here(partial.request.parent)
                allowed = min(left, self.limits.segment_length - used)
            if left and allowed <= 0:
                growing.put_aside[partial.request_id] = partial
            else:
                piece = _Piece(growing, partial, allowed)
                self.queue.append(piece)
                growing.outstanding += 1
                growing.num_expected += piece.first_slots
        if growing.outstanding:
            return []
        assert growing.put_aside, "the strategy waits for results it has not asked for"
        return [self._put_aside(growing)]

    def _put_aside(self, growing: Growing) -> tuple[int, Growth]:
        growth = growing.growth()
        if self.engine.settings.keeps_kv:
            growing.pause(self.engine, growth)
        else:
            growing.free(self.engine, drop=False)
        self._end(growing, growth.num_tokens)
        return growing.index, growth

    def _end(self, growing: Growing, num_tokens: int) -> None:
        del self.growing[growing.index]
        self.room.note(num_tokens)

    def _cancel(self, growing: Growing) -> None:
        """Forget what a strategy asked for and no longer wants."""
        self.queue = [piece for piece in self.queue if piece.growing is not growing]
        for request_id in self._submitted_of(growing):
            self.engine.cancel(request_id)
            del self.submitted[request_id]

    def _cut(self, growing: Growing) -> None:
        """Put all aside that a tree waits for, with what was drawn."""
        mine = [piece for piece in self.queue if piece.growing is growing]
        self.queue = [piece for piece in self.queue if piece.growing is not growing]
        for piece in mine:
            growing.put_aside[piece.partial.request_id] = piece.partial
        for request_id in self._submitted_of(growing):
            completion = self.engine.cut(request_id)
            assert completion is not None
            drawn = self._drawn(self.submitted.pop(request_id), completion)
            growing.put_aside[drawn.request_id] = drawn
        growing.outstanding = 0

    def _submitted_of(self, growing: Growing) -> list[int]:
        return [i for i, piece in self.submitted.items() if piece.growing is growing]

    # Requests.

    def _submit(self) -> None:
        if not self.queue:
            return
        served = self._served()
        batch = [piece for piece in self.queue if piece.growing.index in served]
        self.queue = [piece for piece in self.queue if piece.growing.index not in served]
        if self.rng is not None and batch:
            order = [batch[i] for i in self.rng.permutation(len(batch))]
            count = int(self.rng.integers(1, len(order) + 1))
            batch, self.queue = order[:count], order[count:] + self.queue
        elif self.longest_first:
            # What the engine cannot begin yet waits here, where what comes may overtake it.
            batch.sort(key=lambda piece: piece.growing.rank)
            count = self.engine.settings.max_running_requests - len(self.submitted)
            batch, self.queue = batch[:count], batch[count:] + self.queue
        for piece in batch:
            growing, partial = piece.growing, piece.partial
            node = growing.node(self.engine, partial)
            depth = growing.depth(partial.request.parent) + partial.num_tokens
            # What cannot fit is said at once, not when the tree has come so far.
            left = partial.request.spec.max_tokens - partial.num_tokens
            self.engine.check_length(depth, left)
            growing.begun[partial.request.path_key] = depth
            request_id = self.engine.submit(node, piece.spec, partial.request.path_key)
            self.submitted[request_id] = piece

    def _served(self) -> set[int]:
        """Trees whose requests go to the engine: the first in the order of service, as many as the
        pool can hold.
        """
        served: set[int] = set()
        left = self.engine.pool.num_slots
        for growing in sorted(self.growing.values(), key=lambda growing: growing.rank):
            left -= growing.num_tokens + growing.num_expected
            if left < 0 and served:
                break
            served.add(growing.index)
        return served

    def _drawn(self, piece: _Piece, completion: Completion) -> Partial:
        """All that was drawn of a request whose piece has ended."""
        self.engine.soften(completion.node)
        drawn = joined(piece.partial, completion)
        if drawn.num_tokens:
            place = piece.growing.end_of(drawn)
            piece.growing.drawn[place] = completion.node
            if completion.finish_reason == STOP:
                piece.growing.stopped.add(place)
        else:
            self.engine.free(completion.node)
        piece.growing.num_tokens += len(completion.token_ids)
        piece.growing.num_expected -= piece.first_slots
        return drawn

    def _deliveries(
        self, completions: Sequence[Completion]
    ) -> list[tuple[Growing, list[ExtendResult | Partial]]]:
        """What became of pieces, by tree; in random order each alone where an order seed is set."""
        found: list[tuple[Growing, ExtendResult | Partial]] = []
        for completion in completions:
            piece = self.submitted.pop(completion.request_id)
            drawn = self._drawn(piece, completion)
            is_whole = drawn.num_tokens == drawn.request.spec.max_tokens
            is_over = is_whole or completion.finish_reason == STOP
            found.append((piece.growing, result(drawn, completion) if is_over else drawn))
        if self.rng is not None:
            return [(found[i][0], [found[i][1]]) for i in self.rng.permutation(len(found))]
        grouped: dict[int, tuple[Growing, list[ExtendResult | Partial]]] = {}
        for growing, served in found:
            grouped.setdefault(growing.index, (growing, []))[1].append(served)
        return list(grouped.values())


def _num_tokens(item: Work) -> int:
    return len(item.token_ids) if isinstance(item, Prompt) else item.num_tokens
