"""Members of a weight group for tests: as threads of one process, or as processes that die."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from treepo.base.weight_group import WeightGroup, WeightGroupError, open_store, reach_store

HOST = "127.0.0.1"
CPU = torch.device("cpu")
NUM_BUCKETS = 50
BUCKET_BYTES = 1 << 20


def names(num_receivers: int) -> list[str]:
    return ["learner", *(f"engine {i}" for i in range(num_receivers))]


def run_members(
    roles: Sequence[Callable[[WeightGroup], Any] | None], timeout_seconds: float = 20.0
) -> list[Any]:
    """Each role (the sender's first) in a thread with its member of one group; None: a member that
    never comes. Returns what each returned or raised, in order.
    """
    store = open_store(HOST, timeout_seconds)

    def play(rank: int) -> Any:
        mine = reach_store(HOST, store.port, timeout_seconds) if rank else store
        role = roles[rank]
        if role is None:
            return None
        try:
            group = WeightGroup(
                mine,
                rank,
                names(len(roles) - 1),
                device=CPU,
                timeout_seconds=timeout_seconds,
            )
            return role(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(roles)) as threads:
        return list(threads.map(play, range(len(roles))))


def receive_or_die(
    rank: int, port: int, size: int, fate: int | None, limit: float, answers: Any
) -> None:
    """A receiver, in a process of its own, that gives itself the signal ``fate`` after the third
    bucket. Puts (rank, "done" or the error, seconds) into ``answers``.
    """
    torch.set_num_threads(1)
    store = reach_store(HOST, port, 30.0)
    store.set(f"ready/{rank}", "1")
    store.wait([f"ready/{r}" for r in range(1, size)])
    group = WeightGroup(store, rank, names(size - 1), device=CPU, timeout_seconds=limit)
    group.next_offer()
    group.accept()
    began = time.monotonic()
    try:
        for number in range(NUM_BUCKETS):
            if number == 3 and fate:
                os.kill(os.getpid(), fate)
            group.broadcast(torch.zeros(BUCKET_BYTES, dtype=torch.uint8))
        group.confirm_received()
        answers.put((rank, "done", time.monotonic() - began))
    except WeightGroupError as error:
        answers.put((rank, str(error), time.monotonic() - began))


def send_and_die(fate: int, limit: float, ports: Any) -> None:
    """The sender to two receivers, in a process of its own, that gives itself the signal ``fate``
    after the third bucket. Puts its store's port into ``ports``.
    """
    torch.set_num_threads(1)
    store = open_store(HOST, 30.0)
    ports.put(store.port)
    group = WeightGroup(store, 0, names(2), device=CPU, timeout_seconds=limit)
    group.offer("bytes")
    for number in range(NUM_BUCKETS):
        if number == 3:
            os.kill(os.getpid(), fate)
        group.broadcast(torch.zeros(BUCKET_BYTES, dtype=torch.uint8))
