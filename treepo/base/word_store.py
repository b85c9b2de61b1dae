"""A key-value store of short words that never keeps its caller for longer than a limit.

``torch.distributed.TCPStore`` waits for ever when the process that keeps it is frozen. Its calls
are made by a thread of their own here, which is left behind when it does not come back.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch.distributed as dist

from treepo.base.errors import RunFailed


class WeightGroupError(RunFailed):
    """A transfer of weights failed or was refused; the message names who is missing or refused."""


class WordStore:
    """See the module.

    Args:
        store: read and written by a thread of its own.
        keeper: name of the process that keeps it, for messages.
        timeout_seconds: of every call.

    Every method raises ``WeightGroupError`` when the store is gone or does not answer in time.
    """

    def __init__(self, store: dist.Store, keeper: str, timeout_seconds: float) -> None:
        self._keeper = keeper
        self._timeout_seconds = timeout_seconds
        self._is_lost = False
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        arguments = (store, self._calls, self._answers)
        threading.Thread(target=_serve, args=arguments, daemon=True).start()

    def __del__(self) -> None:
        self._calls.put(None)  # ends the thread

    def set(self, key: str, word: str) -> None:
        self._call("set", key, f"={word}")  # the store takes no empty values

    def set_first(self, key: str, word: str) -> None:
        """Set, unless somebody has."""
        self._call("compare_set", key, "", f"={word}")

    def has(self, key: str) -> bool:
        return self._call("check", [key])

    def get(self, key: str) -> str:
        """The word of a key that ``has`` one."""
        return self._call("get", key).decode().removeprefix("=")

    def _call(self, method: str, *arguments: Any) -> Any:
        if not self._is_lost:
            self._calls.put((method, arguments))
            try:
                answer = self._answers.get(timeout=self._timeout_seconds)
            except queue.Empty:
                answer = TimeoutError(f"no answer within {self._timeout_seconds:g} s")
            if not isinstance(answer, Exception):
                return answer
            self._is_lost = True
            raise self._loss() from answer
        raise self._loss()

    def _loss(self) -> WeightGroupError:
        return WeightGroupError(
            f"the transfer of weights failed: no answer from {self._keeper}, which keeps the "
            "group's store"
        )


def _serve(store: dist.Store, calls: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        method, arguments = call
        try:
            answers.put(getattr(store, method)(*arguments))
        except dist.DistError as error:
            answers.put(error)
