"""Samplers and learners that share GPUs take turns: one side sleeps while the other works.

    turn         samplers                            learners
    SAMPLING     awake                               all memory given up
    LEARNING     all memory given up                 awake
    PUBLISHING   weights alone, which arrive         weights alone

A side that is called when it is not its turn is given the turn first. So whoever uses the cluster
need not know of turns, and the memory of both sides is never taken at once. Before an update the
samplers forget their weights, because others will be published; otherwise they keep a copy in host
memory.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

Call = Callable[..., list[int]]  # (method, *arguments) of every worker of a side -> answers

# What learners can do with their weights alone.
WITH_WEIGHTS_ALONE = ("score_paths", "digest", "publication", "send_weights")


class Turn(enum.Enum):
    """Whose memory is on the device; see the module."""

    SAMPLING = "sampling"
    LEARNING = "learning"
    PUBLISHING = "publishing"


class _State(enum.Enum):
    AWAKE = "awake"
    WEIGHTS = "weights alone"
    ASLEEP = "asleep"


class Turns:
    """Which side is awake.

    Args:
        samplers, learners: call ``sleep`` and ``wake`` of every worker of a side.
        samplers_sleep: they do already.
    """

    def __init__(self, samplers: Call, learners: Call, *, samplers_sleep: bool = False) -> None:
        self._call_samplers, self._call_learners = samplers, learners
        self._samplers = _State.ASLEEP if samplers_sleep else _State.AWAKE
        self._learners = _State.AWAKE
        self._num_bytes, self._seconds = 0, 0.0

    def take(self, turn: Turn, *, forget: bool = False) -> None:
        """Give the turn, which takes nothing where it has been given already.

        Args:
            forget: with LEARNING, the samplers' weights: they wait for a publication.
        """
        began = time.monotonic()
        if turn is Turn.SAMPLING:
            self._put_learners(_State.ASLEEP)
            self._wake_samplers()
        elif turn is Turn.LEARNING:
            self._put_samplers_to_sleep(forget)
            self._wake_learners()
        else:
            if self._samplers is not _State.WEIGHTS:
                self._put_samplers_to_sleep(forget=True)
            if self._learners is _State.ASLEEP:
                self._wake_learners()
            self._put_learners(_State.WEIGHTS)
            self._samplers = _State.WEIGHTS  # they arrive next
        self._seconds += time.monotonic() - began

    def take_for_learners(self, method: str) -> None:
        """The turn in which a method of the learners can be called, without haste: where their
        weights are enough and there, nothing is moved.
        """
        if method not in WITH_WEIGHTS_ALONE or self._learners is _State.ASLEEP:
            self.take(Turn.LEARNING)

    def metrics(self) -> dict[str, float]:
        """What moving cost since this was last asked."""
        found = {
            "timing_s/sleep": self._seconds,
            "perf/sleep_moved_gib": self._num_bytes / 2**30,
        }
        self._num_bytes, self._seconds = 0, 0.0
        return found

    def _put_samplers_to_sleep(self, forget: bool) -> None:
        if self._samplers is not _State.ASLEEP:
            self._num_bytes += sum(self._call_samplers("sleep", "drop" if forget else "host"))
            self._samplers = _State.ASLEEP

    def _wake_samplers(self) -> None:
        if self._samplers is not _State.AWAKE:
            self._num_bytes += sum(self._call_samplers("wake"))
            self._samplers = _State.AWAKE

    def _put_learners(self, state: _State) -> None:
        if self._learners is not state:
            self._num_bytes += sum(self._call_learners("sleep", state is _State.WEIGHTS))
            self._learners = state

    def _wake_learners(self) -> None:
        if self._learners is not _State.AWAKE:
            self._num_bytes += sum(self._call_learners("wake"))
            self._learners = _State.AWAKE
