"""From what a user calls a checkpoint to the Hugging Face folder in it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treepo.checkpoint import check_complete, latest_checkpoint
from treepo.config import ASSET_PREFIX, resolve_model_path
from treepo.run_folder import RunFolder

_STEP = "global_step_"
_MODEL = "hf"  # in a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model is and where it comes from.

    Attributes:
        model: a folder that ``from_pretrained`` loads, or a name on the Hub.
        run: the run that made it, if known.
        step: of the run.
    """

    model: str
    run: RunFolder | None = None
    step: int | None = None


def find_model(checkpoint: str) -> ModelSource:
    """Find the model of a checkpoint.

    Args:
        checkpoint: a model folder, a name on the Hub, ``asset:NAME``, a run's
            ``checkpoints/global_step_N``, or a run's folder (then its newest complete checkpoint).

    Raises:
        ValueError: none of these, a checkpoint without its completion marker, or a run without any
            complete checkpoint.
    """
    path = Path(checkpoint).expanduser()
    if checkpoint.startswith(ASSET_PREFIX) or not path.exists():
        return ModelSource(model=_resolve(checkpoint))
    path = path.resolve()
    if path.name == _MODEL and path.parent.name.startswith(_STEP):
        path = path.parent
    if path.name.startswith(_STEP):
        return _of_step(path)
    if (path / "config.json").is_file():
        run = RunFolder(path=path.parent)
        of_run = path == run.export and run.config_file.is_file()
        return ModelSource(model=str(path), run=run if of_run else None)
    run = RunFolder(path=path.parent if path.name == "checkpoints" else path)
    if not run.config_file.is_file():
        raise ValueError(
            f"checkpoint={checkpoint!r} is neither a model folder (config.json is missing) nor a "
            "run's folder (config.yaml is missing) nor a run's checkpoints/global_step_N"
        )
    newest = latest_checkpoint(run.checkpoints)
    if newest is None:
        raise ValueError(
            f"checkpoint={checkpoint!r}: the run has no complete checkpoint in {run.checkpoints}"
        )
    return _of_step(newest)


def _resolve(name: str) -> str:
    try:
        return resolve_model_path(name)
    except ValueError as error:
        raise ValueError(f"checkpoint={name!r}: {error}") from error


def _of_step(folder: Path) -> ModelSource:
    check_complete(folder)
    model = folder / _MODEL
    if not (model / "config.json").is_file():
        raise ValueError(f"checkpoint {folder} holds no model: {model}/config.json is missing")
    run = RunFolder(path=folder.parent.parent)
    step = int(folder.name.removeprefix(_STEP))
    return ModelSource(model=str(model), run=run if run.config_file.is_file() else None, step=step)
