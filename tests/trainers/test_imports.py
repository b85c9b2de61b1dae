"""Packing and the policy with its attention run with torch, transformers and numpy alone."""

from __future__ import annotations

from bare_machine import load_all_and_run

TRAINS = """
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
    but = ("deepspeed_engine.py", "learner.py", "worker.py")
    printed = load_all_and_run("trainers", TRAINS, but)
    assert "trainers.attention.flex" in printed and "trainers.packing" in printed
    assert len(printed) > 15 and printed[-1] == "trained"
