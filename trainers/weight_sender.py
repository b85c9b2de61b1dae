"""The two roads that weights leave the learner by: arrays for shared memory, and buckets for a
weight group. Both send what an engine stores, in its dtype, one tensor of each group of tied names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from trainers.weight_sync import cast, cast_manifest
from treepo.base.digest import WeightManifest, tensor_digest
from treepo.base.weight_buckets import (
    Run,
    bucket_bytes,
    manifest_to_json,
    plan_buckets,
    sent_specs,
)
from treepo.base.weight_group import WeightGroup

MAX_BUCKET_BYTES = 64 << 20


def shared_arrays(
    tensors: Mapping[str, torch.Tensor], manifest: WeightManifest
) -> dict[str, np.ndarray]:
    """The weights as numpy arrays, which an object store keeps out of band: its readers get views
    of shared memory, where tensors would be copied by whoever writes and whoever reads them.

    What numpy has no dtype for, such as bfloat16, is sent as integers of the same size.
    """
    return {spec.name: _array(tensors[spec.name]) for spec in sent_specs(manifest)}


def send_weights(
    group: WeightGroup,
    version: int,
    tensors: Mapping[str, torch.Tensor],
    dtype: str,
    max_bucket_bytes: int = MAX_BUCKET_BYTES,
) -> dict[str, int]:
    """Broadcast the weights as engines of ``dtype`` store them, cast tensor by tensor on the way.

    Returns:
        digests per tensor, as every receiver must compute them on what it stores.

    Raises:
        WeightGroupError: a receiver refuses or is missing (nothing was sent), or the transfer
            failed.
    """
    manifest = cast_manifest(tensors, dtype)
    offer = {
        "version": version,
        "max_bytes": max_bucket_bytes,
        "manifest": manifest_to_json(manifest),
    }
    group.offer(json.dumps(offer))
    cursor = _Cursor(tensors, dtype, manifest)
    buckets = list(plan_buckets(manifest, max_bucket_bytes))
    longest = max(map(bucket_bytes, buckets), default=0)
    buffer = torch.zeros(longest, dtype=torch.uint8, device=group.device)
    try:
        for runs in buckets:
            for run in runs:
                run.of(buffer).copy_(cursor.elements(run))
            group.broadcast(buffer[: bucket_bytes(runs)])
        group.confirm_received()
    except Exception as error:
        group.fail(str(error))  # so that no receiver waits for more
        raise
    return {spec.name: cursor.digests[spec.name] for spec in manifest.tensors}


class _Cursor:
    """The weights in sending order: one tensor is cast at a time, and checksummed under all its
    names.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], dtype: str, manifest: WeightManifest
    ) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._names = {group[0]: group for group in manifest.tied}
        self._current = ""
        self._flat = torch.empty(0)
        self.digests = {
            spec.name: tensor_digest(spec.name, cast(tensors[spec.name], dtype))
            for spec in manifest.tensors
            if 0 in spec.shape  # never sent
        }

    def elements(self, run: Run) -> torch.Tensor:
        if run.name != self._current:
            tensor = cast(self._tensors[run.name], self._dtype)
            self._current, self._flat = run.name, tensor.reshape(-1)
            for name in self._names.get(run.name, (run.name,)):
                self.digests[name] = tensor_digest(name, tensor)
        return self._flat[run.start : run.stop]


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.view({1: torch.uint8, 2: torch.int16}[tensor.itemsize]).numpy()
