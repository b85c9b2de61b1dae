"""A policy as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from trainers.model import PolicyModel

ADAPTER_FOLDER = "adapter"  # in the folder
# Files beside the weights that make the folder complete.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def export_policy(
    policy: PolicyModel, state: Mapping[str, torch.Tensor], folder: Path, model_path: str
) -> None:
    """Write safetensors, configuration, and the tokenizer's files of the original model. Adapters
    are merged into the weights, and stand by themselves in the subfolder.

    Args:
        state: the ``state_dict`` of the policy's model, with whole tensors.
        model_path: of the original model.
    """
    policy.model.save_pretrained(folder, state_dict=policy.weights(state))
    if policy.adapters is not None:
        policy.adapters.save(state, folder / ADAPTER_FOLDER, model_path)
    for name in _TOKENIZER_FILES:
        source = Path(model_path) / name
        if source.is_file() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)
