"""Metrics of a run: always ``metrics.jsonl``, and Weights & Biases when asked for.

``metrics.jsonl`` has one JSON object a step: ``step``, ``time`` (seconds since 1970) and the
metrics by name. Rows are appended, each synced to disk before work goes on. After a resume from
step N the rows newer than N are dropped, so that the file tells one story. Values that are not
finite become null and are counted under ``tracking/num_non_finite`` of the same row.

A W&B run keeps one id over all lives of the run, made from the run's id unless an earlier life
handed one over. W&B itself never takes rows back: every row carries ``step``, which the web page
uses as its axis, so repeated steps after a resume lie on top of each other.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treepo.atomic import plain, write_text
from treepo.tracking_settings import TrackingSettings

NON_FINITE = "tracking/num_non_finite"


class Tracker:
    """Where a run's metrics go. A context manager: leaving it closes the W&B run.

    Args:
        metrics_file: the run's ``metrics.jsonl``.
        experiment: W&B project unless the settings name one.
        run_id: W&B group unless the settings name one, and the run's name.
        config: shown on the W&B page.
        resume_step: step of the checkpoint that the run goes on from: newer rows are dropped. None
            for a new run: all rows are.
        state: what :meth:`state` of the run's earlier life gave, out of the checkpoint.
        clock: seconds since 1970.

    Raises:
        ValueError: W&B online without an account on this machine; a damaged ``metrics.jsonl``.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        *,
        metrics_file: Path,
        experiment: str,
        run_id: str,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        state: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wandb_id = str((state or {}).get("wandb_id") or run_id)
        self._last_step = drop_rows_after(metrics_file, resume_step)
        self._stream = metrics_file.open("a", encoding="utf-8")
        self._wandb: Any = None
        if settings.wandb_mode != "disabled":
            self._wandb = _start_wandb(
                settings,
                folder=metrics_file.parent,
                experiment=experiment,
                run_id=run_id,
                wandb_id=self._wandb_id,
                config=dict(config or {}),
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)

    def state(self) -> dict[str, Any]:
        """What the next life of this run needs, to be kept in the checkpoint."""
        return {"wandb_id": self._wandb_id}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a step's row; it is on disk when this returns.

        Args:
            step: larger than in every row before.
            metrics: name -> number (also of numpy or torch), text or None.
        """
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        self._last_step = step
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        lost = [name for name, value in values.items() if _is_lost(value)]
        row = {"step": step, "time": self._clock(), **plain(values)}
        if lost:
            row[NON_FINITE] = len(lost)
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if value is not None})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Put the run's final numbers on its W&B page (``summary.json`` is not the tracker's)."""
        if self._wandb is not None:
            self._wandb.summary.update(plain(values))

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the W&B run; a second call does nothing."""
        self._stream.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, in order. A last line that a crash cut short is passed over.

    Raises:
        ValueError: another line is not a JSON object with a ``step``; names file and line.
    """
    if not metrics_file.is_file():
        return []
    rows = []
    lines = metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{metrics_file}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{metrics_file}:{number} is not an object with a whole number 'step'")
        rows.append(row)
    return rows


def drop_rows_after(metrics_file: Path, step: int | None) -> int:
    """Keep the rows up to ``step`` (None: none) in a file that may not exist yet, in one rename.

    Returns:
        The last kept row's step; -1 if no row is left.
    """
    kept = [] if step is None else [row for row in read_rows(metrics_file) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    if not metrics_file.is_file() or metrics_file.read_text(encoding="utf-8") != text:
        write_text(metrics_file, text)
    return kept[-1]["step"] if kept else -1


def _scalar(name: str, value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:  # numpy and torch scalars
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"metric {name}={value!r} is neither a number nor text")


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _start_wandb(
    settings: TrackingSettings,
    *,
    folder: Path,
    experiment: str,
    run_id: str,
    wandb_id: str,
    config: dict[str, Any],
) -> Any:
    import wandb  # costs a second: only where it is asked for

    if settings.wandb_mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "tracking.wandb_mode=online needs a W&B account on this machine: run `wandb login` or "
            "set WANDB_API_KEY, or choose tracking.wandb_mode=offline (upload later with "
            "`wandb sync`)"
        )
    run = wandb.init(
        mode=settings.wandb_mode,  # type: ignore[arg-type]  # checked by the settings
        project=settings.project_name or experiment,
        entity=settings.entity,
        group=settings.group or run_id,
        name=run_id,
        id=wandb_id,
        resume="allow",
        tags=settings.tags,
        config=config,
        dir=str(folder),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
