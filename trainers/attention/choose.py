"""Which kernel computes a layer of a row.

``auto`` takes, on a CUDA device, flash-attn's varlen kernel where it is installed and fits and no
token of the row is shared, FlexAttention otherwise; elsewhere the calls of torch's
``scaled_dot_product_attention`` (``sdpa``), which serve every layer on every device.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from treepo.base.flash_varlen import MAX_HEAD_DIM


def check_attention(requested: str, device: torch.device, dtype: torch.dtype) -> None:
    """See that ``requested`` can work for a model of ``dtype`` on ``device``.

    Raises:
        ValueError: it cannot.
    """
    if reason := _why_not(requested, device, dtype):
        raise ValueError(f"trainer.learner.attention={requested!r} cannot work here: {reason}")


def choose_attention(
    requested: str,
    query: torch.Tensor,  # [1, H, T, D]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    *,
    is_shared: bool,
    has_sinks: bool,
) -> str:
    """``sdpa``, ``flex`` or ``flash`` for a layer.

    Args:
        is_shared: a token of the row is shared by leaves.

    Raises:
        ValueError: ``requested`` cannot serve it.
    """
    device, dtype = query.device, query.dtype
    misfit = _misfit(query.shape[3], value.shape[3], is_shared, has_sinks)
    if requested == "auto":
        if device.type == "cuda" and not misfit and not _why_not("flash", device, dtype):
            return "flash"
        takes_flex = device.type == "cuda" and not _why_not("flex", device, dtype)
        return "flex" if takes_flex else "sdpa"
    if requested == "flash" and misfit:
        raise ValueError(
            f"trainer.learner.attention='flash' cannot serve this row: {misfit}; set "
            "trainer.learner.attention=auto, which takes flash-attn where it can"
        )
    return requested


def _misfit(head_dim: int, value_dim: int, is_shared: bool, has_sinks: bool) -> str | None:
    """Why flash-attn's kernel cannot serve a layer of a row; None if it can."""
    if is_shared:
        return "its trees share tokens, and the kernel knows only sequences"
    if has_sinks:
        return "the model has attention sinks, whose gradient the kernel doesn't give"
    if head_dim != value_dim or head_dim > MAX_HEAD_DIM:
        return f"heads of {head_dim} and {value_dim} numbers (one size, at most {MAX_HEAD_DIM})"
    return None


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot work, and what to do; None if it can."""
    kind = str(dtype).removeprefix("torch.")
    if name in ("flex", "flash") and device.type != "cuda":
        return f"it needs a CUDA device, not {device}: set trainer.learner.attention=auto or sdpa"
    if name == "flex":
        if not _is_installed("triton"):
            return "triton is not installed: install it, or set trainer.learner.attention=sdpa"
        if dtype == torch.float64:
            return "its kernel computes in float32, not float64: set trainer.learner.attention=sdpa"
    if name == "flash":
        if dtype not in (torch.bfloat16, torch.float16):
            return (
                f"flash-attn takes bfloat16 and float16, not {kind}: set "
                "trainer.learner.dtype=bfloat16 or trainer.learner.attention=auto"
            )
        if not _is_installed("flash_attn"):
            return (
                "flash-attn is not installed: pip install 'treepo[gpu]', or set "
                "trainer.learner.attention=auto"
            )
    return None


@functools.cache  # asked in every layer of every forward, and the answer searches the import path
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None
