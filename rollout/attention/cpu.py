"""Per-node attention: the query rows that share a run of keys are rows of one fused product over
it, and partial results merge by log-sum-exp.

Spans of like shape go into one call. What does not depend on the layer (indices, masks, the merge
table) is computed once a forward; while the same segments grow token by token it is kept and only
advanced. Keys are read in place where the spans of a call lie evenly spaced in the pool, gathered
by slot otherwise.

On a CPU the product is torch's fused kernel, which also returns the log-sum-exp. It refuses Dv !=
Dk and has no soft cap: these, and other devices, take ``plain_product``. (Other traps: it dies on
empty keys, so there are no empty spans; a row without a visible key gets log-sum-exp 0, so such
rows are told apart here; the mask must have the query's dtype.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rollout.attention.base import LayerVariant
from rollout.attention.merge import MergeTable, merge_partials
from rollout.attention.spans import Span, is_run

_VIEW_BYTES = 1 << 18  # a span of more bytes is worth a call of its own if that saves its copy
_MAX_MASK = 1 << 23  # elements of one call's mask


@dataclass(slots=True, eq=False)
class SpanBatch:
    """Spans of one fused call: B of them, padded to R rows and L keys.

    Attributes:
        rows: int64 [B * R] query rows, or None where they are ``row_start`` and the next B * R.
        slots: int64 [B, capacity] of the keys, or None where they are read in place: span b starts
            at slot ``view_start + b * view_step``.
        lengths: int64 [B], keys of each span.
        hidden: bool [B, R or 1, L], keys a row must not see; None if all see all.
        dead: bool [B, R], rows that see no key at all.
        grows: each step adds one key to every span.
    """

    size: int
    num_rows: int
    length: int
    rows: torch.Tensor | None
    row_start: int
    slots: torch.Tensor | None
    view_start: int
    view_step: int
    lengths: torch.Tensor
    uniform: bool
    hidden: torch.Tensor | None = None
    dead: torch.Tensor | None = None
    grows: bool = False
    _masks: dict[tuple[torch.dtype, int], torch.Tensor] = field(default_factory=dict)
    _gather: torch.Tensor | None = None

    def advance(self) -> None:
        """One more key for every span of a growing batch."""
        self.length += 1
        self.lengths += 1
        self._masks.clear()
        self._gather = None
        if not self.uniform:
            self.hidden = _beyond(self.lengths, self.length)

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """[N, Hkv, G, D] to [B, Hkv, R * G, D]."""
        if self.rows is None:
            chosen = query[self.row_start : self.row_start + self.size * self.num_rows]
        else:
            chosen = query.index_select(0, self.rows)
        if self.num_rows == 1:
            return chosen
        kv_heads, groups, width = query.shape[1:]
        chosen = chosen.view(self.size, self.num_rows, kv_heads, groups, width).transpose(1, 2)
        return chosen.reshape(self.size, kv_heads, self.num_rows * groups, width)

    def pick(self, pool: torch.Tensor) -> torch.Tensor:
        """[slots, Hkv, D] to [B, Hkv, L, D], a view where possible."""
        if self.slots is None:
            step, head, width = pool.stride()
            picked = pool.as_strided(
                (self.size, self.length, *pool.shape[1:]),
                (self.view_step * step, step, head, width),
                pool.storage_offset() + self.view_start * step,
            )
        else:
            if self._gather is None:
                self._gather = self.slots[:, : self.length].reshape(-1)
            by_head = pool.transpose(0, 1)
            if by_head.is_contiguous():  # as pools on a CPU are
                picked = by_head.index_select(1, self._gather)
                return picked.view(-1, self.size, self.length, pool.shape[2]).transpose(0, 1)
            picked = pool.index_select(0, self._gather)
            picked = picked.view(self.size, self.length, *pool.shape[1:])
        return picked.transpose(1, 2)

    def mask(self, dtype: torch.dtype, groups: int) -> torch.Tensor | None:
        """Additive mask [B, 1, R * G or 1, L] or None."""
        if self.hidden is None:
            return None
        if (dtype, groups) not in self._masks:
            hidden = self.hidden
            if hidden.shape[1] > 1 and groups > 1:
                hidden = hidden.repeat_interleave(groups, dim=1)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[dtype, groups] = mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)
        return self._masks[dtype, groups]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results of all B * R rows: ([B * R, H, Dv], log-sum-exp [B * R, H])."""
        kv_heads, groups = query.shape[1:3]
        args = (
            self.queries(query),
            self.pick(keys),
            self.pick(values),
            self.mask(query.dtype, groups),
        )
        if query.device.type == "cpu" and variant.softcap is None and keys.shape == values.shape:
            out, lse = fused_product(*args, variant.scaling)
        else:
            out, lse = plain_product(*args, variant.scaling, variant.softcap)
        count, heads = self.size * self.num_rows, kv_heads * groups
        if self.num_rows > 1:
            shape = (self.size, kv_heads, self.num_rows, groups)
            out = out.reshape(*shape, -1).transpose(1, 2)
            lse = lse.reshape(shape).transpose(1, 2)
        out, lse = out.reshape(count, heads, -1), lse.reshape(count, heads)
        if self.dead is not None:
            lse = lse.masked_fill(self.dead.view(-1, 1), float("-inf"))
        return out, lse


def fused_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's fused CPU attention. ``query [B, H, Q, D]``, ``key, value [B, H, L, D]``, ``mask``
    additive; returns (output [B, H, Q, D], log-sum-exp [B, H, Q])."""
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scaling
    )


def plain_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain operations, with Dv != Dk and a soft cap, on any device."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.matmul(weights, value.to(wide)).to(query.dtype), lse


@dataclass(slots=True, eq=False)
class _Growing:
    """The spans whose one row is the last token of an open node, as arrays over them.

    Attributes:
        slots: int64 [B, capacity], padded with the trash slot.
        is_run: bool [B], whether a span's slots, reserved ones too, are consecutive.
        capacity, lengths, starts, rows: int64 [B]; see ``Span``.
    """

    slots: np.ndarray
    is_run: np.ndarray
    capacity: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, spans: Sequence[Span], trash_slot: int) -> _Growing:
        slots = _slot_table(spans, trash_slot)
        capacity = np.array([len(span.slots) for span in spans], np.int64)
        offsets = np.arange(1, slots.shape[1])
        consecutive = (np.diff(slots, axis=1) == 1) | (offsets >= capacity[:, None])
        return cls(
            slots=slots,
            is_run=consecutive.all(axis=1),
            capacity=capacity,
            lengths=np.array([span.length for span in spans], np.int64),
            starts=np.array([span.start for span in spans], np.int64),
            rows=np.array([span.row for span in spans], np.int64),
        )

    def take(self, index: np.ndarray) -> _Growing:
        """Some of them, by index or mask."""
        return _Growing(
            self.slots[index],
            self.is_run[index],
            self.capacity[index],
            self.lengths[index],
            self.starts[index],
            self.rows[index],
        )

    def spans(self) -> list[Span]:
        return [
            Span(slots[:n], int(n), int(start), int(row), 1, causal=True)
            for slots, n, start, row in zip(
                self.slots, self.lengths, self.starts, self.rows, strict=True
            )
        ]


class NodePlan:
    """The plan of one forward, or of many while segments grow and end.

    Args:
        spans: see ``rollout.attention.spans``.
        positions: int64 [N], depth of each query row.
        num_slots: size of the pool; slot ``num_slots`` takes padding.
        slot_bytes: bytes of one slot in one layer (0 if unknown yet).
    """

    def __init__(
        self,
        spans: Sequence[Span],
        positions: np.ndarray,
        *,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
    ) -> None:
        self.positions = positions
        self.num_slots = num_slots
        self.view_length = max(64, _VIEW_BYTES // slot_bytes) if slot_bytes else num_slots
        self.device = device
        self._shared = [span for span in spans if not span.grows]
        self._growing = _Growing.of([span for span in spans if span.grows], num_slots)
        self._prepare()

    def advance(self) -> None:
        """Every row moves one token on in its open node."""
        self._growing.lengths += 1
        for batch in self._full[0]:
            if batch.grows:
                batch.advance()
        self.positions = self.positions + 1
        self._max_position += 1
        self._windowed.clear()

    def keep(self, mask: np.ndarray) -> None:
        """Forget the rows whose segments ended. All rows must be growing ones.

        Args:
            mask: bool [N], rows that go on; they move up in order.
        """
        before = np.concatenate([[0], np.cumsum(mask)])  # kept rows before each row
        shared = []
        for span in self._shared:
            row, end = int(before[span.row]), int(before[span.row + span.num_rows])
            if end > row:
                shared.append(replace(span, row=row, num_rows=end - row))
        self._shared = shared
        self._growing = self._growing.take(mask[self._growing.rows])
        self._growing.rows = before[self._growing.rows]
        self.positions = self.positions[mask]
        self._prepare()

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, variant: LayerVariant
    ) -> torch.Tensor:
        """See ``rollout.attention.base.Plan``."""
        batches, table = self._full
        if variant.window is not None and self._max_position >= variant.window:
            batches, table = self._in_window(variant.window)
        num_rows, heads, width = query.shape
        kv_heads = keys.shape[1]
        grouped = query.reshape(num_rows, kv_heads, heads // kv_heads, width)
        partials = [batch.attend(grouped, keys, values, variant) for batch in batches]
        outputs, lses = zip(*partials, strict=True)
        return merge_partials(outputs, lses, table, variant.sinks)

    def _prepare(self) -> None:
        made = self._batch(self._shared, None) + self._batch_growing()
        self._full = [batch for batch, _ in made], self._table(made)
        self._windowed: dict[int, tuple[list[SpanBatch], MergeTable]] = {}
        self._max_position = int(self.positions.max())

    def _in_window(self, window: int) -> tuple[list[SpanBatch], MergeTable]:
        if window not in self._windowed:
            trimmed = [self._trim(span, window) for span in self._shared + self._growing.spans()]
            made = self._batch([span for span in trimmed if span is not None], window)
            self._windowed[window] = [batch for batch, _ in made], self._table(made)
        return self._windowed[window]

    def _table(self, made: list[tuple[SpanBatch, np.ndarray]]) -> MergeTable:
        owners = np.concatenate([rows for _, rows in made])
        return MergeTable(owners, len(self.positions), self.device)

    def _trim(self, span: Span, window: int) -> Span | None:
        """Without the keys that are out of every row's window."""
        rows = self.positions[span.row : span.row + span.num_rows]
        drop = int(rows.min()) - window + 1 - span.start
        if drop <= 0:
            return span
        if drop >= span.length:
            return None
        return replace(
            span,
            slots=span.slots[drop : span.length],
            length=span.length - drop,
            start=span.start + drop,
        )

    def _batch(
        self, spans: Sequence[Span], window: int | None
    ) -> list[tuple[SpanBatch, np.ndarray]]:
        """Batches of spans of like shape, each with the rows of its partial results (-1: none)."""
        buckets: dict[tuple[int, ...], list[Span]] = {}
        for i, span in enumerate(spans):
            # Few rows cost about as much as one: coarse buckets make fewer calls.
            rows = _round_up(span.num_rows if span.causal else max(8, span.num_rows))
            length = _round_up(max(16, span.length))
            alone = span.length >= self.view_length and is_run(span.slots)
            masked = span.causal and span.num_rows > 1
            buckets.setdefault((rows, length, masked, i if alone else -1), []).append(span)
        made = []
        for (rows, length, *_), members in buckets.items():
            most = max(1, _MAX_MASK // (rows * length))
            members.sort(key=lambda span: int(span.slots[0]))
            for lo in range(0, len(members), most):
                made.append(self._make(members[lo : lo + most], window))
        return made

    def _batch_growing(self) -> list[tuple[SpanBatch, np.ndarray]]:
        """The same for the growing spans."""
        if not len(self._growing.rows):
            return []
        buckets = np.ceil(np.log2(np.maximum(16, self._growing.lengths)))
        return [
            self._make_growing(np.flatnonzero(buckets == bucket)) for bucket in np.unique(buckets)
        ]

    def _make_growing(self, index: np.ndarray) -> tuple[SpanBatch, np.ndarray]:
        spans = self._growing.take(index[np.argsort(self._growing.slots[index, 0])])
        length = int(spans.lengths.max())
        capacity = int(spans.capacity.max())
        view = self._evenly_spaced(spans.slots[:, 0], spans.is_run, capacity)
        in_order = np.array_equal(spans.rows, np.arange(spans.rows[0], spans.rows[-1] + 1))
        batch = SpanBatch(
            size=len(index),
            num_rows=1,
            length=length,
            rows=None if in_order else self._tensor(spans.rows),
            row_start=int(spans.rows[0]),
            slots=None if view else self._tensor(spans.slots[:, :capacity]),
            view_start=view[0] if view else 0,
            view_step=view[1] if view else 0,
            lengths=self._tensor(spans.lengths),
            uniform=bool((spans.lengths == length).all()),
            grows=True,
        )
        if not batch.uniform:
            batch.hidden = _beyond(batch.lengths, length)
        return batch, spans.rows

    def _make(self, spans: list[Span], window: int | None) -> tuple[SpanBatch, np.ndarray]:
        counts = np.array([span.num_rows for span in spans])
        lengths = np.array([span.length for span in spans])
        firsts = np.array([span.row for span in spans])
        num_rows, length = int(counts.max()), int(lengths.max())
        real = np.arange(num_rows) < counts[:, None]  # [B, R]
        rows = np.where(real, firsts[:, None] + np.arange(num_rows), firsts[:, None])
        flat = rows.reshape(-1)
        in_order = np.array_equal(flat, np.arange(flat[0], flat[0] + len(flat)))
        view = self._evenly_spaced(
            np.array([span.slots[0] for span in spans]),
            np.array([is_run(span.slots) for span in spans]),
            length,
        )
        batch = SpanBatch(
            size=len(spans),
            num_rows=num_rows,
            length=length,
            rows=None if in_order else self._tensor(flat),
            row_start=int(flat[0]),
            slots=None if view else self._tensor(_slot_table(spans, self.num_slots)),
            view_start=view[0] if view else 0,
            view_step=view[1] if view else 0,
            lengths=self._tensor(lengths),
            uniform=bool((lengths == length).all()),
        )
        if window is not None or (spans[0].causal and num_rows > 1):
            hidden = self._hidden(spans, rows, real, lengths, window)
            batch.hidden = self._tensor(hidden) if bool(hidden.any()) else None
            dead = np.asarray(hidden.all(axis=-1))
            if dead.any():
                batch.dead = self._tensor(dead)
                assert batch.hidden is not None
                batch.hidden &= ~batch.dead.unsqueeze(-1)  # the kernel wants some key in each row
        elif not batch.uniform:
            batch.hidden = _beyond(batch.lengths, length)
        return batch, np.where(real, rows, -1).reshape(-1)

    def _hidden(
        self,
        spans: list[Span],
        rows: np.ndarray,
        real: np.ndarray,
        lengths: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        """bool [B, R, L]: keys beyond the span, after the row, or out of its window."""
        starts = np.array([span.start for span in spans])
        positions = self.positions[rows]  # [B, R]
        offsets = np.arange(int(lengths.max()))
        hidden: np.ndarray = np.broadcast_to(
            (offsets >= lengths[:, None])[:, None, :], (*rows.shape, len(offsets))
        )
        depths = (starts[:, None] + offsets)[:, None, :]  # [B, 1, L]
        if spans[0].causal:
            hidden = hidden | (depths > positions[:, :, None])
        if window is not None:
            hidden = hidden | (depths <= positions[:, :, None] - window)
        return hidden & real[:, :, None]

    def _evenly_spaced(
        self, firsts: np.ndarray, is_run: np.ndarray, length: int
    ) -> tuple[int, int] | None:
        """(first slot, step) where spans are runs that start evenly spaced and stay in the pool."""
        steps = np.diff(firsts)
        step = int(steps[0]) if len(steps) else 0
        if not is_run.all() or step < 0 or (steps != step).any():
            return None
        return (int(firsts[0]), step) if firsts[-1] + length <= self.num_slots + 1 else None

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def _beyond(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """bool [B, 1, L]: columns past each span's end."""
    columns = torch.arange(length, device=lengths.device)
    return (columns >= lengths.unsqueeze(1)).unsqueeze(1)


def _slot_table(spans: Sequence[Span], trash_slot: int) -> np.ndarray:
    """int64 [B, longest], padded with the trash slot."""
    width = max((len(span.slots) for span in spans), default=0)
    table = np.full((len(spans), width), trash_slot, np.int64)
    for line, span in zip(table, spans, strict=True):
        line[: len(span.slots)] = span.slots
    return table


def _round_up(number: int) -> int:
    return 1 << (number - 1).bit_length()
