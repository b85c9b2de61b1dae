"""How much of some workers' time passes idle."""

from __future__ import annotations

import time
from collections.abc import Callable


class IdleTime:
    """A stopwatch of several workers, idle at first.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle_since: list[float | None] = [clock()] * count
        self._idle, self._all_idle, self._all_seconds = 0.0, 0.0, 0.0
        self._began = clock()

    def begin(self, rank: int) -> None:
        """The worker works from now on, or goes on with it."""
        since = self._idle_since[rank]
        if since is not None:
            self._idle += self._clock() - since
        self._idle_since[rank] = None

    def end(self, rank: int) -> None:
        """The worker has nothing to do from now on."""
        if self._idle_since[rank] is None:
            self._idle_since[rank] = self._clock()

    def start(self) -> None:
        """Look at the time from now on."""
        self._began = self._clock()
        self._idle = 0.0
        self._idle_since = [s if s is None else self._began for s in self._idle_since]

    def share(self) -> float:
        """Of the workers' time since ``start``, that they were idle, in [0, 1]."""
        now = self._clock()
        idle = self._idle + sum(now - since for since in self._idle_since if since is not None)
        seconds = (now - self._began) * len(self._idle_since)
        self._all_idle += idle
        self._all_seconds += seconds
        self.start()
        return idle / seconds if seconds else 0.0

    def share_of_all(self) -> float:
        """Of all the times that ``share`` looked at."""
        return self._all_idle / self._all_seconds if self._all_seconds else 0.0
