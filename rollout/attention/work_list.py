"""The work list of the tree kernels: which keys, which rows, and which results belong together.

A span's keys are cut where their depth is a multiple of a constant, so that a fork or a split of a
node moves no border but its own; and its rows, each with the query heads of one KV head, are cut
into tiles. All is arrays over spans: no Python per span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout.attention.spans import Span

# Columns of an item: keys ``low .. high - 1`` of span ``span``, whose slots begin at ``offset`` of
# the slot list and whose first key has depth ``start``; the tile begins with number ``first`` of
# the ``num_rows * groups`` stacked rows, which begin at query row ``row``; the result of query row
# ``row + r`` is partial result ``base + r``. An item of span -1 is padding.
ITEM = ("span", "low", "high", "first", "base", "offset", "start", "row", "num_rows")

SMALL_TILE = 16  # stacked rows of a tile where few rows see a span: the least a tensor core takes
LARGE_TILE = 64
SMALL_ROWS = 32  # up to so many stacked rows go into small tiles
KEYS = 256  # keys of an item: many, so that few results are merged; few, so that all cores work
# Where so many rows see a span (or are a block of it, of many) they alone make work for all cores;
# then longer items save memory.
MANY_ROWS = 128
MANY_CAUSAL_ROWS = 16
MANY_ROWS_KEYS = 2048


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpanTable:
    """Spans as arrays; see ``rollout.attention.spans.Span``.

    Attributes:
        slots: int64 [L], slots of all spans one after another, reserved ones included.
        offset: int64 [S], where a span's slots begin.
        capacity: int64 [S], how many slots it has.
        length, start, row, num_rows: int64 [S].
        causal, grows: bool [S].
    """

    slots: np.ndarray
    offset: np.ndarray
    capacity: np.ndarray
    length: np.ndarray
    start: np.ndarray
    row: np.ndarray
    num_rows: np.ndarray
    causal: np.ndarray
    grows: np.ndarray

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanTable:
        capacity = np.array([len(span.slots) for span in spans], np.int64)
        fields = np.array([(s.length, s.start, s.row, s.num_rows) for s in spans], np.int64)
        length, start, row, num_rows = fields.reshape(-1, 4).T
        return cls(
            slots=np.concatenate([span.slots for span in spans]),
            offset=np.cumsum(capacity) - capacity,
            capacity=capacity,
            length=length,
            start=start,
            row=row,
            num_rows=num_rows,
            causal=np.array([span.causal for span in spans], bool),
            grows=np.array([span.grows for span in spans], bool),
        )

    def keep(self, mask: np.ndarray) -> SpanTable:
        """For the rows of ``mask`` (bool [N]), which move up in order; the slot list stays."""
        before = np.concatenate([[0], np.cumsum(mask)])  # kept rows before each row
        row = before[self.row]
        num_rows = before[self.row + self.num_rows] - row
        seen = num_rows > 0
        return SpanTable(
            slots=self.slots,
            offset=self.offset[seen],
            capacity=self.capacity[seen],
            length=self.length[seen],
            start=self.start[seen],
            row=row[seen],
            num_rows=num_rows[seen],
            causal=self.causal[seen],
            grows=self.grows[seen],
        )

    def advance(self, steps: int) -> SpanTable:
        """``steps`` more keys for every span that grows."""
        return replace(self, length=self.length + steps * self.grows)

    def extend(self, slots: Mapping[int, np.ndarray]) -> SpanTable:
        """With more slots behind those of the growing spans of some rows; the slot list is made
        anew.
        """
        owners = self.own_spans(int((self.row + self.num_rows).max()))
        span = owners[list(slots)]
        index, number = _repeat(self.capacity)
        pieces = self.slots[self.offset[index] + number]  # without those of spans that are gone
        counts = np.array([len(more) for more in slots.values()], np.int64)
        behind = np.cumsum(self.capacity)[span]
        capacity = self.capacity.copy()
        capacity[span] += counts
        more = np.concatenate(list(slots.values()))
        return replace(
            self,
            slots=np.insert(pieces, np.repeat(behind, counts), more),
            offset=np.cumsum(capacity) - capacity,
            capacity=capacity,
        )

    def own_spans(self, num_rows: int) -> np.ndarray:
        """int64 [num_rows]: the span that each row's open node is; -1 where there is none."""
        own = np.full(num_rows, -1, np.int64)
        own[self.row[self.grows]] = np.flatnonzero(self.grows)
        return own


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkList:
    """What the kernels do.

    Attributes:
        small, large: int64 [W, len(ITEM)], items for the two tile sizes.
        row_start: int64 [N + 1]; row n's partial results are ``order[row_start[n] :
            row_start[n + 1]]``.
        order: int64, numbers of partial results.
        num_partials: number of partial results, unused ones included.
    """

    small: np.ndarray
    large: np.ndarray
    row_start: np.ndarray
    order: np.ndarray
    num_partials: int


def work_list(table: SpanTable, positions: np.ndarray, groups: int) -> WorkList:
    """The work for query rows at ``positions`` [N] with ``groups`` query heads a KV head.

    It stays right while growing spans grow up to their capacity.
    """
    span, low, high = _key_runs(table)
    run_rows = table.num_rows[span]
    base = np.cumsum(run_rows) - run_rows
    stacked = run_rows * groups
    is_small = stacked <= SMALL_ROWS
    tile = np.where(is_small, SMALL_TILE, LARGE_TILE)
    run, number = _repeat(-(-stacked // tile))
    first = number * tile[run]
    owner = span[run]
    # A causal span's rows ascend in depth, so a tile whose last row is before the run sees none of
    # it. A growing span's row gets there later.
    last = (np.minimum(first + tile[run], stacked[run]) - 1) // groups
    begins = table.start[owner] + low[run]
    sees = table.grows[owner] | (positions[table.row[owner] + last] >= begins)
    columns = (
        owner,
        low[run],
        high[run],
        first,
        base[run],
        table.offset[owner],
        table.start[owner],
        table.row[owner],
        table.num_rows[owner],
    )
    items = np.stack(columns, axis=1)
    row_start, order = _merge_order(table, span, low, base, positions)
    return WorkList(
        small=items[sees & is_small[run]],
        large=items[sees & ~is_small[run]],
        row_start=row_start,
        order=order,
        num_partials=int(run_rows.sum()),
    )


def _key_runs(table: SpanTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(span, low, high): each span's keys cut where the depth is a multiple of a constant."""
    many = np.where(table.causal, MANY_CAUSAL_ROWS, MANY_ROWS)
    size = np.where(table.num_rows < many, KEYS, MANY_ROWS_KEYS)
    first = table.start // size
    last = (table.start + table.capacity - 1) // size
    span, number = _repeat(last - first + 1)
    border = (first[span] + number) * size[span] - table.start[span]
    low = np.maximum(border, 0)
    high = np.minimum(border + size[span], table.capacity[span])
    return span, low, high


def _merge_order(
    table: SpanTable, span: np.ndarray, low: np.ndarray, base: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(row_start, order) of ``WorkList``: a row's partial results in the order of their depth."""
    run, number = _repeat(table.num_rows[span])
    owner = span[run]
    row = table.row[owner] + number
    begins = table.start[owner] + low[run]
    sees = table.grows[owner] | (positions[row] >= begins)
    row, begins, partial = row[sees], begins[sees], (base[run] + number)[sees]
    counts = np.bincount(row, minlength=len(positions))
    assert counts.min() > 0, "a query row sees no key"
    order = partial[np.lexsort((begins, row))]
    return np.concatenate([[0], np.cumsum(counts)]), order


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, number): each index ``counts[index]`` times, numbered from 0."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
