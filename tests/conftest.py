"""Shared by all tests: a quiet, offline, single-threaded process, and the model they run on."""

from __future__ import annotations

import os
import sys

# Before anything imports torch, transformers, ray or wandb: they read these once.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

# Where there is no GPU, Triton interprets its kernels. It reads this when it is imported, which any
# library may do in the first test of a process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # its scripts are importable by name


@pytest.fixture(scope="session")
def tiny_model_path() -> Path:
    """The tiny model that ships with the package: a Hugging Face folder with its tokenizer."""
    return ROOT / "treepo" / "assets" / "tiny_chain_sum"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
