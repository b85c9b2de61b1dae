"""How a weight set is cut into buckets of a bounded number of bytes.

Sender and receivers compute the same cut from the manifest alone, so that nothing but bytes has to
travel. A large tensor is cut into runs of elements; small ones share a bucket. Of a group of tied
names the first is sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from treepo.base.digest import TensorSpec, WeightManifest

_ALIGNMENT = 16  # bytes: a run starts where any dtype may start


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Elements ``start`` to ``stop`` (tensor flattened) of one tensor, in one bucket.

    Attributes:
        offset: byte of the bucket where the run begins.
    """

    name: str
    dtype: torch.dtype
    start: int
    stop: int
    offset: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * self.dtype.itemsize

    def of(self, bucket: torch.Tensor) -> torch.Tensor:
        """View of the run's elements [stop - start] in a bucket (uint8 [bytes])."""
        return bucket[self.offset : self.offset + self.num_bytes].view(self.dtype)


def plan_buckets(manifest: WeightManifest, max_bytes: int) -> Iterator[tuple[Run, ...]]:
    """The runs of each bucket, in manifest order; no bucket is longer than ``max_bytes``.

    Raises:
        ValueError: ``max_bytes`` is below one aligned element (16).
    """
    if max_bytes < _ALIGNMENT:
        raise ValueError(f"a bucket of {max_bytes} bytes is too small: at least {_ALIGNMENT}")
    bucket: list[Run] = []
    used = 0
    for spec in sent_specs(manifest):
        dtype, done, total = dtype_of(spec), 0, math.prod(spec.shape)
        while done < total:
            offset = -(-used // _ALIGNMENT) * _ALIGNMENT
            fits = (max_bytes - offset) // dtype.itemsize
            if fits <= 0:
                yield tuple(bucket)
                bucket, used = [], 0
                continue
            stop = min(total, done + fits)
            run = Run(name=spec.name, dtype=dtype, start=done, stop=stop, offset=offset)
            bucket.append(run)
            done, used = stop, offset + run.num_bytes
    if bucket:
        yield tuple(bucket)


def bucket_bytes(runs: tuple[Run, ...]) -> int:
    """Length of the bucket that holds ``runs``."""
    return runs[-1].offset + runs[-1].num_bytes


def sent_specs(manifest: WeightManifest) -> list[TensorSpec]:
    """What has to travel: all but the second and later of tied names."""
    implied = {name for group in manifest.tied for name in group[1:]}
    return [spec for spec in manifest.tensors if spec.name not in implied]


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype that a manifest names."""
    return getattr(torch, spec.dtype.removeprefix("torch."))


def manifest_to_json(manifest: WeightManifest) -> str:
    """Text that :func:`manifest_from_json` reads."""
    tensors = [[spec.name, spec.dtype, list(spec.shape)] for spec in manifest.tensors]
    return json.dumps({"tensors": tensors, "tied": manifest.tied})


def manifest_from_json(text: str) -> WeightManifest:
    """The manifest that :func:`manifest_to_json` wrote."""
    read = json.loads(text)
    return WeightManifest(
        tensors=tuple(
            TensorSpec(name=name, dtype=dtype, shape=tuple(shape))
            for name, dtype, shape in read["tensors"]
        ),
        tied=tuple(tuple(group) for group in read["tied"]),
    )
