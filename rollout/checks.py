"""What callers hand to the engine, checked before work: tokens, path keys, versions, devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def checked_token_ids(
    what: str, token_ids: Sequence[int] | np.ndarray, vocabulary: int
) -> np.ndarray:
    """A copy of the tokens as int32 [n].

    Args:
        what: the error's name for them.

    Raises:
        ValueError: they are no flat sequence of integers, or one is outside the vocabulary.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not (ids.dtype.kind in "iu" or not len(ids)):
        raise ValueError(
            f"{what}: token ids must be a flat sequence of integers, not {ids.dtype} of shape "
            f"{ids.shape}"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        at = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
        raise ValueError(
            f"{what}: token id {ids[at]} at place {at} is outside the model's vocabulary of "
            f"{vocabulary}: was it made by another tokenizer?"
        )
    return ids.astype(np.int32)


def checked_path_key(path_key: int) -> int:
    """
    Raises:
        ValueError: it is no unsigned 64-bit integer.
    """
    if not (_is_integer(path_key) and 0 <= path_key < 1 << 64):
        raise ValueError(f"path_key={path_key!r}: it must be an integer in [0, 2**64)")
    return int(path_key)


def check_version(version: int, in_force: int) -> None:
    """
    Raises:
        ValueError: it is no integer, or older than the weights in force.
    """
    if not (_is_integer(version) and in_force <= version < 1 << 31):
        raise ValueError(
            f"weights version={version!r}: it must be an integer below 2**31, not older than the "
            f"version in force, {in_force}"
        )


def find_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"engine setting device={name!r} is no device: give one such as cpu or cuda:0"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"engine setting device={name!r}: this torch sees no GPU; use device=cpu, or install a "
            "torch with CUDA"
        )
    return device


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
