"""The policy in a DeepSpeed engine: its process group, optimiser, configuration, steps and shards.

No other file imports DeepSpeed.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import torch

# DeepSpeed reads these on import; without a GPU it would search for accelerators and warn.
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

from trainers.logprobs import LogprobHead  # noqa: E402
from trainers.model import PolicyModel  # noqa: E402
from trainers.settings import LearnerSettings, OptimizerSettings  # noqa: E402


def join(settings: LearnerSettings, rank: int, world_size: int, init_method: str | None) -> None:
    """Set up the process group before DeepSpeed does, so that rank, store and timeout are ours."""
    deepspeed.logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed asks which of the machine's devices is this rank's; an actor sees its own alone.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory collective at the first start; gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        rendezvous: dict[str, Any] = {"init_method": init_method}
        if world_size == 1:
            rendezvous = {"store": dist.HashStore()}
        elif init_method is None:
            raise ValueError(f"world_size={world_size} needs init_method, e.g. tcp://host:port")
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=settings.init_timeout_s),
            **rendezvous,
        )
    if dist.get_world_size() != world_size:
        raise ValueError(
            f"world_size={world_size}, but this process is in a group of {dist.get_world_size()}"
        )


def make_engine(policy: PolicyModel, settings: LearnerSettings) -> Any:
    """The policy in DeepSpeed's engine, after :func:`join`."""
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    if settings.zero_stage == 3:
        # The head's weight is used by its parent's loop over chunks, not by a call of the head.
        deepspeed.utils.set_z3_leaf_modules(policy, [LogprobHead])
    engine, _, _, _ = deepspeed.initialize(
        model=policy,
        optimizer=_make_optimizer(policy, settings.optimizer),
        config=_engine_config(settings, policy),
        dist_init_required=False,
    )
    for name, buffer in engine.module.named_buffers():
        # The engine casts buffers with the weights; rotary frequencies don't survive bfloat16.
        buffer.data = buffers[name].to(buffer.device)
    return engine


def take_step(engine: Any, grad_clip: float) -> tuple[float, bool]:
    """Clip and take the optimiser step; skipped when the gradient is not finite. Returns the norm
    before clipping and whether the step was taken.
    """
    if engine.zero_optimization_stage() == 0:
        # Without ZeRO every rank holds the whole reduced gradient, and DeepSpeed neither reports
        # its norm nor looks for numbers that are not finite.
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf))
        if not math.isfinite(norm):
            engine.zero_grad()
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    return float(engine.get_global_grad_norm()), engine.was_step_applied()


def is_sharded(engine: Any) -> bool:
    """Whether a rank holds a part of each weight alone (ZeRO-3)."""
    return engine.zero_optimization_stage() == 3


@contextlib.contextmanager
def whole_weights(engine: Any, model: torch.nn.Module) -> Iterator[None]:
    """Inside, the weights of ``model`` are whole on every rank, to be read. Collective."""
    sharded = is_sharded(engine)
    parameters = list(model.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        yield


def _make_optimizer(policy: PolicyModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def _engine_config(settings: LearnerSettings, policy: PolicyModel) -> dict[str, Any]:
    num_parameters = sum(p.numel() for p in policy.parameters())
    num_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    bf16 = settings.dtype == "bfloat16"
    # DeepSpeed accumulates bfloat16 gradients in float32 from stage 1 on. On the same weights the
    # update of stage 1 equals that of stage 0.
    stage = max(settings.zero_stage, 1) if bf16 else settings.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optimizer.grad_clip if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            # DeepSpeed allocates whole buckets (2 GB by default), and keeps tensors of less than
            # 100,000 elements on every rank: a small model would not be sharded at all.
            "reduce_bucket_size": min(int(5e8), num_trained),
            "allgather_bucket_size": min(int(5e8), num_trained),
            "stage3_prefetch_bucket_size": min(int(5e7), num_parameters),
            "stage3_param_persistence_threshold": min(int(1e5), num_parameters // 100),
        },
        "bf16": {"enabled": bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
