"""Attention over the token tree with flash-attn's varlen kernel, merged by log-sum-exp.

A span is a sequence of the kernel: its rows as queries, its keys gathered by slot. (The paged mode
of flash-attn wants pages of 256 slots; the pool has pages of one.) Shared spans are one call, a
block's own span, which is causal with its corner at the bottom right, another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.attention.base import LayerVariant
from rollout.attention.merge import MergeTable, merge_partials
from rollout.attention.spans import Span
from rollout.attention.work_list import SpanTable
from treepo.base.flash_varlen import MAX_HEAD_DIM, Varlen, load_varlen


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """The sequences of one call.

    Attributes:
        rows: int64 [Tq], query rows of all sequences one after another.
        slots: int64 [Tk], slots of their keys.
        row_ends, key_ends: int32 [B + 1], where sequences end in these, from 0.
        most_rows, most_keys: of a sequence.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    row_ends: torch.Tensor
    key_ends: torch.Tensor
    most_rows: int
    most_keys: int
    causal: bool


class FlashPlan:
    """The plan of one forward, or of many while segments grow and end; see
    ``rollout.attention.cpu.NodePlan``, whose interface it has.

    Args:
        spans: see ``rollout.attention.spans``.
        positions: int64 [N], depth of each query row.
        varlen: the kernel; None loads flash-attn's.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        positions: np.ndarray,
        *,
        device: torch.device,
        varlen: Varlen | None = None,
    ) -> None:
        self.positions = positions
        self.device = device
        self._varlen = varlen or load_varlen()
        self._table = SpanTable.of(spans)
        self._made: dict[int | None, tuple[list[Sequences], MergeTable]] = {}  # by window

    def advance(self) -> None:
        """Every row moves one token on in its open node."""
        self._table = self._table.advance(1)
        self.positions = self.positions + 1
        self._made.clear()

    def keep(self, mask: np.ndarray) -> None:
        """Forget the rows whose segments ended. All rows must be growing ones.

        Args:
            mask: bool [N], rows that go on; they move up in order.
        """
        self._table = self._table.keep(mask)
        self.positions = self.positions[mask]
        self._made.clear()

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        """See ``rollout.attention.base.Plan``."""
        if variant.window not in self._made:
            self._made[variant.window] = self._make(variant.window)
        calls, table = self._made[variant.window]
        value_dim = values.shape[-1]
        width = max(query.shape[-1], value_dim)  # the kernel wants one head size
        if width > MAX_HEAD_DIM:
            raise ValueError(
                f"attention=flash cannot serve heads of {width} numbers (at most {MAX_HEAD_DIM}): "
                "set attention=auto"
            )
        outputs, lses = [], []
        for call in calls:
            window = variant.window if call.causal else None
            output, lse, _ = self._varlen(
                _widened(query.index_select(0, call.rows), width),
                _widened(keys.index_select(0, call.slots), width),
                _widened(values.index_select(0, call.slots), width),
                call.row_ends,
                call.key_ends,
                call.most_rows,
                call.most_keys,
                softmax_scale=variant.scaling,
                causal=call.causal,
                window_size=(-1, -1) if window is None else (window - 1, 0),
                softcap=variant.softcap or 0.0,
                return_attn_probs=True,
            )
            outputs.append(output[..., :value_dim])
            lses.append(lse.transpose(0, 1))  # from [H, Tq]
        return merge_partials(outputs, lses, table, variant.sinks)

    def _make(self, window: int | None) -> tuple[list[Sequences], MergeTable]:
        own, shared = _sequences(self._table, self.positions, window)
        calls = [
            self._call(parts, causal) for parts, causal in ((own, True), (shared, False)) if parts
        ]
        owners = np.concatenate([rows for rows, _ in own + shared])
        return calls, MergeTable(owners, len(self.positions), self.device)

    def _call(self, parts: list[tuple[np.ndarray, np.ndarray]], causal: bool) -> Sequences:
        num_rows = np.array([len(rows) for rows, _ in parts])
        num_keys = np.array([len(slots) for _, slots in parts])
        return Sequences(
            rows=self._tensor(np.concatenate([rows for rows, _ in parts])),
            slots=self._tensor(np.concatenate([slots for _, slots in parts])),
            row_ends=self._tensor(_ends(num_rows)),
            key_ends=self._tensor(_ends(num_keys)),
            most_rows=int(num_rows.max()),
            most_keys=int(num_keys.max()),
            causal=causal,
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _sequences(
    table: SpanTable, positions: np.ndarray, window: int | None
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """(rows, slots) of each sequence: (the causal ones, to which the kernel applies the window;
    those all of whose rows see all of their keys).
    """
    causal, whole = [], []
    for i, (offset, length) in enumerate(zip(table.offset, table.length, strict=True)):
        slots = table.slots[offset : offset + length]
        rows = np.arange(table.row[i], table.row[i] + table.num_rows[i])
        if table.causal[i] and len(rows) > 1:
            causal.append((rows, slots))
            continue
        hidden = np.zeros(len(rows), np.int64)  # keys out of each row's window
        if window is not None:
            hidden = np.maximum(positions[rows] - window + 1 - table.start[i], 0)
        if (hidden == 0).any():
            whole.append((rows[hidden == 0], slots))
        # At most one span of a row's path is cut by its window: that row is then a sequence of
        # its own.
        for row, skip in zip(rows, hidden, strict=True):
            if 0 < skip < length:
                whole.append((np.array([row]), slots[skip:]))
    return causal, whole


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Padded with zeros to head size ``width``."""
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
