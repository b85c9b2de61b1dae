"""Weights from a weight group into an engine, bucket by bucket.

The engine looks at the manifest before this member accepts the offer, and copies each bucket when
it has arrived: besides the model there is never more than one bucket.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch

from rollout.weights import Part
from treepo.base.digest import WeightManifest
from treepo.base.weight_buckets import bucket_bytes, manifest_from_json, plan_buckets
from treepo.base.weight_group import WeightGroup

# (manifest, parts) -> digests of what is stored. It must check the manifest before it asks for the
# first part.
Load = Callable[[WeightManifest, Iterator[Part]], dict[str, int]]


def receive_weights(group: WeightGroup, version: int, load: Load) -> dict[str, int]:
    """Take the weight set that the sender offers next, as ``version``, with ``load``.

    Returns:
        what ``load`` returned.

    Raises:
        ValueError: ``load`` refused the manifest, or another version is offered; the sender and
            the other receivers know, and nothing was sent.
        WeightGroupError, TornWeights: the transfer failed.
    """
    offer = json.loads(group.next_offer())
    accepted = False

    def parts() -> Iterator[Part]:
        nonlocal accepted
        accepted = True
        group.accept()
        yield from _arriving(group, manifest, offer["max_bytes"])
        group.confirm_received()

    manifest = manifest_from_json(offer["manifest"])
    try:
        if offer["version"] != version:
            raise ValueError(f"weights {offer['version']} are offered, {version} are expected")
        return load(manifest, parts())
    except Exception as error:
        # Whatever it is, the others must not wait for this member.
        if accepted:
            group.fail(str(error))
        else:
            group.refuse(str(error))
        raise


def _arriving(group: WeightGroup, manifest: WeightManifest, max_bytes: int) -> Iterator[Part]:
    buckets = list(plan_buckets(manifest, max_bytes))
    longest = max(map(bucket_bytes, buckets), default=0)
    buffer = torch.empty(longest, dtype=torch.uint8, device=group.device)
    for runs in buckets:
        group.broadcast(buffer[: bucket_bytes(runs)])
        for run in runs:
            yield Part(run.name, run.start, run.of(buffer))
