"""Proof that two processes hold the same weights: a manifest of what is sent and a checksum of what
is stored.

The checksum is 64 bits a tensor, computed on the tensor's device over its bytes as stored, and
sensitive to the tensor's name, dtype, shape and to the order of its elements: a flipped bit, two
tensors swapped or a transposed one change it. It guards against mistakes and corruption, not
against an adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from treepo.base.keys import mix64, mix64_in_place, to_signed

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Words mixed at one time: what stays in a core's cache, or enough to keep another device busy.
_CPU_CHUNK, _OTHER_CHUNK = 1 << 16, 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a weight set: its name in ``state_dict`` order, dtype and shape as the
    receiving engine stores it.
    """

    name: str
    dtype: str  # e.g. "torch.bfloat16"
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightManifest:
    """What a weight set consists of, in order, and which names are views of one storage
    (``tied``).
    """

    tensors: tuple[TensorSpec, ...]
    tied: tuple[tuple[str, ...], ...] = ()  # groups of >= 2 names that share one storage


def manifest_of(named_tensors: Mapping[str, torch.Tensor]) -> WeightManifest:
    """Describe a weight set. Names whose tensors share storage, offset and shape are listed as
    tied.
    """
    groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for name, tensor in named_tensors.items():
        if tensor.numel():
            key = (
                tensor.untyped_storage().data_ptr(),
                int(tensor.storage_offset()),
                tuple(tensor.shape),
            )
            groups.setdefault(key, []).append(name)
    return WeightManifest(
        tensors=tuple(
            TensorSpec(name=name, dtype=str(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in named_tensors.items()
        ),
        tied=tuple(tuple(names) for names in groups.values() if len(names) > 1),
    )


def tensor_digest(name: str, tensor: torch.Tensor) -> int:
    """64-bit checksum of one tensor's name, dtype, shape and bytes (unsigned)."""
    header = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}"
    seed = _word_of(header)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64) if whole and raw.data_ptr() % 8 == 0 else None
    if words is None:
        words = raw[:whole].clone().view(torch.int64)
    total = _sum_of_mixed(words, seed, first=1)
    if raw.numel() > whole:  # the last few bytes, padded with zeros; their number is in the shape
        tail = torch.zeros(8, dtype=torch.uint8, device=raw.device)
        tail[: raw.numel() - whole] = raw[whole:]
        total += _sum_of_mixed(tail.view(torch.int64), seed, first=1 + words.numel())
    return mix64((int(total.item()) ^ seed) & _MASK)


def _sum_of_mixed(words: torch.Tensor, seed: int, *, first: int) -> torch.Tensor:
    """Sum (int64 []) over int64 ``words`` of mix64(word ^ mix64(index * gamma + seed)), indices
    counted from ``first``. Mixing the index makes the sum depend on where each word stands, not
    only on which words there are.
    """
    size = min(words.numel(), _CPU_CHUNK if words.device.type == "cpu" else _OTHER_CHUNK)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    steps = torch.arange(first, first + size, dtype=torch.int64, device=words.device)
    steps *= to_signed(_GAMMA)
    mixed, scratch = torch.empty_like(steps), torch.empty_like(steps)
    for start in range(0, words.numel(), max(1, size)):
        chunk = words[start : start + size]
        mixed, scratch = mixed[: len(chunk)], scratch[: len(chunk)]
        torch.add(steps[: len(chunk)], to_signed((start * _GAMMA + seed) & _MASK), out=mixed)
        mix64_in_place(mixed, scratch)
        mixed ^= chunk
        total += mix64_in_place(mixed, scratch).sum()
    return total


def tensor_digests(
    named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> dict[str, int]:
    """Checksum of each tensor by name, in order."""
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return {name: tensor_digest(name, tensor) for name, tensor in items}


def combine_digests(digests: Mapping[str, int]) -> str:
    """One 64-bit digest of a whole weight set (16 hex digits), sensitive to the order of its
    tensors.
    """
    total = 0
    for name, digest in digests.items():
        total = mix64(total + _GAMMA + mix64(digest ^ _word_of(name)))
    return f"{total:016x}"


def _word_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
