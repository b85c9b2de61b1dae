"""How each running request is sampled: its settings, its tokens' penalties and its random draws,
arranged for whole batches.
"""

from __future__ import annotations

import numpy as np
import torch

from rollout.extend import ExtendSpec
from rollout.penalties import NO_TOKEN, Repetition
from rollout.sampler import Group, SamplingParams, SamplingPlan
from rollout.truncation import Truncation
from treepo.base.keys import Purpose, to_signed, uniforms

_AHEAD = 64  # draws of a row computed at one time

# What a row needs beyond a temperature; rows that need the same are sampled together.
_GREEDY, _TRUNCATED, _BANNED, _PENALISED, _ENTROPY = 1, 2, 4, 8, 16
_TOP = 32  # times the number of top log-probs


class RowSampling:
    """Settings of the rows of a table."""

    def __init__(self, num_rows: int) -> None:
        self._needs = np.zeros(num_rows, np.int64)
        self._keys = np.zeros(num_rows, np.int64)
        self._temperature = np.zeros(num_rows)
        self._top_p = np.zeros(num_rows)
        self._top_k = np.zeros(num_rows, np.int64)
        self._min_p = np.zeros(num_rows)
        self._penalty = np.zeros(num_rows)
        self._banned: dict[int, tuple[int, ...]] = {}
        # Which tokens stand in each row's path; rows whose paths are to be written into it.
        self._seen = torch.zeros(0, 0, dtype=torch.bool)
        self._new_paths: dict[int, np.ndarray] = {}
        # The draws at positions _first .. _first + _AHEAD - 1: they depend on nothing else.
        self._ahead = np.zeros((num_rows, _AHEAD))
        self._first = np.zeros(num_rows, np.int64)
        self._plan: tuple[np.ndarray, SamplingPlan] | None = None

    def set(self, row: int, spec: ExtendSpec, path_key: int, path: np.ndarray | None) -> None:
        """Settings of a request.

        Args:
            path: int32, all tokens before the next draw, if the spec has a repetition penalty.
        """
        truncated = spec.top_p < 1 or spec.top_k > 0 or spec.min_p > 0
        penalised = spec.repetition_penalty != 1
        is_greedy = spec.temperature == 0
        self._needs[row] = (
            _GREEDY * is_greedy
            + _TRUNCATED * (truncated and not is_greedy)
            + _BANNED * bool(spec.ban_token_ids)
            + _PENALISED * penalised
            + _ENTROPY * spec.wants_entropy
            + _TOP * spec.num_top_logprobs
        )
        self._keys[row] = to_signed(path_key)
        self._temperature[row] = spec.temperature
        self._top_p[row], self._top_k[row], self._min_p[row] = spec.top_p, spec.top_k, spec.min_p
        self._penalty[row] = spec.repetition_penalty
        self._banned[row] = spec.ban_token_ids
        if penalised:
            assert path is not None
            self._new_paths[row] = path
        self._first[row] = -_AHEAD  # none computed
        self._plan = None

    def plan(self, rows: np.ndarray, logits: torch.Tensor) -> SamplingPlan:
        """How to sample ``logits`` [N, V] of ``rows``; the last plan again for the same array."""
        if self._plan is None or self._plan[0] is not rows:
            self._write_paths(len(self._needs), logits)
            self._plan = rows, self._make_plan(rows, logits.device)
        return self._plan[1]

    def uniforms(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """float64 [N]: the draws at these positions."""
        column = positions - self._first[rows]
        stale = column >= _AHEAD
        if stale.any():
            some, first = rows[stale], positions[stale]
            keys = torch.from_numpy(self._keys[some]).unsqueeze(1).expand(-1, _AHEAD)
            wanted = torch.from_numpy(first[:, None] + np.arange(_AHEAD))
            self._ahead[some] = uniforms(keys, wanted, Purpose.TOKEN).numpy()
            self._first[some] = first
            column[stale] = 0
        return self._ahead[rows, column]

    def _make_plan(self, rows: np.ndarray, device: torch.device) -> SamplingPlan:
        kinds = np.unique(self._needs[rows])
        if len(kinds) == 1:
            return SamplingPlan(groups=(Group(params=self._params(rows, device)),))
        members = [np.flatnonzero(self._needs[rows] == kind) for kind in kinds]
        return SamplingPlan(
            groups=tuple(
                Group(
                    rows=torch.from_numpy(those).to(device),
                    params=self._params(rows[those], device),
                )
                for those in members
            ),
            order=torch.from_numpy(np.argsort(np.concatenate(members))).to(device),
        )

    def _params(self, rows: np.ndarray, device: torch.device) -> SamplingParams:
        """Of rows that need the same."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        needs = int(self._needs[rows[0]])
        temperature, top_k = self._temperature[rows], self._top_k[rows]
        truncation = repetition = banned = None
        if needs & _TRUNCATED:
            truncation = Truncation(
                top_p=tensor(self._top_p[rows]),
                top_k=tensor(top_k),
                min_p=tensor(self._min_p[rows]),
                max_top_k=int(top_k.max()),
            )
        if needs & _PENALISED:
            repetition = Repetition(
                penalty=tensor(self._penalty[rows]), seen=self._seen, paths=tensor(rows)
            )
        if needs & _BANNED:
            banned = tensor(_padded([self._banned[row] for row in rows.tolist()]))
        return SamplingParams(
            temperature=tensor(temperature),
            is_scaled=bool((temperature != 1).any()) and not needs & _GREEDY,
            greedy="all" if needs & _GREEDY else "none",
            truncation=truncation,
            banned=banned,
            repetition=repetition,
            wants_entropy=bool(needs & _ENTROPY),
            num_top_logprobs=needs // _TOP,
        )

    def _write_paths(self, num_rows: int, logits: torch.Tensor) -> None:
        """Note the tokens of new paths; from here on each draw notes its own."""
        if not self._new_paths:
            return
        shape = (num_rows, logits.shape[1])
        if self._seen.shape != shape or self._seen.device != logits.device:
            self._seen = torch.zeros(shape, dtype=torch.bool, device=logits.device)
        for row, path in self._new_paths.items():
            self._seen[row] = False
            self._seen[row, torch.from_numpy(path.astype(np.int64)).to(logits.device)] = True
        self._new_paths.clear()


def _padded(lists: list[tuple[int, ...]]) -> np.ndarray:
    """int64 [N, K]: a list a row, filled up with ``NO_TOKEN``."""
    table = np.full((len(lists), max(map(len, lists))), NO_TOKEN, np.int64)
    for row, numbers in enumerate(lists):
        table[row, : len(numbers)] = numbers
    return table
