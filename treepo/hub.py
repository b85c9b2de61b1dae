"""Models by their name on the Hugging Face Hub: the project's one file with ``huggingface_hub``."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# What a causal language model and its tokenizer consist of; other formats' weights stay away.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")


def local_model(path: str) -> str:
    """The folder of a model: ``path`` itself if it is one, else a download of the Hub's model of
    that name (or its copy in the local cache).

    Raises:
        ValueError: no such model, or no way to reach the Hub and no copy here.
    """
    if Path(path).is_dir():
        return path
    try:
        return snapshot_download(path, allow_patterns=list(FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path={path!r} is no folder here, and the Hugging Face Hub gave no model of "
            f"that name: {error}"
        ) from error
