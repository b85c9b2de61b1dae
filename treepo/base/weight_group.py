"""A group of processes that weights are broadcast to: one sender, any number of receivers.

It has a key-value store and a communicator of its own (NCCL where every member has a GPU to
itself, gloo otherwise) and is not registered with ``torch.distributed``: it neither needs nor
disturbs a process's default group. Words pass through the store, bytes through the communicator.

A transfer begins with words: the sender describes what it has, every receiver accepts or refuses,
and the sender tells all whether bytes follow. So nobody waits for bytes that won't come. While
anyone waits it watches for a failure reported by another member, so that one that dies ends the
others' wait as soon as anybody notices. After a failure a group is broken: make a new one.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from treepo.base.word_store import WeightGroupError, WordStore

SENDER = 0  # its rank in the group
_LONGEST_NAP = 0.02  # seconds between two looks at the store
_ROLL_CALL_SECONDS = 3.0  # after a failure: who does not answer in this time is called missing


def open_store(host: str, timeout_seconds: float) -> dist.TCPStore:
    """The sender's store, on a free port of ``host``; ``store.port`` says which."""
    limit = timedelta(seconds=timeout_seconds)
    return dist.TCPStore(host, 0, None, True, timeout=limit, wait_for_workers=False)


def reach_store(host: str, port: int, timeout_seconds: float) -> dist.TCPStore:
    """A receiver's connection to the sender's store.

    Raises:
        WeightGroupError: nobody listens there.
    """
    limit = timedelta(seconds=timeout_seconds)
    try:
        return dist.TCPStore(host, port, None, False, timeout=limit, wait_for_workers=False)
    except dist.DistError as error:
        raise WeightGroupError(f"nobody offers weights at {host}:{port}: {error}") from error


class WeightGroup:
    """One member. The constructor waits for all others.

    Args:
        store: from ``open_store`` in the sender, ``reach_store`` in receivers.
        rank: in ``members``; 0 is the sender.
        members: names for messages, in rank order, the same everywhere.
        device: where this member's weights are.
        timeout_seconds: longest wait for any one word or bucket.

    Raises:
        WeightGroupError: names who did not come.
    """

    def __init__(
        self,
        store: dist.TCPStore,
        rank: int,
        members: Sequence[str],
        *,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.members = tuple(members)
        self.timeout_seconds = timeout_seconds
        self._store = WordStore(store, self.members[SENDER], timeout_seconds)
        self._num_offers = 0
        self._store.set(f"device/{rank}", _device_name(device))
        everyone = range(len(members))
        names = self._words("device", everyone, "come to the weight group")
        use_nccl = _each_has_a_gpu(names) and dist.is_nccl_available()
        self.device = device if use_nccl else torch.device("cpu")
        limit = timedelta(seconds=timeout_seconds)
        try:
            self._communicator: Any = (_nccl if use_nccl else _gloo)(
                store, rank, len(members), limit
            )
        except RuntimeError as error:
            self._fail(f"its communicator could not be made: {error}")

    # Words: what is about to be sent, and who agrees.

    def offer(self, description: str) -> None:
        """Sender: describe what is about to be sent and wait until every receiver accepts it.

        Raises:
            WeightGroupError: one refuses or does not answer; nothing will be sent, and every
                receiver that waits is told so.
        """
        key = self._next_offer()
        self._store.set(f"{key}/description", description)
        receivers = range(1, len(self.members))
        answers = self._words(f"{key}/answer", receivers, "answer to the offer of weights")
        refusals = [
            f"{self.members[rank]} refuses the weights: {answer}"
            for rank, answer in zip(receivers, answers, strict=True)
            if answer
        ]
        decision = "; ".join(refusals)
        self._store.set(f"{key}/decision", decision)
        if decision:
            raise WeightGroupError(decision)

    def next_offer(self) -> str:
        """Receiver: what the sender is about to send. ``accept`` or ``refuse`` must follow."""
        key = self._next_offer()
        failure = f"{self.members[SENDER]} did not offer weights"
        return self._word(f"{key}/description", failure, self.timeout_seconds)

    def refuse(self, reason: str) -> None:
        """Receiver: nothing of this offer will be taken."""
        self._store.set(f"{self._offer}/answer/{self.rank}", reason or "no reason given")

    def accept(self) -> None:
        """Receiver: bytes may follow; waits for the sender's word that they do.

        Raises:
            WeightGroupError: another receiver refused or is missing.
        """
        self._store.set(f"{self._offer}/answer/{self.rank}", "")
        # The sender waits for the others' answers meanwhile: it reaches its limit first.
        sender, limit = self.members[SENDER], 2 * self.timeout_seconds
        if decision := self._word(f"{self._offer}/decision", f"{sender} did not decide", limit):
            raise WeightGroupError(decision)

    # Bytes.

    def broadcast(self, buffer: torch.Tensor) -> None:
        """The sender's ``buffer`` (contiguous, on ``self.device``) becomes everybody's.

        Raises:
            WeightGroupError: a member is gone or too slow, or reported a failure.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        try:
            work = self._communicator.broadcast([buffer], options)
            if not self._wait_until(work.is_completed, self.timeout_seconds):
                self._fail(f"a bucket did not arrive within {self.timeout_seconds:g} s")
            work.wait()
        except WeightGroupError:
            self._abort()
            raise
        except RuntimeError as error:  # what communicators raise when a peer is gone
            self._abort()
            self._fail(f"the connection broke ({_short(error)})")

    def confirm_received(self) -> None:
        """Receiver: everything of this offer has arrived. Sender: wait until all say so.

        Raises:
            WeightGroupError: names who did not confirm.
        """
        if self.rank != SENDER:
            self._store.set(f"{self._offer}/received/{self.rank}", "")
            return
        receivers = range(1, len(self.members))
        self._words(f"{self._offer}/received", receivers, "confirm that the weights arrived")

    def _abort(self) -> None:
        """End what is under way, or NCCL's watchdog would end the process. Gloo does nothing here:
        its threads give up at their own limit.
        """
        if self.device.type == "cuda":
            self._communicator.abort()

    def fail(self, reason: str) -> None:
        """Tell every member that this one cannot go on, so that none waits for it."""
        with suppress(WeightGroupError):  # without a store nobody can be told
            self._store.set_first("failed", f"{self.members[self.rank]}: {reason}")
            self._store.set(f"alive/{self.rank}", "")

    # Waiting.

    @property
    def _offer(self) -> str:
        return f"offer/{self._num_offers}"

    def _next_offer(self) -> str:
        self._num_offers += 1
        return self._offer

    def _word(self, key: str, failure: str, limit: float) -> str:
        if not self._wait_until(lambda: self._store.has(key), limit):
            self._fail(f"{failure} within {limit:g} s")
        return self._store.get(key)

    def _words(self, key: str, ranks: Sequence[int], task: str) -> list[str]:
        """The words of ``ranks`` under ``key``; an error names those that have none."""
        missing = list(ranks)

        def all_there() -> bool:
            missing[:] = [rank for rank in missing if not self._store.has(f"{key}/{rank}")]
            return not missing

        if not self._wait_until(all_there, self.timeout_seconds):
            names = ", ".join(self.members[rank] for rank in missing)
            reason = f"{names} did not {task} within {self.timeout_seconds:g} s"
            self.fail(reason)
            raise WeightGroupError(reason)
        return [self._store.get(f"{key}/{rank}") for rank in ranks]

    def _wait_until(self, is_done: Callable[[], bool], seconds: float) -> bool:
        """False if it is not done in time.

        Raises:
            WeightGroupError: another member reported a failure, or the store is gone.
        """
        deadline, nap = time.monotonic() + seconds, 0.0
        while not is_done():
            if self._store.has("failed"):
                raise self._failure()
            if time.monotonic() > deadline:
                return False
            time.sleep(nap)
            nap = min(_LONGEST_NAP, nap + 0.0005)
        return True

    def _fail(self, reason: str) -> NoReturn:
        """Report a failure to all and raise it, with the names of those that don't answer."""
        self.fail(reason)
        raise self._failure()

    def _failure(self) -> WeightGroupError:
        """The failure that was reported first, with the names of members that show no life."""
        self._store.set(f"alive/{self.rank}", "")
        missing = list(range(len(self.members)))
        deadline = time.monotonic() + min(_ROLL_CALL_SECONDS, self.timeout_seconds)
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._store.has(f"alive/{rank}")]
            time.sleep(_LONGEST_NAP)
        reported = f"the transfer of weights failed: {self._store.get('failed')}"
        if missing:
            reported += f"; no answer from {', '.join(self.members[rank] for rank in missing)}"
        return WeightGroupError(reported)


def _short(error: RuntimeError) -> str:
    """A communicator's message without source file, stack and advice."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is")[0]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_properties(device).uuid}"


def _each_has_a_gpu(names: Sequence[str]) -> bool:
    """NCCL takes one member a GPU."""
    return len(set(names)) == len(names) and all(name.startswith("cuda") for name in names)


def _gloo(store: dist.TCPStore, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The interface that leads to the sender; by default gloo looks up this machine's name.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(store))]
    options._timeout = timeout
    options._threads = 1
    return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)


def _nccl(store: dist.TCPStore, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # Its watchdog ends the process; the waits above come first and give an error.
    options._timeout = 2 * timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)


def _own_address(store: dist.TCPStore) -> str:
    """This machine's address on the way to the store (nothing is sent)."""
    found = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)
    family, kind, _, _, target = found[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return probe.getsockname()[0]
