"""The process that reward workers are forked from.

It is started fresh (no torch, no Ray, no threads, no copy of the caller's ``__main__``), imports
the verifiers once, and then forks a worker whenever it is asked, in a few milliseconds: so killing
a hung verifier is cheap. It is the workers' parent, so it alone kills and reaps them, and no
process id is ever reused under its feet. When the process that started it is gone, it kills every
worker and ends.

Requests, each answered by one message: ``F`` with a socket attached forks a worker that speaks over
that socket (answer: process id); ``K`` kills a worker with its children and reaps it (answer: its
wait status); ``R`` reaps one that ended by itself (answer: the same).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards.channel import Channel
from rewards.records import ERROR
from rewards.scorer import Scorer, describe, failure
from rewards.settings import RewardSettings

REQUEST = struct.Struct("<cq")
_PR_SET_PDEATHSIG = 1
_REAP_SECONDS = 0.25  # how long an ended worker may take to become reapable


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFailure:
    """Why the verifiers could not be made; ``user_error``: the settings are wrong."""

    message: str
    user_error: bool


def start(settings: RewardSettings) -> tuple[subprocess.Popen[bytes], Channel]:
    """Start a nursery; the first message of the channel is None when it is ready, or a
    :class:`StartFailure`.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        path = [os.path.abspath(entry) for entry in sys.path]
        code = (
            "import sys; sys.path[:] = sys.argv[2:]; "
            "from rewards.nursery import main; main(int(sys.argv[1]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(theirs.fileno()), *path],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what verifiers print must not mix with the caller's own output
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the process that started us
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    channel = Channel(ours)
    channel.send(settings, timeout=60)
    return process, channel


def main(descriptor: int) -> None:
    """Body of the nursery's process."""
    control = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    starter = os.getppid()
    channel = Channel(control)
    try:
        settings = channel.receive()
    except EOFError:
        return
    try:
        scorer = Scorer(settings)
    except (Exception, SystemExit) as error:  # importing user code may raise anything
        message = str(error) if isinstance(error, ValueError) else describe(error)
        channel.send(StartFailure(message=message, user_error=isinstance(error, ValueError)))
        return
    gc.collect()
    gc.freeze()  # keeps the pages that workers share from being touched by their collectors
    channel.send(None)
    workers: set[int] = set()
    try:
        _serve(control, channel, starter, scorer, settings, workers)
    finally:
        for pid in workers:
            _kill(pid)


def _serve(
    control: socket.socket,
    channel: Channel,
    starter: int,
    scorer: Scorer,
    settings: RewardSettings,
    workers: set[int],
) -> None:
    while True:
        readable, _, _ = select.select([control], [], [], 1.0)
        if not readable:
            if os.getppid() != starter:
                return
            continue
        control.settimeout(None)
        try:
            request, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        except ConnectionResetError:  # the pool's process is gone
            return
        if len(request) < REQUEST.size:
            return
        verb, pid = REQUEST.unpack(request)
        if verb == b"F":
            pid = os.fork()
            if pid == 0:
                control.close()
                _worker(descriptors[0], scorer, settings)
            os.close(descriptors[0])
            workers.add(pid)
            channel.send(pid)
        else:
            workers.discard(pid)
            channel.send(_kill(pid) if verb == b"K" else _reap(pid))


def _kill(pid: int) -> int:
    """Kill a worker and what it started; its wait status. Before it is reaped, its process id is
    nobody else's.
    """
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
            kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _reap(pid: int) -> int:
    """Wait status of a worker whose socket is closed; one that lives on is killed."""
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.005)
    return _kill(pid)  # it keeps the status it ended with; what it started ends too


def _worker(descriptor: int, scorer: Scorer, settings: RewardSettings) -> NoReturn:
    """Body of a worker: chunks of items in, one result an item out, until the socket closes."""
    try:
        os.setsid()  # a group of its own, so that what a verifier starts dies with it
        _die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if settings.memory_limit_mb:
            limit = settings.memory_limit_mb << 20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        channel = Channel(socket.socket(fileno=descriptor))
        while True:
            for index, pickled in channel.receive():
                channel.send((index, _score(scorer, pickled)))
    except (EOFError, ConnectionError):
        os._exit(0)
    finally:  # never back into the nursery's own loop
        os._exit(1)


def _score(scorer: Scorer, pickled: bytes) -> Any:
    try:
        item = pickle.loads(pickled)
    except Exception as error:  # the item holds an object whose class this process cannot import
        return failure(ERROR, f"the item cannot be read in the scoring process: {describe(error)}")
    return scorer.score(item)


def _die_with_parent() -> None:
    """On Linux, have the kernel kill this process when the nursery ends in any way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
