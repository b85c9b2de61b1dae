"""The table of running requests: one row each, arrays over all rows, so that a step costs no Python
per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.extend import ExtendSpec
from rollout.sampler import Draws, SamplingParams
from treepo.base.keys import to_signed

_NO_STOP = -1


@dataclass(eq=False, slots=True)
class Drawn:
    """What one segment has drawn so far, arrays [n]."""

    token_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sampling_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class RunningTable:
    """State of the running requests.

    Attributes:
        start: int64 [rows], depth of the segment's first token.
        count: int64 [rows], tokens drawn.
        reserved: int64 [rows], slots the segment has.
    """

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows))[::-1]
        self.start = np.zeros(num_rows, np.int64)
        self.count = np.zeros(num_rows, np.int64)
        self.reserved = np.zeros(num_rows, np.int64)
        self.max_tokens = np.zeros(num_rows, np.int64)
        self._keys = np.zeros(num_rows, np.int64)
        self._temperature = np.zeros(num_rows)
        self._top_p = np.zeros(num_rows)
        self._top_k = np.zeros(num_rows, np.int64)
        self._min_p = np.zeros(num_rows)
        self._stops = np.full((num_rows, 1), _NO_STOP, np.int64)
        self._token_ids = np.zeros((num_rows, 64), np.int32)
        self._slots = np.zeros((num_rows, 64), np.int64)
        self._logprobs = np.zeros((num_rows, 64), np.float32)
        self._sampling_logprobs = np.zeros((num_rows, 64), np.float32)

    def add(self, start: int, spec: ExtendSpec, path_key: int, drawn: Drawn) -> int:
        """Take a row for a request that has drawn ``drawn`` already; returns its number."""
        row = self._free.pop()
        self.start[row] = start
        self.count[row] = len(drawn.token_ids)
        self.reserved[row] = 0
        self.max_tokens[row] = spec.max_tokens
        self._keys[row] = to_signed(path_key)
        self._temperature[row] = spec.temperature
        self._top_p[row] = spec.top_p
        self._top_k[row] = spec.top_k
        self._min_p[row] = spec.min_p
        if len(spec.stop_token_ids) > self._stops.shape[1]:
            self._stops = _wider(self._stops, len(spec.stop_token_ids), _NO_STOP)
        self._stops[row] = _NO_STOP
        self._stops[row, : len(spec.stop_token_ids)] = spec.stop_token_ids
        self._ensure_width(len(drawn.token_ids) + 1)
        n = len(drawn.token_ids)
        self._token_ids[row, :n] = drawn.token_ids
        self._logprobs[row, :n] = drawn.logprobs
        self._sampling_logprobs[row, :n] = drawn.sampling_logprobs
        return row

    def remove(self, row: int) -> Drawn:
        """Give a row back; returns what it has drawn."""
        n = int(self.count[row])
        self._free.append(row)
        return Drawn(
            self._token_ids[row, :n].copy(),
            self._logprobs[row, :n].copy(),
            self._sampling_logprobs[row, :n].copy(),
        )

    def add_slots(self, row: int, slots: np.ndarray) -> None:
        """Record further slots of the row's segment."""
        lo = int(self.reserved[row])
        self._ensure_width(lo + len(slots))
        self._slots[row, lo : lo + len(slots)] = slots
        self.reserved[row] = lo + len(slots)

    def token_ids(self, row: int, start: int) -> np.ndarray:
        """int32: drawn tokens from number ``start`` on."""
        return self._token_ids[row, start : self.count[row]]

    def last_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token ids, positions, slots) of each row's last drawn token."""
        last = self.count[rows] - 1
        return self._token_ids[rows, last], self.start[rows] + last, self._slots[rows, last]

    def sampling(
        self, rows: np.ndarray, device: torch.device
    ) -> tuple[SamplingParams, torch.Tensor, torch.Tensor]:
        """(settings, keys, positions) of each row's next draw."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        top_p, top_k, min_p = self._top_p[rows], self._top_k[rows], self._min_p[rows]
        params = SamplingParams(
            temperature=tensor(self._temperature[rows]),
            top_p=tensor(top_p),
            top_k=tensor(top_k),
            min_p=tensor(min_p),
            truncates=bool((top_p < 1).any() or top_k.any() or min_p.any()),
        )
        return params, tensor(self._keys[rows]), tensor(self.start[rows] + self.count[rows])

    def record(self, rows: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Append one drawn token a row.

        Returns:
            bool [N] each: a stop token was drawn; max_tokens are reached.
        """
        token_ids = draws.token_ids.cpu().numpy()
        count = self.count[rows]
        self._ensure_width(int(count.max()) + 1)
        self._token_ids[rows, count] = token_ids
        self._logprobs[rows, count] = draws.logprobs.cpu().numpy()
        self._sampling_logprobs[rows, count] = draws.sampling_logprobs.cpu().numpy()
        self.count[rows] = count + 1
        stopped = (self._stops[rows] == token_ids[:, None]).any(axis=1)
        return stopped, count + 1 >= self.max_tokens[rows]

    def _ensure_width(self, width: int) -> None:
        if width <= self._token_ids.shape[1]:
            return
        width = 1 << (width - 1).bit_length()
        self._token_ids = _wider(self._token_ids, width, 0)
        self._slots = _wider(self._slots, width, 0)
        self._logprobs = _wider(self._logprobs, width, 0)
        self._sampling_logprobs = _wider(self._sampling_logprobs, width, 0)


def _wider(array: np.ndarray, width: int, fill: int) -> np.ndarray:
    wide = np.full((len(array), width), fill, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
