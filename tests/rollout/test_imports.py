"""The decoding stack runs with torch, transformers and numpy alone."""

from __future__ import annotations

from bare_machine import load_all_and_run

DECODES = """
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
    printed = load_all_and_run("rollout", DECODES, but=("triton_tree.py",))  # Triton's own file
    assert {"rollout.engine", "rollout.worker", "rollout.attention.cpu"} <= set(printed)
    assert len(printed) > 30 and printed[-1] == "decoded"
