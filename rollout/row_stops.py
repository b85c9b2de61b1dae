"""What ends each running request besides its length, for whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rollout.extend import ExtendSpec, StopReason
from rollout.stops import Matcher, StopRules

_NO_STOP = -1


@dataclass(frozen=True, slots=True, eq=False)
class _Users:
    """The rows that look for one set of stops: which they are, bool [rows], and their states."""

    is_user: np.ndarray
    states: np.ndarray


class RowStops:
    """Stops of the rows of a table."""

    def __init__(self, num_rows: int, rules: StopRules) -> None:
        self._rules = rules
        self._token_ids = np.full((num_rows, 1), _NO_STOP, np.int64)
        self._users: dict[Matcher, _Users] = {}
        self._response_above: dict[int, np.ndarray] = {}  # of rows with matchers
        self._reasons: dict[int, StopReason] = {}

    def set(
        self, row: int, spec: ExtendSpec, response_above: np.ndarray, drawn: np.ndarray
    ) -> None:
        """Stops of a request.

        Args:
            response_above: int32, tokens of the response above the segment.
            drawn: int32, what it has drawn already.
        """
        width = len(spec.stop_token_ids)
        if width > self._token_ids.shape[1]:
            wide = np.full((len(self._token_ids), width), _NO_STOP, np.int64)
            wide[:, : self._token_ids.shape[1]] = self._token_ids
            self._token_ids = wide
        self._token_ids[row] = _NO_STOP
        self._token_ids[row, :width] = spec.stop_token_ids
        for matcher in self._rules.matchers(spec):
            if matcher not in self._users:
                rows = len(self._token_ids)
                self._users[matcher] = _Users(np.zeros(rows, bool), np.zeros(rows, np.int64))
            users = self._users[matcher]
            users.is_user[row] = True
            users.states[row] = matcher.start(np.concatenate([response_above, drawn]))
            self._response_above[row] = response_above

    def remove(self, row: int, token_ids: np.ndarray) -> StopReason | None:
        """Forget a request that has drawn ``token_ids``; returns the stop that ended it."""
        if row in self._response_above:
            del self._response_above[row]
            for matcher, users in list(self._users.items()):
                users.is_user[row] = False
                if not users.is_user.any():
                    del self._users[matcher]
        if row in self._reasons:
            return self._reasons.pop(row)
        last = int(token_ids[-1]) if len(token_ids) else _NO_STOP
        return last if last != _NO_STOP and last in self._token_ids[row] else None

    def completed(
        self, rows: np.ndarray, token_ids: np.ndarray, drawn: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        """bool [N]: whether the token just drawn completes a stop.

        Args:
            token_ids: int64 [N], one for each of ``rows``.
            drawn: a row's tokens so far, this one included.
        """
        stopped = (self._token_ids[rows] == token_ids[:, None]).any(axis=1)
        for matcher, users in self._users.items():
            at = np.flatnonzero(users.is_user[rows])
            if not len(at):
                continue
            states, maybe = matcher.advance(users.states[rows[at]], token_ids[at])
            users.states[rows[at]] = states
            for i in at[maybe & ~stopped[at]].tolist():
                row = int(rows[i])
                response = np.concatenate([self._response_above[row], drawn(row)])
                reason = matcher.found(response)
                if reason is not None:
                    stopped[i] = True
                    self._reasons[row] = reason
        return stopped
