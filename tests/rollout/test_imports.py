"""The decoding stack runs with torch, transformers and numpy alone."""

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
    "llguidance",
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
for path in sorted(Path("rollout").rglob("*.py")):
    if path.name != "triton_tree.py":  # Triton's own file
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        importlib.import_module(module)
        print(module)
import transformers
from rollout import Engine, EngineSettings, ExtendSpec
config = transformers.LlamaConfig(
    vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
)
model = transformers.LlamaForCausalLM(config)
engine = Engine(model, EngineSettings(num_kv_slots=256))
(found,) = engine.extend([(engine.prefill([3, 4, 5]), ExtendSpec(max_tokens=4), 1)])
assert len(found.token_ids) == 4
print("decoded")
"""


def test_all_of_rollout_loads_and_decodes_where_nothing_else_is_installed():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THEM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    modules = done.stdout.split()
    assert {"rollout.engine", "rollout.worker", "rollout.attention.cpu"} <= set(modules)
    assert len(modules) > 30 and modules[-1] == "decoded"
