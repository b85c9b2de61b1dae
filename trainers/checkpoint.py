"""A learner's checkpoint: DeepSpeed's files, a note of whose they are, and random states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TAG = "weights_and_optimizer"
_NOTE = "learner.json"


def save_checkpoint(folder: Path, engine: Any, note: Mapping[str, Any], rank: int) -> None:
    """Write the engine's state; all ranks into one folder. Collective.

    Args:
        note: what :func:`load_checkpoint` compares, and ``num_optimizer_steps``. With ``lora``,
            frozen weights are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(
        str(folder),
        tag=_TAG,
        save_latest=False,
        exclude_frozen_parameters=note["lora"] is not None,
    )
    torch.save(_random_state(), folder / f"random_state_rank_{rank}.pt")
    if rank == 0:
        (folder / _NOTE).write_text(json.dumps(note))
    dist.barrier()


def load_checkpoint(
    folder: Path, engine: Any, own: Mapping[str, Any], rank: int, model_path: str
) -> dict[str, Any]:
    """Take back what :func:`save_checkpoint` wrote; returns its note. Collective.

    Args:
        own: the note of the learner that loads.
        model_path: of its model.

    Raises:
        ValueError: the folder is no learner checkpoint, or one of another learner.
    """
    if not (folder / _NOTE).is_file():
        raise ValueError(f"checkpoint {str(folder)!r} has no {_NOTE}: not a learner checkpoint")
    saved: dict[str, Any] = json.loads((folder / _NOTE).read_text())
    saved.setdefault("lora", None)  # of checkpoints from before there were adapters
    _check_same(folder, saved, own, model_path)
    # Frozen weights are not in the checkpoint: they are those of the model's folder.
    loaded, _ = engine.load_checkpoint(
        str(folder), tag=_TAG, load_module_strict=own["lora"] is None
    )
    if loaded is None:
        raise ValueError(f"checkpoint {str(folder)!r} lacks DeepSpeed's files under {_TAG}/")
    state = torch.load(folder / f"random_state_rank_{rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    return saved


def _check_same(
    folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any], model_path: str
) -> None:
    for name in ("world_size", "zero_stage", "dtype", "optimizer", "lora"):
        if saved[name] != own[name]:
            raise ValueError(
                f"checkpoint {str(folder)!r} was written with {name}={saved[name]!r}, this "
                f"learner has {own[name]!r}: start it with the same, or begin a new run from "
                "the checkpoint's exported model"
            )
    reference = saved.get("reference", "")
    if reference and own["reference"] and reference != own["reference"]:
        with_lora = own["lora"] is not None
        was = "its adapters on" if with_lora else "the KL penalty towards"
        mend = "" if with_lora else ", or set policy_loss.kl_loss_coef=0"
        raise ValueError(
            f"checkpoint {str(folder)!r} was trained with {was} another model "
            f"than {model_path!r} holds now: put the model that the run began with back "
            f"there{mend}"
        )


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
