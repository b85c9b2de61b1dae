"""Versions of what a run's numbers may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("treepo", "torch", "transformers", "deepspeed", "ray", "numpy")


def package_versions() -> dict[str, str]:
    """By name, Python's own included."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source tree"
