"""Writes a model as a Hugging Face folder: safetensors, configuration, generation settings,
tokenizer and a model card.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from treepo.atomic import sync_folder
from treepo.model_folder import ModelSource
from treepo.progress import quiet_libraries


def export_model(source: ModelSource, output: Path, *, dtype: str, verify: bool) -> None:
    """Write ``output``, whole or not at all.

    Args:
        output: must not exist or be empty.
        dtype: of the weights; "auto" leaves them as they are stored.
        verify: load the result with the rollout engine, whose load probe compares a small decoded
            tree with the model's plain attention.

    Raises:
        ValueError: the model can't be loaded, or the result fails the probe.
    """
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(source.model, dtype=torch_dtype)
        tokenizer = AutoTokenizer.from_pretrained(source.model)
    except OSError as error:
        raise ValueError(f"no model can be loaded from {source.model!r}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(source, output.name), encoding="utf-8")
        if verify:
            _verify(partial)
        if output.exists():
            output.rmdir()  # it is empty
        os.replace(partial, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_card(source: ModelSource, name: str) -> str:
    """A README for the folder: how it was made, its scores, how to load it."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [reinforcement-learning, treepo]",
        "---",
        "",
        f"# {name}",
        "",
        "Trained by reinforcement learning on token trees with TreePO.",
        "",
    ]
    if source.run is not None:
        step = f", step {source.step}" if source.step is not None else ""
        lines += [f"Run `{source.run.experiment}/{source.run.run_id}`{step}.", ""]
        lines += _score_table(source.run.summary_file)
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _score_table(summary_file: Path) -> list[str]:
    if not summary_file.is_file():
        return []
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    before, after = summary.get("before") or {}, summary.get("after") or {}
    rows = [
        f"| {name} | {_shown(before.get(name))} | {_shown(value)} |"
        for name, value in after.items()
        if isinstance(value, int | float)
    ]
    head = ["Held-out scores of the run, before and after:", ""]
    return [*head, "| | before | after |", "|---|---|---|", *rows, ""] if rows else []


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _verify(folder: Path) -> None:
    from rollout.engine import Engine
    from rollout.settings import EngineSettings

    Engine(folder, EngineSettings(num_kv_slots=4096))
