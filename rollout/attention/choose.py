"""Which back end computes attention, and the plan of one forward for it.

``auto`` takes the tree kernels on a CUDA device, if Triton is there and the model is not float64
(the kernels compute in fp32), and the per-node back end on torch operations otherwise. The others
are chosen by hand: flash-attn where it was measured to be faster, the dense reference to compare.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch

from rollout.attention.base import Block, Plan
from rollout.attention.cpu import NodePlan
from rollout.attention.flash import FlashPlan
from rollout.attention.reference import ReferencePlan
from rollout.attention.spans import Span
from rollout.attention.tree_plan import TreePlan
from rollout.kv_pool import KVPool


def choose_back_end(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end for a model of ``dtype`` on ``device``: ``requested``, or for ``auto`` the best
    one that works there.

    Raises:
        ValueError: ``requested`` cannot work there.
    """
    if requested == "auto":
        takes_kernels = device.type == "cuda" and not _why_not("triton_tree", device, dtype)
        return "triton_tree" if takes_kernels else "cpu"
    reason = _why_not(requested, device, dtype)
    if reason:
        raise ValueError(f"engine setting attention={requested!r} cannot work here: {reason}")
    return requested


def make_plan(
    back_end: str,
    blocks: Sequence[Block],
    spans: Sequence[Span],
    positions: np.ndarray,
    pool: KVPool,
) -> Plan:
    """The plan of one forward.

    Args:
        back_end: as ``choose_back_end`` gave it.
        blocks, spans: as ``rollout.attention.spans.lay_out`` gave them.
        positions: int64 [N], depth of each query row.
    """
    if back_end == "reference":
        return ReferencePlan(blocks, pool.device)
    if back_end == "triton_tree":
        return TreePlan(spans, positions, device=pool.device)
    if back_end == "flash":
        return FlashPlan(spans, positions, device=pool.device)
    return NodePlan(
        spans,
        positions,
        num_slots=pool.num_slots,
        slot_bytes=pool.bytes_per_slot // max(1, len(pool.keys)),
        device=pool.device,
    )


def _why_not(back_end: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end cannot work, and what to do; None if it can."""
    kind = str(dtype).removeprefix("torch.")
    if back_end == "triton_tree":
        if find_spec("triton") is None:
            return "triton is not installed: install it, or set attention=auto"
        if dtype == torch.float64:
            return f"its kernels compute in float32, dtype={kind} needs attention=cpu or auto"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs device=cuda, not {device}: set attention=cpu or auto"
    if back_end == "flash":
        if device.type != "cuda":
            return f"it needs device=cuda, not {device}: set attention=cpu or auto"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn takes bfloat16 and float16, not {kind}: set attention=auto"
        if find_spec("flash_attn") is None:
            return "flash-attn is not installed: pip install 'treepo[gpu]', or set attention=auto"
    return None
