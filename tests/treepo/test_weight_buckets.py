"""A weight set cut into buckets and put together again is the same set."""

from __future__ import annotations

import random

import pytest
import torch

from treepo.base.digest import TensorSpec, WeightManifest, manifest_of
from treepo.base.weight_buckets import (
    bucket_bytes,
    manifest_from_json,
    manifest_to_json,
    plan_buckets,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def random_tensors(rng: random.Random) -> dict[str, torch.Tensor]:
    tensors = {}
    for i in range(rng.randint(1, 8)):
        shape = tuple(rng.randint(0, 9) for _ in range(rng.randint(0, 3)))
        tensors[f"t{i}"] = torch.randint(0, 2, shape).to(rng.choice(DTYPES))
        if rng.random() < 0.3:
            tensors[f"tied{i}"] = tensors[f"t{i}"]
    return tensors


@pytest.mark.parametrize("seed", range(40))
def test_buckets_are_bounded_and_carry_every_element_once_and_in_order(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = random_tensors(rng)
    limit = rng.choice([16, 17, 40, 100, 10_000])
    rebuilt = {name: [] for name in tensors}
    plan = list(plan_buckets(manifest_of(tensors), limit))
    for runs in plan:
        assert 0 < bucket_bytes(runs) <= limit
        bucket = torch.zeros(bucket_bytes(runs), dtype=torch.uint8)
        for run in runs:
            run.of(bucket).copy_(tensors[run.name].reshape(-1)[run.start : run.stop])
        for run in runs:  # after all were written: runs of a bucket don't overlap
            assert run.start == sum(map(len, rebuilt[run.name]))
            rebuilt[run.name].append(run.of(bucket).clone())
    for name, tensor in tensors.items():
        if name.startswith("tied") and tensor.numel():
            assert not rebuilt[name]
        elif tensor.numel():
            assert torch.equal(torch.cat(rebuilt[name]).reshape(tensor.shape), tensor)
    order = [run.name for runs in plan for run in runs]
    assert order == sorted(order, key=list(tensors).index)


def test_a_small_set_is_one_bucket_and_a_large_tensor_many():
    sent = {"a": torch.zeros(3), "b": torch.zeros(1000, dtype=torch.bfloat16), "c": torch.zeros(2)}
    (runs,) = plan_buckets(manifest_of(sent), 1 << 20)
    assert [(run.name, run.offset) for run in runs] == [("a", 0), ("b", 16), ("c", 2016)]
    # 12 bytes of a, padding to 16, then 24 elements of b; 32 a bucket; the last holds 16 and c
    cut = list(plan_buckets(manifest_of(sent), 64))
    assert [(run.start, run.stop) for run in cut[0]] == [(0, 3), (0, 24)]
    assert [run.stop - run.start for runs in cut[1:-1] for run in runs] == [32] * 30
    assert [(run.name, run.start, run.stop) for run in cut[-1]] == [("b", 984, 1000), ("c", 0, 2)]


def test_a_bucket_too_small_for_an_element_is_refused():
    with pytest.raises(ValueError, match="a bucket of 8 bytes is too small"):
        list(plan_buckets(manifest_of({"a": torch.zeros(3)}), 8))


def test_a_manifest_survives_as_text():
    manifest = WeightManifest(
        tensors=(
            TensorSpec(name="embed", dtype="torch.bfloat16", shape=(5, 4)),
            TensorSpec(name="head", dtype="torch.bfloat16", shape=(5, 4)),
            TensorSpec(name="count", dtype="torch.int64", shape=()),
        ),
        tied=(("embed", "head"),),
    )
    assert manifest_from_json(manifest_to_json(manifest)) == manifest
