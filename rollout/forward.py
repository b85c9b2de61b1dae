"""One forward of the model over blocks of tree nodes: rows in tree order, a plan, logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.attention.base import Block, Plan
from rollout.attention.choose import choose_back_end, make_plan
from rollout.attention.spans import lay_out
from rollout.decode_graph import DecodeSteps
from rollout.metrics import Meter
from rollout.model_runner import ModelRunner
from rollout.settings import EngineSettings


@dataclass(eq=False, slots=True)
class Rows:
    """The query rows of one forward.

    Attributes:
        blocks: in row order.
        token_ids: int32 [N].
        positions: int64 [N], depth in tokens.
        slots: int64 [N] that the rows write.
    """

    plan: Plan
    blocks: list[Block]
    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray

    def last_rows(self) -> dict[int, int]:
        """Row of each block's last token, by ``id`` of the block's node."""
        ends = np.cumsum([block.num_rows for block in self.blocks]) - 1
        return {id(block.node): int(end) for block, end in zip(self.blocks, ends, strict=True)}


class TreeForward:
    """Runs the model over tree nodes that have slots."""

    def __init__(self, runner: ModelRunner, settings: EngineSettings, meter: Meter) -> None:
        self.runner = runner
        self.pool = runner.pool
        self.meter = meter
        # What plans the attention; see ``rollout.attention.choose``.
        self.back_end = choose_back_end(settings.attention, self.pool.device, self.pool.dtype)
        uses_graphs = (
            settings.cuda_graphs
            and self.pool.device.type == "cuda"
            and self.back_end == "triton_tree"
        )
        self.steps = DecodeSteps(runner, captures=True) if uses_graphs else None

    def rows(self, blocks: Sequence[Block]) -> Rows:
        """Lay the blocks' tokens out as query rows (at most one block a node)."""
        ordered, spans = lay_out(blocks)
        positions = np.concatenate(
            [np.arange(b.node.start + b.start, b.node.start + b.stop) for b in ordered]
        )
        trash = self.pool.trash_slot
        slots = np.concatenate(
            [
                b.node.slots[b.start : b.stop] if b.writes else np.full(b.num_rows, trash)
                for b in ordered
            ]
        )
        plan = make_plan(self.back_end, ordered, spans, positions, self.pool)
        token_ids = np.concatenate([b.token_ids for b in ordered])
        return Rows(plan, ordered, token_ids, positions, slots)

    def run(self, rows: Rows, wanted: np.ndarray) -> torch.Tensor:
        """Logits [W, V] at the ``wanted`` rows (int64 [W]); keys and values of all are stored."""
        logits = self.runner.forward(rows.token_ids, rows.positions, rows.slots, rows.plan, wanted)
        self.meter.count(sequential_steps=1, query_tokens=len(rows.token_ids))
        return logits

    def run_steady(self, rows: Rows) -> torch.Tensor:
        """``run`` for rows that are all the last tokens of open nodes and wanted: logits [N, V],
        valid until the next one. Where it can it leaves plan and inputs on the device.
        """
        logits = self.steps.run(rows.plan, rows.token_ids) if self.steps else None
        if logits is None:
            return self.run(rows, np.arange(len(rows.token_ids)))
        self.meter.count(sequential_steps=1, query_tokens=len(rows.token_ids))
        return logits

    def feed(self, token_ids: torch.Tensor) -> None:
        """The tokens (int64 [N]) drawn from what ``run_steady`` gave, one a row."""
        if self.steps:
            self.steps.feed(token_ids)

    def release_memory(self) -> None:
        """Drop captured steps; they are captured anew. They point to where weights, keys and values
        lie now.
        """
        if self.steps:
            self.steps.release_memory()

    def settle(self, rows: Rows) -> None:
        """Record in the nodes what a forward has computed."""
        for block in rows.blocks:
            if block.writes:
                block.node.num_computed = max(block.node.num_computed, block.stop)

    def logits(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Logits [N, V] of every row of the blocks, in the order of ``blocks``. Their ancestors
        must be computed or be blocks too.
        """
        rows = self.rows(blocks)
        found = self.run(rows, np.arange(len(rows.token_ids)))
        self.settle(rows)
        last = rows.last_rows()
        order = np.concatenate(
            [last[id(b.node)] + 1 - b.num_rows + np.arange(b.num_rows) for b in blocks]
        )
        return found[torch.from_numpy(order).to(found.device)]
