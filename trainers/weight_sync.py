"""Weight sync as pure functions: what to send, what a receiver must hold, and the comparison.

The learner's tensors are cast to the dtype the engines store, described by a manifest, and
checksummed as the receiver will store them. An engine confirms with the digests of its own memory
and with log-probs of golden token sequences; a difference in either is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from treepo.base.digest import WeightManifest, combine_digests, manifest_of, tensor_digests
from treepo.base.errors import RunFailed

# Differences of golden log-probs that rounding explains, from the finest dtype to the coarsest: the
# largest, and the mean of a sequence. In 16 bits single unlikely tokens are far off (a model with
# logits of 20: 0.7 in bfloat16, at a mean of 0.07); weights used wrongly are off in the mean.
PROBE_TOLERANCE = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-4),
    "float16": (0.3, 0.03),
    "bfloat16": (2.0, 0.2),
}

_SHOWN = 3  # differing tensors named in an error


class WeightSyncError(RunFailed):
    """An engine does not hold the weights it was sent; it must not serve."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Publication:
    """The weights, ready to send.

    Attributes:
        manifest: what is sent, in order, and which names are tied.
        digests: per tensor, as the receiver must compute them on its stored tensors.
        tensors: by name, in the receiver's dtype; tied names share storage.
    """

    manifest: WeightManifest
    digests: dict[str, int]
    tensors: dict[str, torch.Tensor]

    @property
    def digest(self) -> str:
        """One digest (16 hex digits) of the whole set."""
        return combine_digests(self.digests)


def prepare(tensors: Mapping[str, torch.Tensor], dtype: str) -> Publication:
    """Cast floating-point tensors to ``dtype`` (e.g. ``"bfloat16"``; ties kept, integers untouched)
    and describe them.
    """
    done: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    prepared = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in done or not tensor.numel():
            done[key] = cast(tensor, dtype)
        prepared[name] = done[key]
    return Publication(
        manifest=manifest_of(prepared), digests=tensor_digests(prepared), tensors=prepared
    )


def cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """``tensor`` as an engine of ``dtype`` stores it: integers keep theirs."""
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


def cast_manifest(tensors: Mapping[str, torch.Tensor], dtype: str) -> WeightManifest:
    """Manifest of ``tensors`` after the cast, without casting them."""
    manifest = manifest_of(tensors)
    floating = f"torch.{dtype}"
    return replace(
        manifest,
        tensors=tuple(
            replace(spec, dtype=floating) if tensors[spec.name].is_floating_point() else spec
            for spec in manifest.tensors
        ),
    )


def check_digests(expected: Mapping[str, int], answers: Mapping[str, Mapping[str, int]]) -> None:
    """Compare the digests of every engine's stored tensors with those expected.

    Args:
        expected: per tensor, in order.
        answers: the same from each engine, by the engine's name.

    Raises:
        WeightSyncError: naming the first engine that differs and the tensors that differ, are
            missing or too many, or stand in another order.
    """
    for engine, digests in answers.items():
        where = f"{engine} does not hold the weights it was sent"
        if missing := [name for name in expected if name not in digests]:
            raise WeightSyncError(f"{where}: it lacks {_some(missing)}")
        if extra := [name for name in digests if name not in expected]:
            raise WeightSyncError(f"{where}: it has tensors that were not sent: {_some(extra)}")
        if wrong := [name for name in expected if digests[name] != expected[name]]:
            raise WeightSyncError(f"{where}: other bytes in {_some(wrong)}")
        if list(digests) != list(expected):
            raise WeightSyncError(f"{where}: the tensors stand in another order")


def check_probes(
    reference: Sequence[np.ndarray],
    answers: Mapping[str, Sequence[np.ndarray]],
    dtypes: Sequence[str],
) -> float:
    """Compare the golden sequences' log-probs of every engine with the learner's own: catches what
    equal bytes can't, such as weights used in the wrong place or a stale cache.

    Args:
        reference: the learner's, float [n - 1] a sequence.
        answers: the same from each engine, by the engine's name.
        dtypes: of the engines and of the learner, e.g. ``"float32"``; the coarsest counts.

    Returns:
        The largest absolute difference.

    Raises:
        WeightSyncError: an engine scored something else, or differs by more than rounding explains.
    """
    dtype = max(dtypes, key=list(PROBE_TOLERANCE).index)
    largest, (tolerance, mean_tolerance) = 0.0, PROBE_TOLERANCE[dtype]
    for engine, scores in answers.items():
        if [len(score) for score in scores] != [len(score) for score in reference]:
            raise WeightSyncError(f"{engine} scored other golden sequences than the learner")
        for number, (ours, theirs) in enumerate(zip(reference, scores, strict=True)):
            gaps = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
            gap = float(gaps.max(initial=0.0))
            if not gap <= tolerance:  # also when it is not a number
                raise WeightSyncError(
                    f"{engine} computes other log-probs than the learner: {gap:.3g} apart at token "
                    f"{int(gaps.argmax()) + 1} of golden sequence {number}, where rounding in "
                    f"{dtype} explains {tolerance:.3g}"
                )
            if len(gaps) and not gaps.mean() <= mean_tolerance:
                raise WeightSyncError(
                    f"{engine} computes other log-probs than the learner: {gaps.mean():.3g} apart "
                    f"in the mean of golden sequence {number}, where rounding in {dtype} explains "
                    f"{mean_tolerance:.3g}"
                )
            largest = max(largest, gap)
    return largest


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
