"""Receiving a weight set: check it against its manifest, copy it into the live model, prove what is
stored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from treepo.base.digest import TensorSpec, WeightManifest, manifest_of, tensor_digests
from treepo.base.errors import RunFailed


class TornWeights(RunFailed):
    """A weight set stopped half-way: the model holds a mixture and must not serve."""


class Part(NamedTuple):
    """Elements of one tensor, flattened, from ``start`` on: how a large one arrives in pieces."""

    name: str
    start: int
    values: torch.Tensor  # [n], in the tensor's dtype


Tensors = Mapping[str, torch.Tensor | np.ndarray]


def stored_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything a weight set consists of, as stored: parameters, tied names too, and persistent
    buffers, in ``state_dict`` order.
    """
    return dict(model.state_dict())


class WeightLoad:
    """A weight set on its way into a live model: copied in place, part by part.

    Attributes:
        has_begun: something was copied.
        is_complete: everything was, and its digests are known.

    Raises:
        ValueError: the manifest does not describe this model (names, order, dtypes, shapes, ties).
    """

    def __init__(self, model: torch.nn.Module, manifest: WeightManifest) -> None:
        self.has_begun = False
        self.is_complete = False
        self._stored = stored_state(model)
        _check_manifest(manifest_of(self._stored), manifest)
        self._manifest = manifest
        self._specs = {spec.name: spec for spec in manifest.tensors}
        self._num_received = dict.fromkeys(self._specs, 0)  # elements, by name

    def copy(self, tensors: Tensors | Iterable[Part]) -> dict[str, int]:
        """Take the whole set, all at once or in parts as they come.

        Of a group of tied names one tensor is enough. Numpy arrays are views of somebody's memory
        (such as an object store) and are read where they lie; one in a dtype that numpy lacks,
        such as bfloat16, comes as integers of the same size.

        Returns:
            ``tensor_digests`` of the stored state, computed after copying.

        Raises:
            ValueError: the tensors do not fit the manifest; nothing is copied then.
            TornWeights: a part did not fit or did not come after others had been copied.
        """
        parts = self.parts_of(tensors) if isinstance(tensors, Mapping) else tensors
        try:
            for part in parts:
                self.put(part)
            self._check_complete()
        except Exception as error:
            if not self.has_begun:
                raise
            raise TornWeights(f"the weights are half old, half new: {error}") from error
        digests = tensor_digests(self._stored)
        self.is_complete = True
        return digests

    def parts_of(self, tensors: Tensors) -> list[Part]:
        """Whole tensors as parts, one of each group of tied names.

        Raises:
            ValueError: they do not fit the manifest.
        """
        received = {name: as_tensor(tensors[name], self._specs.get(name)) for name in tensors}
        _check_tensors(self._manifest, received)
        for group in self._manifest.tied:
            for name in [name for name in group if name in received][1:]:
                del received[name]
        return [Part(name, 0, value.reshape(-1)) for name, value in received.items()]

    def put(self, part: Part) -> None:
        """Copy a part in place. The parts of a tensor come in order.

        Raises:
            ValueError: it does not fit the manifest or what came before.
        """
        spec = self._specs.get(part.name)
        if spec is None:
            raise ValueError(f"a part of {part.name!r} came, which the manifest lacks")
        expected, stop = self._num_received[part.name], part.start + part.values.numel()
        if part.start != expected or stop > math.prod(spec.shape):
            raise ValueError(
                f"elements {part.start} to {stop} of {part.name!r} came, but {expected} of its "
                f"{math.prod(spec.shape)} are there"
            )
        _check_dtype(spec, part.values.dtype)
        self.has_begun = True
        stored = self._stored[part.name]
        with torch.no_grad():
            if stored.is_contiguous():
                stored.view(-1)[part.start : stop].copy_(part.values)
            else:
                index = torch.arange(part.start, stop, device=stored.device)
                stored.put_(index, part.values.to(stored.device))
        self._num_received[part.name] = stop

    def _check_complete(self) -> None:
        complete = {
            name
            for name, spec in self._specs.items()
            if self._num_received[name] == math.prod(spec.shape)
        }
        _check_names(_needed(self._manifest, complete), complete, "what arrived", "its manifest")


def as_tensor(array: torch.Tensor | np.ndarray, spec: TensorSpec | None) -> torch.Tensor:
    """A view of an array's memory as a tensor; integers stand for a dtype of their size that numpy
    lacks.
    """
    if isinstance(array, torch.Tensor):
        return array
    with warnings.catch_warnings():  # shared memory is read-only, and only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    if spec is not None and str(tensor.dtype) != spec.dtype:
        wanted = getattr(torch, spec.dtype.removeprefix("torch."))
        if wanted in _NOT_IN_NUMPY and wanted.itemsize == tensor.itemsize:
            return tensor.view(wanted)
    return tensor


_NOT_IN_NUMPY = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


def _check_manifest(ours: WeightManifest, theirs: WeightManifest) -> None:
    our_specs = {spec.name: spec for spec in ours.tensors}
    their_specs = {spec.name: spec for spec in theirs.tensors}
    _check_names(set(our_specs), set(their_specs), "the manifest", "the engine's model")
    for name, spec in their_specs.items():
        _check_spec(our_specs[name], spec)
    if [spec.name for spec in ours.tensors] != [spec.name for spec in theirs.tensors]:
        raise ValueError(
            "the manifest lists the tensors in another order than the engine's model: send them in "
            "state_dict order"
        )
    if _as_sets(ours) != _as_sets(theirs):
        raise ValueError(
            f"tied weights differ: the manifest ties {_names(theirs)}, the engine's model ties "
            f"{_names(ours)}. Set tie_word_embeddings alike in both model configurations"
        )


def _check_tensors(manifest: WeightManifest, received: Mapping[str, torch.Tensor]) -> None:
    specs = {spec.name: spec for spec in manifest.tensors}
    for group in manifest.tied:
        present = [name for name in group if name in received]
        for name in present[1:]:
            if not torch.equal(received[name], received[present[0]]):
                raise ValueError(f"{name} and {present[0]} are tied but their values differ")
    needed = _needed(manifest, received)
    _check_names(needed, set(received), "the weight set", "its manifest")
    for name, value in received.items():
        got = TensorSpec(name=name, dtype=str(value.dtype), shape=tuple(value.shape))
        _check_spec(specs[name], got)


def _needed(manifest: WeightManifest, present: Iterable[str]) -> set[str]:
    """All names but those whose tied partner is ``present`` in their stead."""
    needed, there = {spec.name for spec in manifest.tensors}, set(present)
    for group in manifest.tied:
        if there & set(group):
            needed -= set(group) - there
    return needed


def _check_names(expected: set[str], got: set[str], source: str, target: str) -> None:
    missing, unexpected = sorted(expected - got), sorted(got - expected)
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit {target}: missing {_some(missing)}, "
            f"unexpected {_some(unexpected)}"
        )


def _check_spec(expected: TensorSpec, got: TensorSpec) -> None:
    if (expected.dtype, tuple(expected.shape)) != (got.dtype, tuple(got.shape)):
        raise ValueError(
            f"tensor {got.name!r} is {got.dtype} {tuple(got.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}"
        )


def _check_dtype(expected: TensorSpec, dtype: torch.dtype) -> None:
    if str(dtype) != expected.dtype:
        raise ValueError(f"a part of {expected.name!r} is {dtype}, expected {expected.dtype}")


def _as_sets(manifest: WeightManifest) -> set[frozenset[str]]:
    return {frozenset(group) for group in manifest.tied}


def _names(manifest: WeightManifest) -> str:
    return "; ".join(" = ".join(group) for group in manifest.tied) or "none"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
