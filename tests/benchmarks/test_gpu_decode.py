"""The bound of the GPU benchmark against numbers worked out by hand, and its logic on a CPU."""

from __future__ import annotations

import json

import gpu_decode
import pytest
import torch
from roofline import Costs, Machine, Step, Workload, total_bound

# Two prompts of 10 tokens, two segments of 3 tokens below each, and two of 2 below each of those.
TREE = Workload(name="tree", num_prompts=2, prompt_length=10, levels=((2, 3), (4, 2)))


def test_the_steps_of_a_tree_are_those_worked_out_by_hand():
    assert TREE.num_leaves == 8 and TREE.depth == 5 and TREE.num_generated == 2 * (6 + 8)
    assert TREE.prefill() == Step(rows=20, unique=20, attended=2 * 55)
    assert TREE.decode() == [
        # per prompt: 2 paths with one own token, then two
        Step(rows=4, unique=2 * 12, attended=4 * 11),
        Step(rows=4, unique=2 * 14, attended=4 * 12),
        # their third token is forwarded once for both segments below
        Step(rows=4, unique=2 * 16, attended=4 * 13),
        Step(rows=8, unique=2 * 20, attended=8 * 14),
    ]


def test_a_step_takes_as_long_as_the_slower_of_reading_and_multiplying():
    costs = Costs(weight_bytes=1000, matmul_params=500, kv_bytes=10, attention_flops=4)
    step = Step(rows=2, unique=30, attended=50)  # reads 1300 bytes, 2200 operations
    assert step.bound(costs, Machine(bytes_per_s=100, flops_per_s=1e9)) == 13.0
    assert step.bound(costs, Machine(bytes_per_s=1e9, flops_per_s=1100)) == 2.0
    machine = Machine(bytes_per_s=100, flops_per_s=1e9)
    assert total_bound([step, step], costs, machine) == 26.0


def test_a_models_costs_are_those_of_its_shape():
    model = gpu_decode.random_model("tiny", "cpu")
    layer = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    costs = Costs.of(model)
    assert costs.weight_bytes == 4 * (2 * layer + 64 + 512 * 64)  # not the input embedding
    assert costs.matmul_params == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64
    assert costs.kv_bytes == 2 * 2 * 16 * 4 * 2
    assert costs.attention_flops == 4 * 4 * 16 * 2


@pytest.mark.long
def test_the_benchmark_runs_on_a_cpu_and_forwards_what_the_bound_counts(tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["--quick", "--device", "cpu", "--shapes", "tiny", "--json", str(path)]
    gpu_decode.main(arguments)
    report = json.loads(path.read_text())
    assert set(report["ratios"]) == {
        *("of_bound", "decode_of_bound", "vs_no_sharing", "vs_generate_batch")
    }
    for name in ("tiny flat", "tiny tree"):
        counts, timings = report["counts"][name], report["timings"][name]
        assert counts["query_tokens"] == counts["expected_query_tokens"]
        assert all(name in ratios for ratios in report["ratios"].values()), timings["trouble"]
        assert 0 < timings["decode_bound_seconds"] < timings["bound_seconds"]
        assert 0 < timings["decode_seconds"][0] < timings["seconds"]["ours"][0]
    assert "of the bound" in capsys.readouterr().out


def test_without_a_gpu_the_benchmark_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_decode.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
