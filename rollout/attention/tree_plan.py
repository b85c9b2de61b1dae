"""The plan of the tree kernels: the work list on the device, made once a forward or kept while
segments grow.

Everything the kernels read beside queries, keys and values is one int32 buffer, filled on the host
and moved in one transfer. ``advance`` changes it in place on the device, so a step that only
advances can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch

from rollout.attention.base import LayerVariant
from rollout.attention.spans import Span
from rollout.attention.work_list import ITEM, LARGE_TILE, SMALL_TILE, SpanTable, WorkList, work_list

_ALIGN = 32  # elements; a kernel is compiled anew for pointers of another alignment
_NO_SPAN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How much a buffer holds: query rows, spans, items of either size, partial results, slots."""

    rows: int
    spans: int
    small: int
    large: int
    partials: int
    slots: int

    @classmethod
    def of(cls, table: SpanTable, work: WorkList) -> Capacity:
        """Just enough."""
        return cls(
            rows=len(work.row_start) - 1,
            spans=len(table.offset),
            small=len(work.small),
            large=len(work.large),
            partials=work.num_partials,
            slots=len(table.slots),
        )

    def rounded(self, rows: int, groups: int, slots: int) -> Capacity:
        """For a captured graph of ``rows`` rows: of the work only the numbers of items count, and
        these are rounded up to powers of two, so that few graphs are needed.
        """
        small, large = _round_up(max(self.small, rows)), _round_up(self.large)
        return Capacity(
            rows=rows,
            # A layout has no more than two spans a row, but after rows were dropped it may.
            spans=_round_up(max(2 * rows, self.spans)),
            small=small,
            large=large,
            # A tile has as many stacked rows as it may, but for the last one of a run of keys; a
            # query row has a result for each run.
            partials=_results(small, SMALL_TILE, groups) + _results(large, LARGE_TILE, groups),
            slots=slots,
        )

    def holds(self, other: Capacity) -> bool:
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """The work on the device, all int32 views of one buffer.

    Attributes:
        small, large: [W, len(ITEM)] items, padded with span -1.
        row_start: [N + 1]; see ``WorkList``. Padding rows have no partial results.
        order: [partials].
        positions: [N], depth of each query row.
        lengths: [S], keys each span has by now.
        steps: [S], keys it gains in a step: 1 where it grows.
        own_span: [N], the span that is the row's open node, -1 for none.
        offsets, capacities: [S], see ``SpanTable``.
        slots: [L].
        num_partials: results to allocate.
    """

    small: torch.Tensor
    large: torch.Tensor
    row_start: torch.Tensor
    order: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    steps: torch.Tensor
    own_span: torch.Tensor
    offsets: torch.Tensor
    capacities: torch.Tensor
    slots: torch.Tensor
    num_partials: int


class DeviceWork:
    """One buffer of a given capacity and what is in it."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.capacity = capacity
        self._starts: dict[str, int] = {}
        end = 0
        sizes = _section_sizes(capacity)
        for name, size in sizes.items():
            self._starts[name] = end
            end += -(-size // _ALIGN) * _ALIGN
        self.buffer = torch.zeros(end, dtype=torch.int32, device=device)
        parts = {
            name: self.buffer[start : start + sizes[name]] for name, start in self._starts.items()
        }
        parts["small"] = parts["small"].view(capacity.small, len(ITEM))
        parts["large"] = parts["large"].view(capacity.large, len(ITEM))
        self.work = Work(**parts, num_partials=capacity.partials)

    def load(
        self, table: SpanTable, work: WorkList, positions: np.ndarray, *, slots_too: bool = True
    ) -> None:
        """Fill the buffer, in one transfer.

        Args:
            slots_too: False if ``table.slots`` are in the buffer already.
        """
        num_rows = self.capacity.rows
        row_start = np.full(num_rows + 1, work.row_start[-1])
        row_start[: len(work.row_start)] = work.row_start
        sections = {
            "small": _padded(work.small.ravel(), self.capacity.small * len(ITEM)),
            "large": _padded(work.large.ravel(), self.capacity.large * len(ITEM)),
            "row_start": row_start,
            "order": work.order,
            "positions": positions,
            "lengths": table.length,
            "steps": table.grows,
            "own_span": _padded(table.own_spans(len(positions)), num_rows),
            "offsets": table.offset,
            "capacities": table.capacity,
            "slots": table.slots if slots_too else table.slots[:0],
        }
        end = self._starts["slots"] + len(sections["slots"])
        host = torch.zeros(end, dtype=torch.int32, pin_memory=self.buffer.is_cuda)
        into = host.numpy()
        for name, array in sections.items():
            into[self._starts[name] : self._starts[name] + len(array)] = array
        self.buffer[:end].copy_(host, non_blocking=True)

    def advance(self) -> None:
        """One more key for every growing span, one token deeper for its row; on the device."""
        self.work.lengths.add_(self.work.steps)
        self.work.positions.add_(self.work.own_span >= 0)

    def last_slots(self, trash_slot: int) -> torch.Tensor:
        """int64 [rows]: the slot of each row's last token in its open node; the trash slot for
        padding and for rows beyond what is reserved.
        """
        work = self.work
        span = work.own_span.clamp(min=0).long()
        last = work.lengths[span] - 1
        is_there = (work.own_span >= 0) & (last < work.capacities[span])
        place = torch.where(is_there, work.offsets[span] + last, 0).long()
        return torch.where(is_there, work.slots[place], trash_slot).long()


class TreePlan:
    """The plan of one forward, or of many while segments grow and end; see
    ``rollout.attention.cpu.NodePlan``, whose interface it has.

    Args:
        spans: see ``rollout.attention.spans``.
        positions: int64 [N], depth of each query row.

    Attributes:
        num_steps: advances since the last change.
        num_changes: how often rows were dropped or got slots.
    """

    def __init__(
        self, spans: Sequence[Span], positions: np.ndarray, *, device: torch.device
    ) -> None:
        self.device = device
        self._table = SpanTable.of(spans)
        self._positions = positions
        self.num_steps = 0
        self._works: dict[int, DeviceWork] = {}  # by query heads a KV head: most models have one
        self.num_changes = 0

    @property
    def table(self) -> SpanTable:
        """The spans as they are now."""
        return self._table.advance(self.num_steps)

    @property
    def positions(self) -> np.ndarray:
        return self._positions + self.num_steps

    @property
    def groups(self) -> list[int]:
        """Query heads of a KV head, as far as layers have been seen."""
        return list(self._works)

    def release(self) -> None:
        """Give up what is on the device (it comes back when needed)."""
        self._works.clear()

    def advance(self) -> None:
        """Every row moves one token on in its open node. Nothing is transferred."""
        self.num_steps += 1
        for made in self._works.values():
            made.advance()

    def keep(self, mask: np.ndarray) -> None:
        """Forget the rows whose segments ended. All rows must be growing ones.

        Args:
            mask: bool [N], rows that go on; they move up in order.
        """
        self._change(self.table.keep(mask), self.positions[mask], slots_too=False)

    def extend(self, slots: Mapping[int, np.ndarray]) -> None:
        """Append slots (int64 [n]) to the open nodes of some rows."""
        self._change(self.table.extend(slots), self.positions, slots_too=True)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        """See ``rollout.attention.base.Plan``."""
        from rollout.attention.triton_tree import attend

        groups = query.shape[1] // keys.shape[1]
        if groups not in self._works:
            self._works[groups] = self._load(groups)
        return attend(query, keys, values, self._works[groups].work, variant)

    def _change(self, table: SpanTable, positions: np.ndarray, *, slots_too: bool) -> None:
        self._table, self._positions = table, positions
        self.num_steps = 0
        self.num_changes += 1
        for groups, made in self._works.items():
            self._works[groups] = self._load(groups, made, slots_too)

    def _load(
        self, groups: int, made: DeviceWork | None = None, slots_too: bool = True
    ) -> DeviceWork:
        """The work on the device, in ``made`` if that holds it."""
        table, positions = self.table, self.positions
        work = work_list(table, positions, groups)
        needed = Capacity.of(table, work)
        fits = made is not None and made.capacity.holds(needed)
        into = made if made is not None and fits else DeviceWork(needed, self.device)
        into.load(table, work, positions, slots_too=slots_too or not fits)
        return into


def _section_sizes(capacity: Capacity) -> dict[str, int]:
    """Elements of each part of the buffer; the slots, which stay longest, come last."""
    return {
        "small": capacity.small * len(ITEM),
        "large": capacity.large * len(ITEM),
        "row_start": capacity.rows + 1,
        "order": capacity.partials,
        "positions": capacity.rows,
        "lengths": capacity.spans,
        "steps": capacity.spans,
        "own_span": capacity.rows,
        "offsets": capacity.spans,
        "capacities": capacity.spans,
        "slots": capacity.slots,
    }


def _results(items: int, tile: int, groups: int) -> int:
    """Most query rows that ``items`` tiles can have between them."""
    return items * max(1, -(-tile // groups))


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    padded = np.full(size, _NO_SPAN, np.int64)
    padded[: len(array)] = array
    return padded


def _round_up(number: int) -> int:
    return 1 << (number - 1).bit_length() if number else 0
