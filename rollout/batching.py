"""Which tokens the next forward computes: the last token of every growing segment, and what is
missing of new paths, in chunks under one token budget.

A path longer than the budget is computed over several forwards, beside the tokens being decoded, so
that a long prompt does not hold the others up. Of a node that several requests need, each chunk is
computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.attention.base import Block, ExtensiblePlan, GrowingPlan
from rollout.forward import Rows, TreeForward
from rollout.radix_tree import TreeNode
from rollout.requests import Request
from rollout.running import RunningTable


@dataclass(eq=False, slots=True)
class Batch:
    """What one forward computes and who draws from it.

    Attributes:
        wanted: int64 [W], ascending: rows whose logits are drawn from.
        source: int64 [requests], index in ``wanted``; None: one each, in order.
        drawing: int64 [requests], table rows of the requests that draw; the others still wait for
            parts of their paths.
        is_steady: every row is the last token of an open node.
    """

    rows: Rows
    wanted: np.ndarray
    source: np.ndarray | None
    drawing: np.ndarray
    is_steady: bool

    @property
    def can_go_on(self) -> bool:
        """Whether the next batch differs only in the tokens."""
        return self.is_steady and isinstance(self.rows.plan, GrowingPlan)

    def take_slots(self, slots: dict[int, np.ndarray]) -> bool:
        """Note new slots of growing segments, by table row; False if the plan cannot."""
        plan = self.rows.plan
        if not slots:
            return True
        if not isinstance(plan, ExtensiblePlan):
            return False
        places = {row: i for i, row in enumerate(self.drawing.tolist())}
        plan.extend({places[row]: more for row, more in slots.items()})
        return True

    def next(self, goes_on: np.ndarray, table: RunningTable) -> None:
        """Move every row one token on.

        Args:
            goes_on: bool [requests]: the others ended.
        """
        plan = self.rows.plan
        assert self.is_steady and isinstance(plan, GrowingPlan)
        if not goes_on.all():
            plan.keep(goes_on)
            self.drawing = self.drawing[goes_on]
            self.wanted = np.arange(len(self.drawing))
        plan.advance()
        rows = self.rows
        rows.token_ids, rows.positions, rows.slots = table.last_tokens(self.drawing)


def gather(
    running: Sequence[Request], table: RunningTable, forward: TreeForward, budget: int
) -> Batch:
    """Blocks for all running requests.

    Args:
        running: in order of admission; parts of new paths are computed in this order.
        budget: query rows of the forward; growing segments go first and are never held back.
    """
    growing = [request for request in running if not request.is_fresh]
    chunks = _Chunks(table, budget - len(growing))
    drawing = [request for request in growing]
    for request in growing:
        chunks.add_last_token(request)
    for request in running:
        if request.is_fresh and chunks.cover(request):
            drawing.append(request)
    rows = forward.rows(list(chunks.blocks.values()))
    last = rows.last_rows()
    wanted_of = np.array([last[id(chunks.sources[id(r)])] for r in drawing], np.int64)
    wanted, source = np.unique(wanted_of, return_inverse=True)
    numbers = np.array([request.row for request in drawing], np.int64)
    is_steady = len(growing) == len(running)
    if is_steady:  # one request a row: put the requests in row order
        return Batch(rows, wanted, None, numbers[np.argsort(source)], True)
    return Batch(rows, wanted, source, numbers, False)


class _Chunks:
    """The blocks of a forward in the making.

    Attributes:
        blocks: by the ``id`` of their node.
        sources: by the ``id`` of a request, the node whose last row it draws from.
    """

    def __init__(self, table: RunningTable, left: int) -> None:
        self.blocks: dict[int, Block] = {}
        self.sources: dict[int, TreeNode] = {}
        self._table = table
        # A forward without a growing segment always gets on, whatever the budget.
        self._left = left

    def add_last_token(self, request: Request) -> None:
        """The token that a growing segment drew last."""
        leaf, count = request.leaf, int(self._table.count[request.row])
        assert leaf is not None
        token_ids = self._table.token_ids(request.row, count - 1)
        self.blocks[id(leaf)] = Block(leaf, count - 1, count, token_ids)
        self.sources[id(request)] = leaf

    def cover(self, request: Request) -> bool:
        """Add what is missing of a request's path as far as the budget goes; whether that is all,
        so that the request can draw.
        """
        base, leaf = request.base, request.leaf
        assert base is not None and leaf is not None
        for node in base.path():
            if not self._compute(node, node.token_ids):
                return False
        drawn = self._table.token_ids(request.row, 0)
        if len(drawn):  # put back once, and computed again
            self.sources[id(request)] = leaf
            return self._compute(leaf, drawn)
        self.sources[id(request)] = base
        if id(base) not in self.blocks:  # computed before, but its logits were not kept
            if self._left < 1 and self.blocks:
                return False
            last = len(base.token_ids) - 1
            block = Block(base, last, last + 1, base.token_ids[last:], writes=False)
            self.blocks[id(base)] = block
            self._left -= 1
        return True

    def _compute(self, node: TreeNode, token_ids: np.ndarray) -> bool:
        """Add the rest of a node, or a chunk of it; whether its last token will be known."""
        if id(node) in self.blocks:
            return self.blocks[id(node)].stop == len(token_ids)
        start = node.num_computed
        stop = min(len(token_ids), start + max(0, self._left))
        if stop > start:
            self.blocks[id(node)] = Block(node, start, stop, token_ids[start:stop])
            self._left -= stop - start
        return stop == len(token_ids)
