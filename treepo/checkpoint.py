"""Checkpoints: one folder a step, whole or absent.

``checkpoints/global_step_N/`` holds ``learner/`` (weights, optimiser, schedule and random states, a
file a rank), ``hf/`` (a Hugging Face folder, what evaluation and export read), ``state.json``
(where the run stands), with segmented rollout ``pools.pkl`` (unfinished trees and experience, see
``treepo/pools.py``), with the one-step pipeline ``ahead.pkl`` (the next step's batch) and
``complete.json``, the completion marker: written last, it lists every
file with its size. The folder is written under a temporary name and renamed, so a crash leaves
either the old state or the new one. ``latest_checkpointed_iteration.txt`` names the newest step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treepo.atomic import write_text

if TYPE_CHECKING:
    from treepo.data import DataPosition

MARKER = "complete.json"
LATEST = "latest_checkpointed_iteration.txt"
_PREFIX = "global_step_"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a run stands after ``step`` steps: all that the learner's own files do not hold.

    Attributes:
        policy_version: number of weight sets published so far.
        data_position: of the problem order (see ``treepo.data.DataPosition``).
        digest: of the learner's weights, compared after a resume.
        seconds: of work so far, over all lives of the run.
        before: evaluation before training.
        tracking: what the tracker needs to go on with the same W&B run.
    """

    step: int
    policy_version: int
    data_position: DataPosition | Mapping[str, Any]  # the latter as read back
    digest: str
    seconds: float
    seed: int
    before: dict[str, float] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(root: Path, state: RunState, write: Callable[[Path], None], keep: int) -> Path:
    """Write a checkpoint atomically and prune older ones.

    Args:
        root: the run's ``checkpoints/`` folder.
        write: called with the folder to put the learner's files into.
        keep: how many of the newest checkpoints stay.

    Returns:
        The finished folder.
    """
    final = root / f"{_PREFIX}{state.step}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    files = {str(p.relative_to(partial)): p.stat().st_size for p in _files(partial)}
    for path in _files(partial):
        _fsync(path)
    (partial / MARKER).write_text(json.dumps({"step": state.step, "files": files}, indent=1))
    _fsync(partial / MARKER)
    if final.exists():  # an earlier life of the run got here and was resumed from before it
        shutil.rmtree(final)
    os.replace(partial, final)
    write_text(root / LATEST, str(state.step))
    for step in sorted(_steps(root))[:-keep]:
        shutil.rmtree(root / f"{_PREFIX}{step}")
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``, or None. Incomplete ones are passed over."""
    for step in sorted(_steps(root), reverse=True):
        folder = root / f"{_PREFIX}{step}"
        if not _what_is_missing(folder):
            return folder
    return None


def read_state(folder: Path) -> RunState:
    """Read where a run stood.

    Raises:
        ValueError: the checkpoint is incomplete; says what is missing.
    """
    check_complete(folder)
    return RunState(**json.loads((folder / "state.json").read_text()))


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that was not written to its end or has lost files since.

    Raises:
        ValueError: what is missing, and which checkpoints beside it are complete.
    """
    missing = _what_is_missing(folder)
    if missing:
        whole = [
            f"{_PREFIX}{step}"
            for step in sorted(_steps(folder.parent))
            if not _what_is_missing(folder.parent / f"{_PREFIX}{step}")
        ]
        raise ValueError(
            f"checkpoint {folder} is not complete: {missing}. "
            f"Complete ones beside it: {', '.join(whole) or 'none'}"
        )


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    marker = folder / MARKER
    if not marker.is_file():
        return f"its completion marker {MARKER} is missing (it was interrupted while being written)"
    try:
        files = json.loads(marker.read_text())["files"]
    except (ValueError, KeyError):
        return f"its completion marker {MARKER} is damaged"
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return ""


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    names = [p.name.removeprefix(_PREFIX) for p in root.iterdir() if p.name.startswith(_PREFIX)]
    return [int(name) for name in names if name.isdigit()]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
