"""Each benchmark's quick version runs, keeps its time and writes the ratios it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shapes import qwen3_7m

from trainers.packing import ROW_MULTIPLE

ROOT = Path(__file__).resolve().parent.parent.parent
RATIOS = {
    "attention": {"per_node_vs_gathered", "median"},
    "sampler": {"vs_textbook", "vs_transformers", "worst_vs_textbook"},
    "rollout_vs_transformers": {"vs_generate", "vs_generate_batch", "worst_vs_best_peer"},
    "tree_vs_flat": {"trajectories_per_s", "tokens_per_s", "query_tokens", "kv_over_unique"},
    "tree_training": {"speedup", "token_ratio", "flat_overhead", "gradient_error"},
    "weight_sync": {"vs_tensors", "private_bytes_over_weights"},
    "segment_rollout": {f"{kind}_{n}" for kind in ("speedup", "iterations") for n in (2, 4, 8)},
    "host_overhead": {"host_share", "host_and_sampling_share"},
}


def quick_run(name: str, folder: Path) -> dict:
    path = folder / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--json", path]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{name}: {time.monotonic() - began:.0f} s")
    report = json.loads(path.read_text())
    assert report["name"] == name and report["settings"]["quick"] is True
    assert RATIOS[name] <= set(report["ratios"])
    assert report["counts"] and report["timings"] and report["gates"]
    return report


def test_the_attention_benchmark_runs(tmp_path):
    report = quick_run("attention", tmp_path)
    # 512 shared and 16 x 32 own keys, read once each or once a path
    (read,) = {json.dumps(keys) for keys in report["counts"]["keys_read"].values()}
    assert json.loads(read) == {"per_node": 512 + 16 * 32, "gathered": 16 * (512 + 32)}


def test_the_sampler_benchmark_runs_and_draws_what_the_textbook_draws(tmp_path):
    report = quick_run("sampler", tmp_path)
    assert report["counts"]["draws"] == report["counts"]["as_textbook"]


@pytest.mark.long
def test_the_comparison_with_transformers_runs_and_forwards_each_token_once(tmp_path):
    report = quick_run("rollout_vs_transformers", tmp_path)
    counts = report["counts"]["query_tokens"]
    assert counts["float32, prompt 128, n=16"] == 128 + 16 * 15
    assert counts["bfloat16, prompt 64, n=8"] == 64 + 8 * 7


@pytest.mark.long
def test_the_comparison_of_tree_and_flat_runs_and_its_token_ratio_is_exact(tmp_path):
    report = quick_run("tree_vs_flat", tmp_path)
    assert all(gate["passed"] for gate in report["gates"])
    for depth in ("4", "7"):
        counts = report["counts"][depth]
        assert counts["tree"]["query_tokens"] == counts["expected_query_tokens"]["tree"]
        assert counts["flat"]["query_tokens"] == counts["expected_query_tokens"]["flat"]


@pytest.mark.long
def test_the_measurement_of_host_work_runs_and_its_shares_are_shares(tmp_path):
    report = quick_run("host_overhead", tmp_path)
    for running, share in report["ratios"]["host_share"].items():
        # What is left of a step without its parts: a difference of medians, which noise can push
        # below 0 where it is small.
        assert -0.1 < share < report["ratios"]["host_and_sampling_share"][running] < 1


@pytest.mark.long
def test_the_benchmark_of_segments_runs_and_takes_fewer_iterations(tmp_path):
    report = quick_run("segment_rollout", tmp_path)
    assert all(gate["passed"] for gate in report["gates"])
    runs = report["counts"]["runs"]
    assert {run["generated_tokens"] for run in runs.values()} == {
        report["counts"]["trained_tokens"]
    }


@pytest.mark.long
def test_the_comparison_of_roads_for_weights_runs_and_shared_memory_takes_no_private_copy(tmp_path):
    report = quick_run("weight_sync", tmp_path)
    counts = report["counts"]
    assert counts["buckets"] == 1 and counts["transfers"] == 3 * (3 + 1)
    assert counts["weight_bytes"] == 2 * sum(p.numel() for p in qwen3_7m().parameters())
    assert report["ratios"]["private_bytes_over_weights"]["object_store"] < 0.5


@pytest.mark.long
def test_the_comparison_of_training_on_trees_and_paths_runs_and_gradients_are_equal(tmp_path):
    report = quick_run("tree_training", tmp_path)
    assert report["ratios"]["gradient_error"] < 1e-4
    for counts in report["counts"].values():
        pairs = counts["pairs"]
        padding = pairs["tree"] - pairs["visible"]  # such a token sees itself
        assert 0 <= padding < ROW_MULTIPLE and pairs["visible"] <= pairs["flat"]
