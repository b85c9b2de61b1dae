"""Path keys and counter-based random draws.

A draw is a function of (key, position, purpose) and of nothing else, so that batching, eviction,
the number of workers or a restart cannot change it. Keys are unsigned 64-bit integers; a child's
key is a mix of its parent's key and its ordinal among the parent's forks. The mixer is the
finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"):
a bijection of 64-bit words with full avalanche.

The scalar functions work on Python integers (unsigned). The batch function works on ``int64``
tensors (the same bits, read as signed), on any device, and gives bit for bit the same uniforms.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only its tensors' methods are used, so the scalar functions need no torch
    import torch

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a draw is for: draws of different purpose at one place are independent."""

    TOKEN = 1
    BRANCH = 2
    FALLBACK = 3
    DIVERGENCE = 4
    DRAFT = 5


def mix64(word: int) -> int:
    """SplitMix64's finaliser on an unsigned 64-bit word."""
    word &= _MASK
    word = ((word ^ (word >> 30)) * _M1) & _MASK
    word = ((word ^ (word >> 27)) * _M2) & _MASK
    return word ^ (word >> 31)


def root_key(*parts: object) -> int:
    """Key of a tree's root from whatever names it (seed, step, problem id); stable across processes
    and machines.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def child_key(parent: int, ordinal: int) -> int:
    """Key of the ``ordinal``-th fork of the node whose key is ``parent``."""
    return mix64(mix64(parent + _GAMMA) + (ordinal + 1) * _GAMMA)


def draw_word(key: int, position: int, purpose: Purpose) -> int:
    """The unsigned 64-bit random word of one draw."""
    return mix64(mix64(key + (position + 1) * _GAMMA) + int(purpose) * _M1)


def uniform(key: int, position: int, purpose: Purpose) -> float:
    """One draw from the open interval (0, 1): an odd multiple of 2^-53, the finest grid whose ends
    are neither 0 nor 1.
    """
    assert position >= 0, f"position must be >= 0, got {position}"
    return ((draw_word(key, position, purpose) >> 12) + 0.5) * 2.0**-52


def to_signed(key: int) -> int:
    """The same 64 bits read as a signed integer, as ``int64`` tensors hold them."""
    return key - (1 << 64) if key >= (1 << 63) else key


def uniforms(keys: torch.Tensor, positions: torch.Tensor, purpose: Purpose) -> torch.Tensor:
    """``uniform`` for a batch.

    Args:
        keys: ``int64`` [N], see :func:`to_signed`.
        positions: ``int64`` [N], each >= 0.

    Returns:
        ``float64`` [N] in (0, 1), bit for bit the scalar function's values.
    """
    words = mix64_tensor(keys + (positions + 1) * to_signed(_GAMMA))
    words = mix64_tensor(words + to_signed((int(purpose) * _M1) & _MASK))
    return (_shift_right(words, 12).double() + 0.5) * 2.0**-52


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical (unsigned) right shift of ``int64``: torch's own shift copies the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def mix64_tensor(words: torch.Tensor) -> torch.Tensor:
    """:func:`mix64` on ``int64`` tensors, whose arithmetic wraps."""
    words = (words ^ _shift_right(words, 30)) * to_signed(_M1)
    words = (words ^ _shift_right(words, 27)) * to_signed(_M2)
    return words ^ _shift_right(words, 31)


def mix64_in_place(words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """:func:`mix64_tensor` that overwrites ``words`` and ``scratch`` (same shape): where much is
    mixed, memory for intermediate results costs more than the arithmetic.
    """
    import torch

    for bits, factor in ((30, _M1), (27, _M2), (31, 1)):
        torch.bitwise_right_shift(words, bits, out=scratch)
        scratch &= (1 << (64 - bits)) - 1
        words ^= scratch
        if factor != 1:
            words *= to_signed(factor)
    return words
