"""The GPU benchmark of training, tried on a CPU: its workloads, its counts and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_tree_training
import pytest
import torch
from gpu_tree_training import FLAT, TREE, kernels, measure
from training_trees import Workload

from trainers.attention.flex import BLOCK

ROOT = Path(__file__).resolve().parents[2]


def test_rows_hold_about_8192_tokens_in_paths_of_2048():
    for name, work in gpu_tree_training.gpu_workloads(quick=False).items():
        assert work.token_ratio == pytest.approx(float(name), rel=0.02)
        assert work.path_length == 2048 and abs(work.tree_tokens - 8192) <= 32


def test_the_flat_side_takes_flash_attn_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(gpu_tree_training, "find_spec", lambda name: name)
    assert kernels("cuda") == {TREE: "flex", FLAT: "flash"}
    monkeypatch.setattr(gpu_tree_training, "find_spec", lambda name: None)
    assert kernels("cuda:1") == {TREE: "flex", FLAT: "sdpa"}
    assert kernels("cpu") == {TREE: "auto", FLAT: "sdpa"}


def test_both_sides_have_the_same_gradients_and_blocks_are_counted():
    model = gpu_tree_training.random_model("tiny", "cpu")
    gpu_tree_training.attention.register()
    model.set_attn_implementation(gpu_tree_training.attention.NAME)
    policy = gpu_tree_training.PolicyModel(model)
    # a root of two blocks, and three leaves of one each behind it: 6 of causal pairs of blocks in
    # the first leaf's path, 3 for each of the others
    work = Workload(num_trees=1, levels=((1, 2 * BLOCK), (3, BLOCK)))
    found = measure(policy, work, "cpu", 1)
    assert found.gradient_error < 1e-4
    assert found.block_pairs == (6 + 3 + 3) * BLOCK**2
    assert set(found.seconds) == {TREE, FLAT} == set(found.peak_bytes)


@pytest.mark.long
def test_the_benchmark_runs_on_a_cpu_where_deepspeed_and_the_like_are_absent(tmp_path):
    path = tmp_path / "found.json"
    code = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'hydra', 'wandb', 'datasets', 'flash_attn'):\n"
        "    sys.modules[name] = None\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import gpu_tree_training\n"
        "gpu_tree_training.main(['--quick', '--device', 'cpu', '--shapes', 'tiny', '--json', "
        f"{str(path)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of the token ratio" in done.stdout
    report = json.loads(path.read_text())
    gates = {gate["name"]: gate["at_most"] for gate in report["gates"]}
    assert gates["gradient error"] == 1e-4
    assert gates["time over flat without sharing, tiny"] == 1.02
    assert report["settings"]["attention"] == {"tree": "auto", "flat": "sdpa"}
    for name, counts in report["counts"].items():
        assert counts["flat_pairs"] >= counts["visible_pairs"]
        assert report["ratios"]["gradient_error"]["tiny"][name] < 1e-4
        assert report["ratios"]["speedup"]["tiny"][name] > 0


def test_without_a_gpu_the_benchmark_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_tree_training.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
