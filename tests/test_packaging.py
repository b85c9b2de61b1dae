"""What is installed is what is in the tree: packages, configs and the tiny model."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_named_in_pyproject() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("treepo", "rollout", "trainers", "rewards")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"treepo.configs"}


def test_every_folder_with_python_files_is_a_package() -> None:
    for top in ("treepo", "rollout", "trainers", "rewards"):
        for file in (ROOT / top).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


def test_every_config_and_asset_is_covered_by_the_package_data() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for folder, package in ((ROOT / "configs", "treepo.configs"), (ROOT / "treepo", "treepo")):
        covered = {path for pattern in data[package] for path in folder.glob(pattern)}
        wanted = {
            path
            for path in (folder.rglob("*") if package != "treepo" else folder.glob("assets/**/*"))
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert wanted <= covered, f"not installed: {sorted(wanted - covered)}"
