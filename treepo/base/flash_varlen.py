"""flash-attn's kernel for sequences of unequal lengths: the one place that loads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_HEAD_DIM = 256  # of the kernel

# flash_attn.flash_attn_varlen_func, or a function of its signature
Varlen = Callable[..., Any]


def load_varlen() -> Varlen:
    """The kernel.

    Raises:
        ImportError: flash-attn is not installed.
    """
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func
