"""Both roads of weights with real actors: the same run, and a worker that dies on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import ray
from training_runs import run

from rollout.growth import GrowthLimits
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings
from rollout.tree import Tree
from trainers.settings import LearnerSettings
from treepo.calls import WorkerLost
from treepo.cluster import Cluster
from treepo.config import ClusterConfig
from treepo.sync import publish_weights
from treepo.tracking import read_rows

GOLDEN = [np.array([5, 6, 7, 8, 9, 10], np.int32)]


@pytest.mark.long
def test_a_run_is_the_same_to_the_last_bit_whichever_road_its_weights_take(tmp_path):
    results = {}
    for transport in ("object_store", "group"):
        outputs = tmp_path / transport
        done = run(
            outputs,
            "trainer.total_steps=2",
            "trainer.learner.optimizer.lr_warmup_steps=0",
            "cluster.num_rollout_workers=2",
            f"cluster.weight_transport={transport}",
        )
        assert done.returncode == 0, done.stderr
        folder = (outputs / "latest").resolve()
        rows = [
            {
                k: v
                for k, v in row.items()
                if not k.startswith(("time", "timing_s/", "perf/", "rollout/tokens_per_second"))
            }
            for row in read_rows(folder / "metrics.jsonl")
        ]
        summary = json.loads((folder / "summary.json").read_text())
        trees = [file.read_text() for file in sorted((folder / "trees").iterdir())]
        results[transport] = rows, summary["digest"], summary["after"], trees
    assert results["group"] == results["object_store"]
    rows = results["group"][0]
    assert [row["training/policy_version"] for row in rows if row["step"]] == [1.0, 2.0]


@pytest.fixture(scope="module")
def cluster(tiny_model_path):
    """One learner and two rollout workers that meet by a weight group."""
    config = ClusterConfig(
        num_rollout_workers=2, weight_transport="group", weight_timeout_seconds=3.0
    )
    with Cluster(config=config) as cluster:
        cluster.start_rollout(str(tiny_model_path), EngineSettings(num_kv_slots=512))
        cluster.start_learners(str(tiny_model_path), LearnerSettings(num_threads=1))
        cluster.wait_until_ready()
        yield cluster


def versions(cluster):
    return cluster.on_rollout("policy_version")


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda worker: os.getpid()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_reads_the_object_store_s_own_memory(cluster, dtype):
    def not_read_in_place(worker, arrays):
        lines = [line.split() for line in open("/proc/self/maps") if "plasma" in line]
        regions = [[int(edge, 16) for edge in line[0].split("-")] for line in lines]
        starts = {name: a.__array_interface__["data"][0] for name, a in arrays.items()}
        return [
            name
            for name, start in starts.items()
            if arrays[name].flags.writeable or not any(low <= start < high for low, high in regions)
        ]

    learner, worker = cluster.learners[0], cluster.rollout[0]
    _, _, arrays = learner.publication.options(num_returns=3).remote(dtype)
    assert len(ray.get(arrays)) > 10
    assert ray.get(worker.__ray_call__.remote(not_read_in_place, arrays)) == []


def test_publications_pass_and_a_failed_one_leaves_engines_that_refuse_work_until_the_next(cluster):
    for version in (1, 2):
        metrics = publish_weights(cluster, version, "float32", GOLDEN)
        assert metrics["sync/golden_logprob_diff_max"] < 1e-4
        assert versions(cluster) == [version] * 2
    # Engines of one dtype, weights of another: all refuse before anything moves.
    with pytest.raises(ValueError, match="is torch.bfloat16 .* expected torch.float32"):
        publish_weights(cluster, 3, "bfloat16", GOLDEN)
    assert versions(cluster) == [2, 2]
    for worker in cluster.rollout:
        with pytest.raises(ValueError, match="refuses work"):
            ray.get(worker.sample.remote([], "flat", FlatSettings(), 2))
    publish_weights(cluster, 4, "float32", GOLDEN)
    assert cluster.on_rollout("sample", [], "flat", FlatSettings(), 4)[0][0] == []


def test_trees_put_aside_go_on_under_published_weights_on_any_worker(cluster):
    """The learner has not trained, so the trees are those of one piece; their versions are not."""
    settings = FlatSettings(n=3, max_response_length=12)
    prompts = [
        Prompt(problem_id=str(i), token_ids=np.arange(3, 6 + i, dtype=np.int32), root_key=i)
        for i in range(3)
    ]
    (held, _) = versions(cluster)
    expected, _ = cluster.sample(prompts, "flat", settings, held)
    work, drawn = list(prompts), 0
    for version in (held, held + 1, held + 2):
        if version != held:
            publish_weights(cluster, version, "float32", GOLDEN)
        # One less in the work of the second call: every tree goes to the other worker.
        given = work[1:] + work[:1]
        limits = GrowthLimits(segment_length=4)
        grown, ledger = cluster.grow(given, "flat", settings, version, limits, [1.0, 3.0, 2.0])
        work, drawn = grown[-1:] + grown[:-1], drawn + ledger.generated_tokens
    assert drawn == 3 * 3 * 12
    for tree, other in zip(work, expected, strict=True):
        assert isinstance(tree, Tree) and tree.same_tokens(other)
        drawn_by = np.repeat([held, held + 1, held + 2], 4)
        assert all(np.array_equal(s.policy_versions, drawn_by) for s in tree.segments[1:])


def test_a_worker_killed_during_a_transfer_is_named_and_the_others_do_not_hang(cluster):
    publish_weights(cluster, 7, "float32", GOLDEN)
    victim = pid_of(cluster.rollout[1])
    os.kill(victim, signal.SIGSTOP)  # it takes no part, and dies while the others wait for it
    threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(WorkerLost, match="rollout worker 1 of 2 died"):
        publish_weights(cluster, 8, "float32", GOLDEN)
    assert time.monotonic() - began < 15
    survivor = cluster.rollout[0]
    assert ray.get(survivor.policy_version.remote(), timeout=10) == 7
    with pytest.raises(ValueError, match="refuses work"):
        ray.get(survivor.sample.remote([], "flat", FlatSettings(), 7))
    assert ray.get(cluster.learners[0].ping.remote(), timeout=10) == 0
