"""Device memory that tensors give up and get back, so that two models can share one device.

What is given up is the *storage* below the tensors: it is resized to no bytes, and later to as many
as before, in place. Every tensor over it, such as the parameters that are views of an optimiser's
flat buffer, or two tied names, stays the same object and sees the same bytes again. In between
nobody may read or write one.

A storage that torch does not own (a file's map, an array of numpy) cannot be resized; it stays. On
CUDA there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

_CHUNK = 1 << 28  # bytes of one piece of page-locked memory, whose sizes torch rounds up to 2^k


@dataclass(slots=True, eq=False)
class _Put:
    storage: torch.UntypedStorage
    num_bytes: int
    copy: list[torch.Tensor] | None  # uint8 pieces in host memory; None: the values are forgotten


@dataclass(slots=True, eq=False)
class Aside:
    """Storages that have given up their memory, and what was in them."""

    _put: list[_Put] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes that are given up."""
        return sum(put.num_bytes for put in self._put)

    def put(self, tensors: Iterable[torch.Tensor], *, forget: bool = False) -> int:
        """Give up the memory below ``tensors``; those that have already given it up may be among
        them.

        Args:
            forget: keep no copy; :meth:`restore` then leaves the values undefined.

        Returns:
            bytes that were copied.
        """
        found = storages(tensors)
        put = [_Put(s, s.nbytes(), None if forget else _to_host(s)) for s in found]
        devices = {storage.device for storage in found if storage.device.type == "cuda"}
        for device in devices:
            torch.cuda.synchronize(device)  # copies are done, and kernels that read
        for one in put:
            one.storage.resize_(0)
        if devices:
            torch.cuda.empty_cache()  # to other processes
        self._put += put
        return 0 if forget else sum(one.num_bytes for one in put)

    def forget(self) -> None:
        """Give up the copies: :meth:`restore` leaves the values undefined."""
        for one in self._put:
            one.copy = None

    def restore(self) -> int:
        """Take all memory again and fill it with what was in it.

        Returns:
            bytes that were copied.
        """
        copied = 0
        for one in self._put:
            one.storage.resize_(one.num_bytes)
            if one.copy is not None:
                _from_host(one.copy, one.storage)
                copied += one.num_bytes
        for device in {s.storage.device for s in self._put if s.storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)  # before the copies' memory is used for something else
        self._put = []
        return copied


def storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Those below ``tensors`` that hold memory and can give it up, each once."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.resizable():
            found.setdefault(storage._cdata, storage)
    return list(found.values())


def _to_host(storage: torch.UntypedStorage) -> list[torch.Tensor]:
    source = _bytes(storage)
    pinned = source.is_cuda
    pieces = []
    for part in source.split(_CHUNK):
        piece = torch.empty(len(part), dtype=torch.uint8, pin_memory=pinned)
        pieces.append(piece.copy_(part, non_blocking=pinned))
    return pieces


def _from_host(pieces: list[torch.Tensor], storage: torch.UntypedStorage) -> None:
    for piece, part in zip(pieces, _bytes(storage).split(_CHUNK), strict=True):
        part.copy_(piece, non_blocking=part.is_cuda)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [bytes] over the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
