"""Settings of the rollout engine (plain dataclasses: they become configuration nodes)."""

from __future__ import annotations

from dataclasses import dataclass

from treepo.base.typed import check_types

DTYPES = ("float32", "bfloat16", "float16", "float64")
KV_OVER_UPDATE = ("recompute", "keep")
ATTENTION_BACK_ENDS = ("auto", "cpu", "reference", "triton_tree", "flash")


@dataclass
class EngineSettings:
    """How one rollout engine runs.

    Raises:
        ValueError: a field is out of range; the message names field, value and what is allowed.
    """

    # of weights and KV: float32, bfloat16, float16 or float64; a loaded model keeps its own
    dtype: str = "float32"
    device: str = "cpu"  # any torch device, e.g. cpu or cuda:0
    num_kv_slots: int = 65536  # size of the KV pool in tokens
    max_running_requests: int = 512  # segments decoded at one time
    # query rows of one forward: tokens being decoded, and parts of new prompts with what is left
    max_tokens_per_step: int = 8192
    # back end: auto; cpu (torch, on any device), triton_tree and flash (on a GPU, per node too);
    # reference (dense, slow)
    attention: str = "auto"
    cuda_graphs: bool = True  # on a GPU with triton_tree: steady decode steps as CUDA graphs
    share_prefixes: bool = True  # False: every request computes its whole path privately
    # keys and values of trees that are put aside: recompute (they leave with the weights) or keep
    # (a path that goes on under new weights reads those that older ones computed)
    kv_over_update: str = "recompute"
    kv_on_host: bool = False  # with keep: they wait in the host's memory, not in the pool
    fp32_lm_head: bool = False  # logits in float32 from bfloat16 or float16 weights
    # CPU: a second copy of the weights, laid out for few rows; decoder layers run fused
    pack_weights: bool = True
    # CPU: pad rows so that linear layers round each alike in any company (float64 always does)
    pad_rows: bool = False
    num_threads: int = 1  # torch threads of a rollout worker

    def __post_init__(self) -> None:
        check_types(self, "engine setting")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("attention", self.attention, ATTENTION_BACK_ENDS)
        _one_of("kv_over_update", self.kv_over_update, KV_OVER_UPDATE)
        if self.keeps_kv and not self.share_prefixes:
            raise ValueError(
                "engine setting kv_over_update='keep' needs share_prefixes=True: without it no "
                "path is found again. Set share_prefixes=True or kv_over_update='recompute'"
            )
        if self.kv_on_host and not self.keeps_kv:
            raise ValueError(
                "engine setting kv_on_host=True needs kv_over_update='keep': with 'recompute' "
                "nothing waits on the host. Set kv_over_update='keep' or kv_on_host=False"
            )
        for field in ("num_kv_slots", "max_running_requests", "num_threads"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"engine setting {field}={value} is out of range: it must be >= 1")
        if self.max_tokens_per_step <= self.max_running_requests:
            raise ValueError(
                f"engine setting max_tokens_per_step={self.max_tokens_per_step} leaves no room for "
                f"new prompts beside max_running_requests={self.max_running_requests} decoded "
                "tokens: raise the one or lower the other"
            )

    @property
    def keeps_kv(self) -> bool:
        """Whether trees that are put aside take their keys and values over an update."""
        return self.kv_over_update == "keep"


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"engine setting {field}={value!r} is unknown: choose one of {', '.join(allowed)}"
        )
