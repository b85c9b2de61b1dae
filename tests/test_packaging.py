"""What is installed is what is in the tree: packages, configs and the tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing the wheel puts into site-packages."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("treepo", "rollout", "trainers", "rewards", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, "-m", "pip", *wheel], cwd=source, check=True)
    (built,) = (source / "dist").glob("treepo-*.whl")
    zipfile.ZipFile(built).extractall(site)
    return site


def run_installed(site: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_an_installed_wheel_finds_its_configs_and_the_tiny_model(installed: Path) -> None:
    code = (
        "from treepo.cli import config_dir; from treepo.config import resolve_model_path;"
        "print(config_dir()); print(resolve_model_path('asset:tiny_chain_sum'))"
    )
    configs, model = map(Path, run_installed(installed, "-c", code).splitlines())
    assert configs == installed / "treepo" / "configs"
    assert model == installed / "treepo" / "assets" / "tiny_chain_sum"
    ours, theirs = ROOT / "configs", installed / "treepo" / "configs"
    assert {p.relative_to(ours) for p in ours.rglob("*.yaml")} == {
        p.relative_to(theirs) for p in theirs.rglob("*.yaml")
    }


def test_an_installed_wheel_adds_no_other_top_level_names(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"treepo", "rollout", "trainers", "rewards"}


def test_commands_of_an_installed_wheel_answer(installed: Path) -> None:
    assert "treepo.report" in run_installed(installed, "-m", "treepo.report", "--help")


def test_the_model_shipped_with_the_package_is_small() -> None:
    size = sum(p.stat().st_size for p in (ROOT / "treepo" / "assets").rglob("*") if p.is_file())
    assert 0 < size <= 4 * 2**20
