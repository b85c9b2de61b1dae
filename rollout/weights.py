"""Receiving a weight set: check it against its manifest, copy it into the live model, prove what is
stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from treepo.base.digest import TensorSpec, WeightManifest, manifest_of, tensor_digests


def stored_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything a weight set consists of, as stored: parameters, tied names too, and persistent
    buffers, in ``state_dict`` order.
    """
    return dict(model.state_dict())


def copy_weights(
    model: torch.nn.Module,
    manifest: WeightManifest,
    tensors: Mapping[str, torch.Tensor | np.ndarray],
) -> dict[str, int]:
    """Copy ``tensors`` into ``model`` in place.

    Of a group of tied names one tensor is enough.

    Returns:
        ``tensor_digests`` of the stored state, computed after copying.

    Raises:
        ValueError: the manifest does not describe this model (names, order, dtypes, shapes, ties),
            or the tensors do not fit the manifest. Nothing is copied then.
    """
    stored = stored_state(model)
    _check_manifest(manifest_of(stored), manifest)
    received = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in tensors.items()
    }
    _check_tensors(manifest, received)
    with torch.no_grad():
        for name, value in received.items():
            stored[name].copy_(value)
    return tensor_digests(stored_state(model))


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
    needed = set(specs)
    for group in manifest.tied:
        present = [name for name in group if name in received]
        if present:
            needed -= set(group) - set(present)
        for name in present[1:]:
            if not torch.equal(received[name], received[present[0]]):
                raise ValueError(f"{name} and {present[0]} are tied but their values differ")
    _check_names(needed, set(received), "the weight set", "its manifest")
    for name, value in received.items():
        got = TensorSpec(name=name, dtype=str(value.dtype), shape=tuple(value.shape))
        _check_spec(specs[name], got)


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


def _as_sets(manifest: WeightManifest) -> set[frozenset[str]]:
    return {frozenset(group) for group in manifest.tied}


def _names(manifest: WeightManifest) -> str:
    return "; ".join(" = ".join(group) for group in manifest.tied) or "none"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
