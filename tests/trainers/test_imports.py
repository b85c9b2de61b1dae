"""Packing and the policy with its attention run with torch, transformers and numpy alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "ray",
    "deepspeed",
    "hydra",
    "omegaconf",
    "wandb",
    "datasets",
    "flash_attn",
    "triton",
    "math_verify",
    "reasoning_gym",
)
WITHOUT_THEM = f"""
import importlib, sys
for name in {ABSENT}:
    sys.modules[name] = None  # an import of it raises ImportError
from pathlib import Path
for path in sorted(Path("trainers").rglob("*.py")):
    if path.name not in ("learner.py", "worker.py"):
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        importlib.import_module(module)
        print(module)
import torch, transformers
from trainers import attention
from trainers.model import PolicyModel
from trainers.packing import pack_row, path_tree
attention.register()
config = transformers.LlamaConfig(
    vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
logprobs, _ = PolicyModel(model)(pack_row([path_tree(torch.arange(9))]), torch.arange(1, 9))
logprobs.sum().backward()
print("trained")
"""


def test_all_of_trainers_but_learner_and_worker_loads_and_trains_where_nothing_else_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THEM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    modules = done.stdout.split()
    assert "trainers.attention.flex" in modules and "trainers.packing" in modules
    assert len(modules) > 15 and modules[-1] == "trained"
