"""Writing files so that a crash leaves the old content or the new one, never half of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path``: written beside it, synced, then renamed over it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` with ``value`` as indented JSON (see :func:`plain` for what it may hold)."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Sequence[Any]) -> None:
    """Replace ``path`` with one JSON value a line."""
    lines = (json.dumps(plain(row), allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def replace_link(path: Path, target: str) -> None:
    """Make ``path`` a symbolic link to ``target``, replacing an older link in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """``value`` as what JSON knows: arrays and tensors become lists, NaN and infinities become null
    (JSON has no word for them).

    Raises:
        ValueError: something that is neither of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars
        return plain(value.tolist())
    raise ValueError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")
