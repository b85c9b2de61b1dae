"""A process with torch, transformers and numpy, and none of the project's other libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    *("ray", "deepspeed", "hydra", "omegaconf", "wandb", "datasets", "llguidance"),
    *("flash_attn", "triton", "math_verify", "reasoning_gym"),
)
LOAD = f"""
import importlib, sys
for name in {ABSENT}:
    sys.modules[name] = None  # an import of it raises ImportError
from pathlib import Path
for path in sorted(Path(PACKAGE).rglob("*.py")):
    if path.name not in BUT:
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        importlib.import_module(module)
        print(module)
"""


def load_all_and_run(package: str, code: str, but: tuple[str, ...] = ()) -> list[str]:
    """Import every module of ``package`` except files named ``but``, then run ``code``; returns the
    modules' names and the words that the code printed.
    """
    text = f"PACKAGE, BUT = {package!r}, {but!r}\n{LOAD}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()
