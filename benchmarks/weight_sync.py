"""New weights on their way to two engines: broadcast group, arrays in shared memory, plain tensors.

Real actors: one process with the learner's weights in float32, two rollout workers that store them
in bfloat16, all on this machine. A transfer is timed from the cast to the digests of what both
engines store. Three roads take turns: ``group`` broadcasts buckets (gloo here), ``object_store``
puts numpy arrays into Ray's object store and engines read them where they lie, and ``tensors`` puts
torch tensors there, which Ray copies on both sides: what one gets without care.

Beside time: how much private memory a receiver needs while weights arrive.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    Gate,
    Options,
    Report,
    device_in_words,
    finish,
    parse_args,
    print_table,
    run_paired,
    speedup,
)
from shapes import qwen2, qwen3_7m

from rollout.settings import EngineSettings
from rollout.worker import RolloutWorker
from trainers.weight_sender import MAX_BUCKET_BYTES, send_weights, shared_arrays
from trainers.weight_sync import prepare
from treepo.base.weight_buckets import bucket_bytes, plan_buckets
from treepo.base.weight_group import SENDER, WeightGroup, open_store

NUM_ENGINES = 2
DTYPE = "bfloat16"
MEMBERS = ["learner", *(f"engine {rank}" for rank in range(NUM_ENGINES))]
TIMEOUT = 120.0
ROADS = ("group", "object_store", "tensors")


class Sender:
    """The process with the learner's weights."""

    def __init__(self, model_path: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self.state = dict(model.state_dict())

    def open(self) -> tuple[str, int]:
        self.store = open_store("127.0.0.1", TIMEOUT)
        return "127.0.0.1", self.store.port

    def join(self) -> None:
        device = torch.device("cpu")
        self.group = WeightGroup(
            self.store, SENDER, MEMBERS, device=device, timeout_seconds=TIMEOUT
        )

    def broadcast(self, version: int) -> dict[str, int]:
        return send_weights(self.group, version, self.state, DTYPE)

    def publish(self, as_arrays: bool) -> tuple[Any, dict[str, int], dict[str, Any]]:
        sent = prepare(self.state, DTYPE)
        if as_arrays:
            return sent.manifest, sent.digests, shared_arrays(sent.tensors, sent.manifest)
        return sent.manifest, sent.digests, sent.tensors


class Receiver(RolloutWorker):
    """A rollout worker that watches its own memory."""

    def watched(self, method: str, *arguments: Any) -> tuple[dict[str, int], int]:
        """The method's answer, and the most private memory in bytes above that at its start."""
        before, peak, is_over = _private_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not is_over.wait(0.005):
                peak = max(peak, _private_bytes() - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            return getattr(self, method)(*arguments), peak
        finally:
            is_over.set()
            watcher.join()

    def load(self, version: int, manifest: Any, tensors: Any) -> tuple[dict[str, int], int]:
        """``load_weights``, whose arguments Ray has unpacked before anything is watched."""
        return self.load_weights(version, manifest, tensors), _private_bytes()


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon in /proc/self/status")


class Roads:
    """Each road as a call that ends when both engines have proved what they store."""

    def __init__(self, sender: Any, receivers: Sequence[Any]) -> None:
        import ray

        self.get = ray.get
        self.sender, self.receivers = sender, receivers
        self.version = 0
        self.private_bytes: dict[str, int] = dict.fromkeys(ROADS, 0)
        address = ray.get(sender.open.remote())
        ray.get(
            [
                sender.join.remote(),
                *(r.join_weight_group.remote(address, MEMBERS, TIMEOUT) for r in receivers),
            ]
        )

    def group(self) -> None:
        self.version += 1
        sent = self.sender.broadcast.remote(self.version)
        answers = [r.watched.remote("receive_weights", self.version) for r in self.receivers]
        self._prove("group", self.get(sent), self.get(answers))

    def object_store(self) -> None:
        self._through_the_store("object_store", True)

    def tensors(self) -> None:
        self._through_the_store("tensors", False)

    def _through_the_store(self, road: str, as_arrays: bool) -> None:
        self.version += 1
        call = self.sender.publish.options(num_returns=3)
        manifest, digests, tensors = call.remote(as_arrays)
        before = [self.get(r.__ray_call__.remote(_call(_private_bytes))) for r in self.receivers]
        loads = [r.load.remote(self.version, manifest, tensors) for r in self.receivers]
        answers = [
            (found, during - start)
            for (found, during), start in zip(self.get(loads), before, strict=True)
        ]
        self._prove(road, self.get(digests), answers)

    def _prove(self, road: str, expected: dict[str, int], answers: Sequence[Any]) -> None:
        for found, private in answers:
            assert found == expected
            self.private_bytes[road] = max(self.private_bytes[road], private)


def _call(function: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda worker: function()


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(__doc__, argv)
    model = qwen3_7m() if options.quick else qwen2("0.5b", num_layers=6)
    manifest = prepare(dict(model.state_dict()), DTYPE).manifest
    buckets = [bucket_bytes(runs) for runs in plan_buckets(manifest, MAX_BUCKET_BYTES)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        seconds, roads = _measure(folder, rounds=3 if options.quick else 7)
    _report(seconds, roads, buckets, options)


def _measure(model_path: str, rounds: int) -> tuple[dict[str, list[float]], Roads]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        num_cpus=1 + NUM_ENGINES,
    )
    try:
        sender = ray.remote(Sender).remote(model_path)
        receivers = [ray.remote(Receiver).remote(rank) for rank in range(NUM_ENGINES)]
        settings = EngineSettings(dtype=DTYPE, num_kv_slots=512)
        ray.get([receiver.setup.remote(model_path, settings) for receiver in receivers])
        roads = Roads(sender, receivers)
        runs = {road: getattr(roads, road) for road in ROADS}
        return run_paired(runs, rounds=rounds), roads
    finally:
        ray.shutdown()


def _report(
    seconds: Mapping[str, list[float]], roads: Roads, buckets: Sequence[int], options: Options
) -> None:
    total = sum(buckets)
    gains = {road: speedup(dict(seconds), road, "tensors") for road in ROADS[:2]}
    rows = [
        (
            road,
            sorted(seconds[road])[len(seconds[road]) // 2],
            gains[road].median if road in gains else 1.0,
            roads.private_bytes[road] / total,
        )
        for road in ROADS
    ]
    header = ("road", "seconds", "times as fast as tensors", "private bytes a byte of weights")
    print_table(f"{total / 1e6:,.0f} MB of weights to {NUM_ENGINES} engines", header, rows)
    finish(
        Report(
            name="weight_sync",
            device=device_in_words(threads=1),
            settings={
                "quick": options.quick,
                "model": "Qwen3, 7M" if options.quick else "Qwen2.5-0.5B's shape, 6 layers",
                "engines": NUM_ENGINES,
                "dtype": DTYPE,
                "max_bucket_bytes": MAX_BUCKET_BYTES,
            },
            ratios={
                "vs_tensors": {road: gains[road].median for road in gains},
                "private_bytes_over_weights": {
                    road: roads.private_bytes[road] / total for road in ROADS
                },
            },
            counts={
                "weight_bytes": total,
                "buckets": len(buckets),
                "largest_bucket": max(buckets),
                "transfers": roads.version,
            },
            timings={"seconds": dict(seconds), "vs_tensors": gains},
            gates=[
                Gate(
                    name="arrays in shared memory against tensors",
                    value=gains["object_store"].median,
                    at_least=1.0,
                )
            ],
        ),
        options,
    )


if __name__ == "__main__":
    main()
