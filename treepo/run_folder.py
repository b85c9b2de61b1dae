"""A run's folder: what lies where, how a run is begun, found again and claimed by one process.

``<outputs>/<experiment>/<run id>/`` holds ``config.yaml`` (resolved), ``metrics.jsonl``,
``trees/step_N.jsonl``, ``checkpoints/``, ``export/``, ``summary.json`` (its presence with
``"finished": true`` means that the run is over) and, while a process works on it, ``lock.json``.
``<outputs>/latest`` links to the newest run. Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from treepo.atomic import plain, replace_link, write_json, write_text

LATEST = "latest"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """One run's place on disk. Folders below it are made by those who write into them.

    Attributes:
        path: ``<outputs>/<experiment>/<run id>``.
    """

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def experiment(self) -> str:
        return self.path.parent.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def trees(self) -> Path:
        return self.path / "trees"

    def trees_file(self, step: int) -> Path:
        return self.trees / f"step_{step}.jsonl"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: its summary says so."""
        if not self.summary_file.is_file():
            return False
        return bool(json.loads(self.summary_file.read_text(encoding="utf-8")).get("finished"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, after which the run is over and is never resumed."""
        write_json(self.summary_file, {**plain(summary), "finished": True})

    @property
    def is_busy(self) -> bool:
        """Whether another living process works on the run."""
        try:
            self.lock().release()
        except RunIsBusy:
            return True
        return False

    def lock(self) -> RunLock:
        """Claim the run for this process.

        Raises:
            ValueError: another living process works on it.
        """
        return RunLock(self.path / "lock.json")


def new_run_id(now: float | None = None) -> str:
    """A name that sorts by time and is not met twice: ``20261123-084512-9f3a1c`` (UTC)."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return f"{stamp}-{secrets.token_hex(3)}"


def begin_run(outputs: Path, experiment: str, config_yaml: str) -> tuple[RunFolder, RunLock]:
    """Make a new run's folder, claim it, write its config and point ``latest`` at it."""
    parent = outputs / experiment
    parent.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path=parent / new_run_id())
    run.path.mkdir()  # fails if it exists: two runs never share a folder
    lock = run.lock()
    write_text(run.config_file, config_yaml)
    point_latest_at(outputs, run)
    return run, lock


def point_latest_at(outputs: Path, run: RunFolder) -> None:
    """Make ``<outputs>/latest`` lead to ``run``."""
    replace_link(outputs / LATEST, os.path.relpath(run.path, outputs))


def list_runs(outputs: Path, experiment: str) -> list[RunFolder]:
    """An experiment's runs, newest first: the folders that have a config."""
    parent = outputs / experiment
    if not parent.is_dir():
        return []
    names = sorted((path.name for path in parent.iterdir()), reverse=True)
    runs = (RunFolder(path=parent / name) for name in names)
    return [run for run in runs if run.config_file.is_file()]


def claim_unfinished_run(
    outputs: Path,
    experiment: str,
    accepts: Callable[[RunFolder], bool] = lambda run: True,
) -> tuple[RunFolder, RunLock] | None:
    """Find the run that ``resume_mode=auto`` goes on with, and claim it.

    It is the newest unfinished run of the experiment that no living process works on, among those
    that ``accepts`` takes. Those older than a finished one were given up and are left alone.

    Args:
        accepts: whether a run may be gone on with (for example: it has the same config).
    """
    for run in list_runs(outputs, experiment):
        if not accepts(run):
            continue
        if run.is_finished:
            return None
        try:
            lock = run.lock()
        except RunIsBusy:
            continue
        if run.is_finished:  # its process ended between the two looks
            lock.release()
            return None
        return run, lock
    return None


class RunIsBusy(ValueError):
    """Another living process works on the run; the message names it."""


class RunLock:
    """A process's claim on a run, held until :meth:`release` or the process's death.

    The file names the holder by host, process id and the process's start time (ids are used again).
    A dead holder's lock is taken over. A holder on another host cannot be looked at: its lock is
    respected, unless it belongs to the same SLURM job, which is then a requeued one whose earlier
    life is over. The file itself is never removed, and is read and written under ``flock``, so that
    of two processes that both find a dead holder only one takes over.

    Raises:
        RunIsBusy: the run is another's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mine = _identity(os.getpid())
        with _locked(path) as stream:
            holder = _read_holder(stream)
            if holder and holder != self._mine and _is_alive(holder):
                raise RunIsBusy(
                    f"run {path.parent} is being worked on by process {holder['pid']} on "
                    f"{holder['host']}. If that process is gone, delete {path}"
                )
            _write_holder(stream, self._mine)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the run free; does nothing if the claim is no longer this process's."""
        if not self._path.is_file():
            return
        with _locked(self._path) as stream:
            if _read_holder(stream) == self._mine:
                _write_holder(stream, {})


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # given back when the file is closed
        yield stream


def _read_holder(stream: TextIO) -> dict[str, Any]:
    stream.seek(0)
    text = stream.read()
    try:
        return json.loads(text) if text.strip() else {}
    except json.JSONDecodeError:
        return {}  # its writer died half-way through


def _write_holder(stream: TextIO, holder: Mapping[str, Any]) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(json.dumps(holder))
    stream.flush()
    os.fsync(stream.fileno())


def _identity(pid: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_time(pid),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }


def _is_alive(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        job = os.environ.get("SLURM_JOB_ID", "")
        return not job or holder.get("slurm_job") != job
    return holder["started"] is not None and _start_time(holder["pid"]) == holder["started"]


def _start_time(pid: int) -> str | None:
    """When a process began (unchanging, in the kernel's ticks since boot, with the boot's id); None
    if there is no such process or it is a zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name, in parentheses, may hold anything
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
