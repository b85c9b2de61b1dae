"""What callers hand to the engine, checked before work: tokens, numbers, path keys, versions,
devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from treepo.base.typed import as_int


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


def checked_int(what: str, value: int, least: int, most: int | None, allowed: str) -> int:
    """
    Args:
        what: the error's name for it.
        allowed: the error's words for the bounds.

    Raises:
        ValueError: it is no integer below 2**31, or not in ``least..most``.
    """
    try:
        number = as_int(value)
        is_allowed = least <= number and (most is None or number <= most)
    except (TypeError, OverflowError):
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"{what}={value!r}: it must be an integer {allowed}")
    return number


def checked_path_key(path_key: int) -> int:
    """
    Raises:
        ValueError: it is no unsigned 64-bit integer.
    """
    is_integer = isinstance(path_key, int | np.integer) and not isinstance(path_key, bool)
    if not (is_integer and 0 <= path_key < 1 << 64):
        raise ValueError(f"path_key={path_key!r}: it must be an integer in [0, 2**64)")
    return int(path_key)


def checked_version(version: int, in_force: int) -> int:
    """
    Raises:
        ValueError: it is no integer, or older than the weights in force.
    """
    allowed = f"below 2**31, not older than the version in force, {in_force}"
    return checked_int("weights version", version, in_force, None, allowed)


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
