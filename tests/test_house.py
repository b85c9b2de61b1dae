"""The house keeps its shape: who may import whom, and what stays out of the way of a quick start.

The rules are those of docs/architecture.md: the three rooms import neither each other nor the roof,
the floor imports nothing of the project, and each heavy library has its own few files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rollout", "trainers", "rewards")
PACKAGES = (*ROOMS, "treepo")

# library -> the only files that may import it
HOMES = {
    "ray": ("trainers/worker.py", "treepo/calls.py", "treepo/cluster.py", "treepo/seats.py"),
    "deepspeed": ("trainers/deepspeed_engine.py",),
    "peft": ("trainers/lora.py",),
    "hydra": ("treepo/cli.py",),
    "wandb": ("treepo/tracking.py",),
    "datasets": ("treepo/data.py",),
    "huggingface_hub": ("treepo/hub.py",),
    "math_verify": ("rewards/math.py",),
    "reasoning_gym": ("rewards/reasoning_gym.py", "treepo/data.py"),
    "triton": ("rollout/attention/triton_tree.py",),
    "flash_attn": ("treepo/base/flash_varlen.py",),
}
# Besides the standard library and what has a home above; None: anything.
THIRD_PARTY = {
    # safetensors comes with transformers
    "rollout": {"torch", "transformers", "numpy", "safetensors"},
    "trainers": {"torch", "transformers", "numpy", "safetensors"},
    "rewards": None,
    "treepo": None,
    "treepo.base": {"torch"},
}
ENTRY_MODULES = ("train", "sft", "evaluate", "export", "report", "clean")


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in a file of ``package``, wherever it stands;
    ``from a import b`` yields ``a.b``, and literal ``import_module`` calls count too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def complaint(file: str, module: str) -> str | None:
    """Why ``file`` (relative, with slashes) may not import ``module``; None if it may."""
    room = "treepo.base" if file.startswith("treepo/base/") else file.partition("/")[0]
    top = module.partition(".")[0]
    if top in PACKAGES:
        if room in ROOMS and not (within(module, room) or within(module, "treepo.base")):
            return f"the room {room}/ may import itself and treepo.base"
        if room == "treepo.base" and not within(module, "treepo.base"):
            return "the floor treepo/base/ may import nothing else of the project"
        return None
    if top in HOMES:
        return None if file in HOMES[top] else f"{top} belongs in {' or '.join(HOMES[top])} alone"
    allowed = THIRD_PARTY[room]
    if allowed is None or top in allowed or top in sys.stdlib_module_names:
        return None
    return f"{room} may import the standard library and {', '.join(sorted(allowed))}"


def forbidden_imports(root: Path) -> list[str]:
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            dotted = ".".join(path.relative_to(root).parent.parts)
            for line, module in imported_modules(ast.parse(path.read_text()), dotted):
                if reason := complaint(file, module):
                    found.append(f"{file}:{line} imports {module}: {reason}")
    return found


def test_no_import_goes_against_the_arrows_of_the_house() -> None:
    assert forbidden_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rollout/engine.py", "import trainers.batch"),
        ("rollout/engine.py", "from treepo.config import Config"),
        ("rollout/engine.py", "import ray"),
        ("rollout/worker.py", "import ray"),
        ("rollout/engine.py", "def f():\n    import rich"),
        ("trainers/losses.py", "from rollout.tree import Tree"),
        ("trainers/losses.py", "import deepspeed.comm"),
        ("rewards/pool.py", "import rollout"),
        ("rewards/pool.py", "import importlib\nimportlib.import_module('math_verify')"),
        ("trainers/learner.py", "import deepspeed"),
        ("trainers/learner.py", "from peft import LoraConfig"),
        ("treepo/base/keys.py", "import numpy"),
        ("treepo/base/keys.py", "from .. import config"),
        ("treepo/train.py", "from hydra import main"),
        ("treepo/train.py", "import wandb"),
        ("treepo/loop.py", "if 1:\n    from ray import remote"),
    ],
)
def test_a_forbidden_import_is_found_wherever_it_stands(
    tmp_path: Path, file: str, source: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(forbidden_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("trainers/worker.py", "import ray"),
        ("rollout/strategies/flat.py", "from .base import Strategy\nfrom ..tree import Tree"),
        ("rollout/engine.py", "from treepo.base.keys import uniforms\nimport torch, json"),
        ("treepo/base/digest.py", "from treepo.base.keys import mix64\nfrom . import keys"),
        ("treepo/loop.py", "import rollout.engine, trainers.batch\nfrom rewards import pool"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert forbidden_imports(tmp_path) == []


def settings_files() -> list[Path]:
    return sorted(
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*settings.py")
        if path.name == "settings.py" or path.name.endswith("_settings.py")
    )


def test_settings_import_nothing_heavier_than_the_standard_library() -> None:
    for path in settings_files():
        for line, module in imported_modules(ast.parse(path.read_text()), path.parent.name):
            is_settings = any(part.endswith("settings") for part in module.split("."))
            # These use the standard library only, too.
            is_settings |= within(module, "treepo.base.registry")
            is_settings |= within(module, "treepo.base.typed")
            assert module.partition(".")[0] in sys.stdlib_module_names or is_settings, (
                f"{path.relative_to(ROOT)}:{line} imports {module}"
            )


def test_packages_and_settings_load_without_torch() -> None:
    modules = [
        *PACKAGES,
        *(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in settings_files()),
    ]
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


HEAVY = ["torch", "transformers", "ray", "deepspeed", "wandb", "datasets"]


@pytest.mark.parametrize("name", ENTRY_MODULES)
def test_help_answers_without_loading_torch(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"treepo.{name}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"treepo.{name}" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & set(HEAVY)
