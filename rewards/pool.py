"""Score responses in processes that can be killed.

Verifiers hang, crash and eat memory, and a time limit by ``signal.alarm`` works in a main thread
only and not against code that never returns to Python. So items are scored in worker processes,
each item under a time limit kept by this side; a worker that overruns it is killed and replaced,
the item's outcome is ``timeout``, and the rest of its chunk is scored elsewhere. Workers are forked
from a clean process, see :mod:`rewards.nursery`; the pool may be used from any thread, inside a Ray
actor, and whatever ``__main__`` is.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rewards import nursery
from rewards.channel import Channel
from rewards.records import ERROR, OUTCOMES, TIMEOUT, RewardItem, RewardResult
from rewards.registry import check_parts
from rewards.scorer import Scorer, failure
from rewards.settings import RewardSettings

_LARGEST_CHUNK = 64
_COALESCE_SECONDS = 0.001  # lets results gather, so that cheap items don't wake us one by one
_MOST_RESTARTS = 3  # of the nursery, in one call of score


@dataclass(eq=False, slots=True)
class _Worker:
    pid: int
    channel: Channel
    chunk: deque[int] = field(default_factory=deque)  # indices it has been given, first = running
    deadline: float = float("inf")
    has_scored: bool = False


class RewardPool:
    """Scores responses as the settings say. Use it as a context manager, or call :meth:`close`.

    Building it loads the verifiers, so that every user error shows here; with ``wait=False`` they
    load in the background, and errors show in :meth:`wait_until_ready` (or at the first score).

    Attributes:
        outcomes: how often each of ``rewards.records.OUTCOMES`` occurred so far.

    Raises:
        ValueError: an unknown part or option, or user code that does not fit.
        RuntimeError: user code raised while it was loaded, or took too long.
    """

    def __init__(self, settings: RewardSettings, *, wait: bool = True) -> None:
        check_parts(settings)
        self.settings = settings
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        self._process: Any = None
        self._control: Channel | None = None
        self._in_process = Scorer(settings) if settings.num_workers == 0 else None
        self._selector = selectors.DefaultSelector()
        self._ready = self._in_process is not None
        if not self._ready:
            self._start_nursery()
        if wait:
            self.wait_until_ready()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Return once the verifiers are loaded.

        Raises:
            ValueError: an option is wrong, or user code does not fit.
            RuntimeError: user code raised while it was loaded, or took too long.
        """
        with self._lock:
            self._await_nursery()

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Verdicts on ``items``, in their order. Failures are outcomes, not exceptions."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this RewardPool is closed")
            if self._in_process is not None:
                results = [self._in_process.score(item) for item in items]
            else:
                self._await_nursery()
                results = self._score_all(items)
        self.outcomes.update(result.outcome for result in results)
        return results

    def close(self) -> None:
        """End every process of the pool. May be called twice."""
        self._closed = True  # before the lock: makes a running score() stop at its next step
        with self._lock:
            self._stop_nursery()
            self._selector.close()

    # ------------------------------------------------------------------ scoring

    def _score_all(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        pickled = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        results: list[RewardResult | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        restarts = 0
        while waiting or any(worker.chunk for worker in self._workers):
            if self._closed:
                self._stop_nursery()
                raise RuntimeError("this RewardPool was closed while it scored")
            try:
                self._hand_out(waiting, pickled, results)
                self._collect(waiting, results)
            except (EOFError, ConnectionError) as error:  # the nursery is gone, its workers too
                restarts += 1
                if restarts > _MOST_RESTARTS:
                    raise RuntimeError(
                        f"the process that starts reward workers died {restarts} times; is the "
                        "machine out of memory?"
                    ) from error
                for worker in self._workers:
                    waiting.extendleft(reversed(worker.chunk))
                self._stop_nursery()
                self._start_nursery()
                self._await_nursery()
        return [result for result in results if result is not None]

    def _hand_out(
        self,
        waiting: deque[int],
        pickled: Sequence[bytes],
        results: list[RewardResult | None],
    ) -> None:
        """Give every idle worker a chunk. Chunks shrink towards the end, so that no worker is left
        with many items while others are idle.
        """
        num_wanted = min(self.settings.num_workers, len(waiting) + self._num_busy())
        while len(self._workers) < num_wanted:
            self._fork_worker()
        for worker in list(self._workers):
            if worker.chunk or not waiting:
                continue
            share = -(-len(waiting) // (2 * self.settings.num_workers))
            chunk = [waiting.popleft() for _ in range(min(share, _LARGEST_CHUNK))]
            worker.chunk.extend(chunk)
            try:
                worker.channel.send([(i, pickled[i]) for i in chunk], timeout=60)
            except OSError:  # it died before it read anything
                status = self._drop(worker, verb=b"K")
                if worker.has_scored:  # while idle: no item is to blame
                    waiting.extendleft(reversed(chunk))
                else:  # at its start; blaming an item keeps this from going on for ever
                    self._blame(worker, waiting, results, ERROR, _death(status))
            self._set_deadline(worker)

    def _collect(self, waiting: deque[int], results: list[RewardResult | None]) -> None:
        """Wait until something happens, then take results and replace what hangs or died."""
        busy = [worker for worker in self._workers if worker.chunk]
        if not busy:
            return
        wait = min(worker.deadline for worker in busy) - time.monotonic()
        ready = self._selector.select(min(max(wait, 0.0), 1.0))
        time.sleep(_COALESCE_SECONDS)
        for key, _ in ready:
            if self._take_results(key.data, results):
                status = self._drop(key.data, verb=b"R")
                self._blame(key.data, waiting, results, ERROR, _death(status))
        for worker in list(self._workers):
            if worker.deadline > time.monotonic():
                continue
            self._take_results(worker, results)  # what came in while others were seen to
            if worker.deadline <= time.monotonic():
                self._drop(worker, verb=b"K")
                limit = self.settings.timeout_seconds
                detail = f"killed after {limit:g} s (reward.timeout_seconds)"
                self._blame(worker, waiting, results, TIMEOUT, detail)

    def _take_results(self, worker: _Worker, results: list[RewardResult | None]) -> bool:
        """Take what a worker has sent; whether it is gone."""
        messages, closed = worker.channel.drain()
        for index, result in messages:
            results[index] = result
            worker.chunk.remove(index)
        if messages:
            worker.has_scored = True
            self._set_deadline(worker)
        return closed

    @staticmethod
    def _blame(
        worker: _Worker,
        waiting: deque[int],
        results: list[RewardResult | None],
        outcome: str,
        detail: str,
    ) -> None:
        """The item that was running gets the failure; the others of its chunk wait again."""
        if worker.chunk:
            results[worker.chunk.popleft()] = failure(outcome, detail)
            waiting.extendleft(reversed(worker.chunk))

    def _set_deadline(self, worker: _Worker) -> None:
        limit = self.settings.timeout_seconds
        worker.deadline = time.monotonic() + limit if limit and worker.chunk else float("inf")

    def _num_busy(self) -> int:
        return sum(bool(worker.chunk) for worker in self._workers)

    # ------------------------------------------------------------------ processes

    def _start_nursery(self) -> None:
        self._ready = False
        self._started = time.monotonic()
        self._process, self._control = nursery.start(self.settings)

    def _await_nursery(self) -> None:
        if self._ready:
            return
        if self._control is None:
            raise RuntimeError("this RewardPool is closed, or its verifiers failed to load")
        limit = self.settings.startup_timeout_seconds
        left = max(self._started + limit - time.monotonic(), 0.01)
        try:
            failed = self._control.receive(timeout=left)
        except TimeoutError as error:
            self._process.kill()
            self._stop_nursery()
            raise RuntimeError(
                f"loading the reward's verifiers took more than {limit:g} s "
                "(reward.startup_timeout_seconds)"
            ) from error
        except EOFError as error:
            status = self._process.wait()
            self._stop_nursery()
            raise RuntimeError(
                f"the process that loads the reward's verifiers ended with status {status}; what "
                "it printed stands above"
            ) from error
        if failed is not None:
            self._stop_nursery()
            if failed.user_error:
                raise ValueError(failed.message)
            raise RuntimeError(f"loading the reward's verifiers failed: {failed.message}")
        self._ready = True

    def _stop_nursery(self) -> None:
        for worker in self._workers:
            self._selector.unregister(worker.channel.socket)
            worker.channel.close()
        self._workers.clear()
        if self._control is not None:
            self._control.close()  # it kills its workers and ends
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # it is still loading user code
                self._process.kill()
                self._process.wait()
            self._process = None

    def _fork_worker(self) -> None:
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs:
            self._control.socket.settimeout(60)
            request = nursery.REQUEST.pack(b"F", 0)
            socket.send_fds(self._control.socket, [request], [theirs.fileno()])
            pid = self._control.receive(timeout=60)
        worker = _Worker(pid=pid, channel=Channel(ours))
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _drop(self, worker: _Worker, verb: bytes) -> int:
        """Kill (``K``) or reap (``R``) a worker; its wait status."""
        assert self._control is not None
        self._control.socket.settimeout(60)
        self._control.socket.sendall(nursery.REQUEST.pack(verb, worker.pid))
        status = self._control.receive(timeout=60)  # raises while the worker still has its chunk
        self._workers.remove(worker)
        self._selector.unregister(worker.channel.socket)
        worker.channel.close()
        return status


def _death(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the verifier's process died of {signal.Signals(-code).name}"
    return f"the verifier's process exited with status {code}"


def count_outcomes(results: Iterable[RewardResult]) -> dict[str, int]:
    """How often each outcome occurs, all of them listed."""
    counts = Counter(result.outcome for result in results)
    return {outcome: counts[outcome] for outcome in OUTCOMES}
