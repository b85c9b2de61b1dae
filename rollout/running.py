"""The table of running requests: one row each, arrays over all rows, so that a step costs no Python
per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.extend import ExtendSpec, StopReason
from rollout.row_sampling import RowSampling
from rollout.row_stops import RowStops
from rollout.sampler import Draws, Workspace, sample_plan
from rollout.stops import StopRules

# What is recorded of each drawn token, by its name in ``Drawn`` and ``Draws``.
_ALWAYS = ("token_ids", "logprobs", "sampling_logprobs")


@dataclass(eq=False, slots=True)
class Drawn:
    """What one segment has drawn so far, arrays [n]; see ``rollout.extend.ExtendResult``."""

    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sampling_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    entropy: np.ndarray | None = None
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    stop_reason: StopReason | None = None

    @classmethod
    def nothing(cls, spec: ExtendSpec) -> Drawn:
        """An empty segment."""
        n = spec.num_top_logprobs
        return cls(
            entropy=np.zeros(0, np.float32) if spec.wants_entropy else None,
            top_token_ids=np.zeros((0, n), np.int32) if n else None,
            top_logprobs=np.zeros((0, n), np.float32) if n else None,
        )


class RunningTable:
    """State of the running requests.

    Attributes:
        start: int64 [rows], depth of the segment's first token.
        count: int64 [rows], tokens drawn.
        reserved: int64 [rows], slots the segment has.
    """

    def __init__(self, num_rows: int, rules: StopRules) -> None:
        self._free = list(range(num_rows))[::-1]
        self.start = np.zeros(num_rows, np.int64)
        self.count = np.zeros(num_rows, np.int64)
        self.reserved = np.zeros(num_rows, np.int64)
        self.max_tokens = np.zeros(num_rows, np.int64)
        self._sampling = RowSampling(num_rows)
        self._stops = RowStops(num_rows, rules)
        self._workspace = Workspace()
        self._specs: list[ExtendSpec | None] = [None] * num_rows
        self._slots = np.zeros((num_rows, 64), np.int64)
        # [rows, width] each, and [rows, width, n] for the likeliest tokens of those that ask
        self._columns: dict[str, np.ndarray] = {
            "token_ids": np.zeros((num_rows, 64), np.int32),
            "logprobs": np.zeros((num_rows, 64), np.float32),
            "sampling_logprobs": np.zeros((num_rows, 64), np.float32),
        }

    def add(
        self,
        start: int,
        spec: ExtendSpec,
        path_key: int,
        drawn: Drawn,
        path: np.ndarray | None = None,
    ) -> int:
        """Take a row for a request that has drawn ``drawn`` already; returns its number.

        Args:
            path: int32 [start], the tokens above the segment; needed if ``spec.reads_path``.
        """
        row = self._free.pop()
        n = len(drawn.token_ids)
        self._specs[row] = spec
        self.start[row] = start
        self.count[row] = n
        self.reserved[row] = 0
        self.max_tokens[row] = spec.max_tokens
        above = np.zeros(0, np.int32)
        if spec.reads_path:
            assert path is not None and len(path) == start
            above = path[start - min(start, spec.num_response_tokens) :]
            path = np.concatenate([path, drawn.token_ids])
        self._sampling.set(row, spec, path_key, path)
        self._stops.set(row, spec, above, drawn.token_ids)
        self._ensure_columns(spec)
        self._ensure_width(n + 1)
        for name in self._columns_of(spec) if n else ():
            self._columns[name][row, :n] = _like(self._columns[name], getattr(drawn, name))
        return row

    def remove(self, row: int) -> Drawn:
        """Give a row back; returns what it has drawn."""
        n, spec = int(self.count[row]), self._specs[row]
        assert spec is not None
        self._specs[row] = None
        self._free.append(row)
        columns = {name: self._columns[name][row, :n].copy() for name in self._columns_of(spec)}
        for name in ("top_token_ids", "top_logprobs"):
            if name in columns:
                columns[name] = columns[name][:, : spec.num_top_logprobs].copy()
        return Drawn(**columns, stop_reason=self._stops.remove(row, columns["token_ids"]))

    def add_slots(self, row: int, slots: np.ndarray) -> None:
        """Record further slots of the row's segment."""
        lo = int(self.reserved[row])
        self._ensure_width(lo + len(slots))
        self._slots[row, lo : lo + len(slots)] = slots
        self.reserved[row] = lo + len(slots)

    def token_ids(self, row: int, start: int) -> np.ndarray:
        """int32: drawn tokens from number ``start`` on."""
        return self._columns["token_ids"][row, start : self.count[row]]

    def last_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token ids, positions, slots) of each row's last drawn token."""
        last = self.count[rows] - 1
        token_ids = self._columns["token_ids"][rows, last]
        return token_ids, self.start[rows] + last, self._slots[rows, last]

    def draw(self, rows: np.ndarray, logits: torch.Tensor) -> Draws:
        """One token for each of ``rows`` from its ``logits`` [N, V]; ``record`` reads it.

        Nothing here waits for the logits. An unchanged batch is best given by the same array.
        """
        plan = self._sampling.plan(rows, logits)
        uniform = self._sampling.uniforms(rows, self.start[rows] + self.count[rows])
        uniforms = torch.from_numpy(uniform).to(logits.device, non_blocking=True)
        return sample_plan(logits, plan, uniforms, self._workspace)

    def record(self, rows: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Append one drawn token a row.

        Returns:
            bool [N] each: a stop was completed; max_tokens are reached.

        Raises:
            ValueError: a row's logits were not finite.
        """
        host = draws.to_host()
        if not host.is_finite.all():
            raise ValueError(
                "the model gave logits that are not finite: its weights are broken, or "
                "ban_token_ids bans every token that it can give"
            )
        count = self.count[rows]
        self._ensure_width(int(count.max()) + 1)
        for name, column in self._columns.items():
            drawn = getattr(host, name)
            if drawn is not None:
                column[rows, count] = _like(column, drawn)
        self.count[rows] = count + 1
        stopped = self._stops.completed(rows, host.token_ids, lambda row: self.token_ids(row, 0))
        return stopped, count + 1 >= self.max_tokens[rows]

    def _columns_of(self, spec: ExtendSpec) -> list[str]:
        names = [*_ALWAYS]
        names += ["entropy"] if spec.wants_entropy else []
        return names + (["top_token_ids", "top_logprobs"] if spec.num_top_logprobs else [])

    def _ensure_columns(self, spec: ExtendSpec) -> None:
        """Have the columns that a request asks for."""
        rows, width = self._slots.shape
        if spec.wants_entropy and "entropy" not in self._columns:
            self._columns["entropy"] = np.zeros((rows, width), np.float32)
        for name, dtype in (("top_token_ids", np.int32), ("top_logprobs", np.float32)):
            if spec.num_top_logprobs:
                old = self._columns.get(name, np.zeros((rows, width, 0), dtype))
                if old.shape[2] < spec.num_top_logprobs:
                    new = np.zeros((rows, width, spec.num_top_logprobs), dtype)
                    new[:, :, : old.shape[2]] = old
                    self._columns[name] = new

    def _ensure_width(self, width: int) -> None:
        if width <= self._slots.shape[1]:
            return
        width = 1 << (width - 1).bit_length()
        self._slots = _wider(self._slots, width)
        self._columns = {name: _wider(column, width) for name, column in self._columns.items()}


def _wider(array: np.ndarray, width: int) -> np.ndarray:
    wide = np.zeros((len(array), width, *array.shape[2:]), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide


def _like(column: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """``drawn`` [N] or [N, n], filled up to the column's last dimension."""
    missing = column.shape[2:][-1] - drawn.shape[1] if drawn.ndim == 2 else 0
    return np.pad(drawn, ((0, 0), (0, missing))) if missing else drawn
