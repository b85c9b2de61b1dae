"""One rank of the learner: the policy in a DeepSpeed engine, updated on packed rows.

The gradient of an update is exactly that of ``sum of token losses / denominator`` over all rows of
all ranks, however they are distributed: DeepSpeed's averaging over ranks is multiplied out, its
division by accumulation steps is not used, and the accumulation boundary is set by hand, so that
the number of rows may differ from update to update.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

# DeepSpeed reads these on import; without a GPU it would search for accelerators and warn.
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

from trainers.batch import PackedBatch, on_device  # noqa: E402
from trainers.held_memory import tensors_of_model, tensors_of_optimizer  # noqa: E402
from trainers.logprobs import LogprobHead  # noqa: E402
from trainers.losses import POLICY_LOSSES, trained_tokens  # noqa: E402
from trainers.metrics import MetricSums  # noqa: E402
from trainers.mismatch import add_ages, add_mismatch  # noqa: E402
from trainers.model import PolicyModel, load_policy  # noqa: E402
from trainers.objective import objective  # noqa: E402
from trainers.off_policy import trained_index  # noqa: E402
from trainers.packing import pack_row, path_tree  # noqa: E402
from trainers.policy_view import (  # noqa: E402
    UpdateFacts,
    add_masked,
    facts_of_update,
    policy_view,
    ratio_logprobs,
)
from trainers.reference import load_reference  # noqa: E402
from trainers.schedule import learning_rate  # noqa: E402
from trainers.settings import LearnerSettings, OptimizerSettings, loss_traits  # noqa: E402
from trainers.weight_sync import Publication, prepare  # noqa: E402
from treepo.base.aside import Aside, storages  # noqa: E402
from treepo.base.digest import combine_digests, tensor_digests  # noqa: E402

_TAG = "weights_and_optimizer"
_META = "learner.json"
ADAPTER_FOLDER = "adapter"  # in an exported folder
# Files beside the weights that make an exported folder complete.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


class Learner:
    """A learner rank. Every method is collective: all ranks call it, in the same order.

    Args:
        model_path: folder or Hub name of a causal language model.
        settings: the same on every rank.
        rank, world_size: of this process among the learner's.
        init_method: where ranks meet, e.g. ``tcp://host:port``; not needed by a single rank.
    """

    def __init__(
        self,
        model_path: str,
        settings: LearnerSettings,
        rank: int = 0,
        world_size: int = 1,
        init_method: str | None = None,
    ) -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.model_path = model_path
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.num_optimizer_steps = 0
        self._loss = POLICY_LOSSES.get(settings.policy_loss.name)
        _join(settings, rank, world_size, init_method)
        policy = load_policy(
            model_path,
            dtype=getattr(torch, settings.dtype),
            logprob_chunk_size=settings.logprob_chunk_size,
            fp32_lm_head=settings.fp32_lm_head,
            gradient_checkpointing=settings.gradient_checkpointing,
            attention_kernel=settings.attention,
            lora=settings.lora,
        )
        # Of what a resumed run has to find in the model's folder: frozen weights, and those that a
        # KL penalty is towards.
        self.initial_digest = ""
        if settings.lora.is_on or settings.has_reference:
            self.initial_digest = combine_digests(
                tensor_digests(policy.weights(policy.model.state_dict()))
            )
        self._engine = _make_engine(policy, settings)
        self.policy: PolicyModel = self._engine.module
        self.device = torch.device(self._engine.device)
        self._aside = Aside()
        self._sleeps, self._has_weights = False, True
        self.reference: PolicyModel | None = None
        if settings.has_reference and settings.reference == "own":
            # The weights that training began with, whole on every rank. A resumed run has the same
            # model path, so it gets the same.
            self.reference = load_reference(model_path, settings, self.device)

    def update(
        self,
        mini_batches: Sequence[Sequence[PackedBatch]],
        ref_logprobs: Sequence[Sequence[torch.Tensor]] | None = None,
        policy_version: int = 0,
    ) -> dict[str, float]:
        """One optimiser step for each mini-batch.

        Args:
            mini_batches: outer, optimiser steps; inner, this rank's rows (equally many on every
                rank; see :func:`trainers.packing.pack`).
            ref_logprobs: with ``reference=actor``, the reference's of every row [T], as
                :class:`trainers.reference.Reference` gives them.
            policy_version: of the weights before this call, to which tokens' ages are counted.

        Returns:
            Metrics over all ranks, the same on each.
        """
        self._check_awake()
        sums = MetricSums()
        old_logprobs = self._old_logprobs(mini_batches)
        for number, rows in enumerate(mini_batches):
            rate = learning_rate(self.settings.optimizer, self.num_optimizer_steps)
            for group in self._engine.optimizer.param_groups:
                group["lr"] = rate
            old = old_logprobs[number] if old_logprobs else [None] * len(rows)
            facts = facts_of_update(
                rows, old, self.settings, policy_version, self._forward, self.device
            )
            for at, row in enumerate(rows):
                self._engine.set_gradient_accumulation_boundary(at == len(rows) - 1)
                ref = ref_logprobs[number][at] if ref_logprobs is not None else None
                loss = self._loss_of(row, sums, old[at], ref, facts, first_update=number == 0)
                self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
            grad_norm, applied = self._step()
            self.num_optimizer_steps += applied
            sums.add_count("actor/num_updates", int(applied))
            sums.add_count("actor/skipped_updates", int(not applied))
            if applied:
                sums.add_rank_equal("actor/grad_norm", grad_norm)
            sums.add_rank_equal("actor/lr", rate)
        return sums.reduce(num_updates=len(mini_batches), device=self.device)

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """Log-probabilities float32 [T] of every token of each row under its temperature, without
        gradient; 0 where a token has no predictor. On CPU. Equally many rows on every rank.
        """
        self._check_awake(weights_suffice=True)
        results = []
        for row in batches:
            batch = on_device(row, self.device)
            index = torch.nonzero(batch.predictor >= 0).squeeze(1)
            logprobs, _ = self._forward(batch, index)
            full = torch.zeros(row.num_tokens, dtype=torch.float32, device=self.device)
            full[index] = logprobs.float()
            results.append(full.cpu())
        return results

    def score_paths(self, paths: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities float32 [n - 1] of the tokens after the first of each token sequence
        (int [n]), at temperature 1; the same on every rank.
        """
        row = pack_row([path_tree(torch.from_numpy(np.asarray(p, np.int64))) for p in paths])
        (logprobs,) = self.logprobs([row])
        parts = logprobs.split([*map(len, paths), row.num_tokens - sum(map(len, paths))])
        return [part.numpy()[1:] for part in parts[:-1]]

    def publication(self, dtype: str) -> Publication:
        """The weights as engines of ``dtype`` must hold them."""
        return prepare(self.state_tensors(), dtype)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All weights and persistent buffers as the engine stores them, by the names of the model's
        ``state_dict`` (tied names share storage), adapters merged into the weights. They may be the
        live weights: read them before the next update, and don't write to them.
        """
        with self._gathered() as state:
            return _copy_keeping_ties(state) if self._sharded else state

    def digest(self) -> str:
        """64-bit digest (16 hex digits) of :meth:`state_tensors`."""
        with self._gathered() as state:
            return combine_digests(tensor_digests(state))

    def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, step count and random states; all ranks into one folder."""
        self._check_awake()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(
            str(folder),
            tag=_TAG,
            save_latest=False,
            exclude_frozen_parameters=self.policy.adapters is not None,
        )
        torch.save(_random_state(), folder / f"random_state_rank_{self.rank}.pt")
        if self.rank == 0:
            (folder / _META).write_text(json.dumps(self._meta()))
        dist.barrier()

    def load(self, folder: str | Path) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            ValueError: the folder is no learner checkpoint, or one of other ranks, ZeRO stage,
                dtype or optimiser.
        """
        self._check_awake()
        folder = Path(folder)
        if not (folder / _META).is_file():
            raise ValueError(f"checkpoint {str(folder)!r} has no {_META}: not a learner checkpoint")
        saved, own = json.loads((folder / _META).read_text()), self._meta()
        saved.setdefault("lora", None)  # of checkpoints from before there were adapters
        for name in ("world_size", "zero_stage", "dtype", "optimizer", "lora"):
            if saved[name] != own[name]:
                raise ValueError(
                    f"checkpoint {str(folder)!r} was written with {name}={saved[name]!r}, this "
                    f"learner has {own[name]!r}: start it with the same, or begin a new run from "
                    "the checkpoint's exported model"
                )
        reference = saved.get("reference", "")
        if reference and own["reference"] and reference != own["reference"]:
            with_lora = self.policy.adapters is not None
            was = "its adapters on" if with_lora else "the KL penalty towards"
            mend = "" if with_lora else ", or set policy_loss.kl_loss_coef=0"
            raise ValueError(
                f"checkpoint {str(folder)!r} was trained with {was} another model "
                f"than {self.model_path!r} holds now: put the model that the run began with back "
                f"there{mend}"
            )
        # Frozen weights are not in the checkpoint: they are those of the model's folder.
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=self.policy.adapters is None
        )
        if loaded is None:
            raise ValueError(f"checkpoint {str(folder)!r} lacks DeepSpeed's files under {_TAG}/")
        self.num_optimizer_steps = saved["num_optimizer_steps"]
        state = torch.load(folder / f"random_state_rank_{self.rank}.pt", weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def export_hf(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` loads: safetensors, configuration, and the
        tokenizer's files of the original model. With adapters they are merged into the weights,
        and stand by themselves in its subfolder ``adapter``. Written by rank 0.
        """
        folder = Path(folder)
        with self._whole_state() as own:
            if self.rank == 0:
                self.policy.model.save_pretrained(folder, state_dict=self.policy.weights(own))
                if self.policy.adapters is not None:
                    self.policy.adapters.save(own, folder / ADAPTER_FOLDER, self.model_path)
                for name in _TOKENIZER_FILES:
                    source = Path(self.model_path) / name
                    if source.is_file() and not (folder / name).exists():
                        shutil.copyfile(source, folder / name)
        dist.barrier()

    def sleep(self, *, keep_weights: bool = False) -> int:
        """Give up device memory until :meth:`wake`: optimiser, gradients, buffers and the
        reference are copied to host memory, and so are the weights.

        Args:
            keep_weights: they stay, so that they can be published and score.

        Returns:
            bytes that were copied. What is in host memory already is not copied again.
        """
        weights = tensors_of_model(self.policy)
        others = tensors_of_optimizer(self._engine.optimizer)
        if self.reference is not None:
            others += tensors_of_model(self.reference)
        if keep_weights:
            kept = {storage._cdata for storage in storages(weights)}
            others = [t for t in others if t.untyped_storage()._cdata not in kept]
        self._sleeps, self._has_weights = True, self._has_weights and keep_weights
        return self._aside.put(others if keep_weights else others + weights)

    def wake(self) -> int:
        """Take back what :meth:`sleep` gave up, to the last bit; returns the bytes copied."""
        self._sleeps, self._has_weights = False, True
        return self._aside.restore()

    def _check_awake(self, *, weights_suffice: bool = False) -> None:
        if self._sleeps and not (weights_suffice and self._has_weights):
            raise ValueError("the learner is asleep: call wake() first")

    def close(self) -> None:
        """Leave the process group. The learner can't be used after it."""
        self._engine.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _sharded(self) -> bool:
        return self._engine.zero_optimization_stage() == 3

    def _old_logprobs(
        self, mini_batches: Sequence[Sequence[PackedBatch]]
    ) -> list[list[torch.Tensor | None]]:
        """With ``old_logprobs=recomputed``, what the weights before the first optimiser step say of
        every row [T]. None for the rows of the first update: they are met with these same weights,
        so its own forward says it, without a second one. Empty with ``sampled``.
        """
        if self.settings.old_logprobs == "sampled":
            return []
        old: list[list[torch.Tensor | None]] = [[None] * len(mini_batches[0])]
        for rows in mini_batches[1:]:
            old.append([*self.logprobs(rows)])
        return old

    def _forward(
        self, batch: PackedBatch, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [M] of the row's tokens ``index``, without gradient."""
        with torch.no_grad():
            logprobs, entropy = self._engine(batch, index)
        return logprobs, entropy

    def _loss_of(
        self,
        row: PackedBatch,
        sums: MetricSums,
        old: torch.Tensor | None,
        ref: torch.Tensor | None,
        facts: UpdateFacts,
        *,
        first_update: bool,
    ) -> torch.Tensor:
        """The row's share of the objective.

        Args:
            old: with ``old_logprobs=recomputed``, the row's from before the first step [T]; None
                in the first update.
            ref: with ``reference=actor``, the reference's [T].
            facts: of the row's whole update.
        """
        settings = self.settings.policy_loss
        whole = on_device(row, self.device)
        batch, index = trained_index(whole, self.settings.off_policy, facts.policy_version)
        ref_logprobs = self._ref_logprobs(batch, index, ref)
        logprobs, entropy = self._engine(batch, index, settings.entropy_coeff > 0)
        old_logprobs = ratio_logprobs(self.settings, logprobs, old, index)
        batch = replace(batch, denominator=row.denominator * facts.scale)
        tokens = trained_tokens(batch, index, logprobs, entropy, ref_logprobs, old_logprobs)
        view = policy_view(tokens, self.settings, facts.entropy)
        seen = view.with_denominator(row.denominator * facts.policy_scale)
        result = objective(tokens, self._loss, settings, seen)
        for name, share in result.sums.items():
            sums.add_rank_sum(name, share)
        sums.add_weighted(result.token_metrics, tokens.weight)
        sums.add_sequences({**result.sequence_metrics, **view.sequence_metrics})
        add_masked(sums, whole, view, self.settings)
        if loss_traits(settings.name).uses_advantages:
            add_ages(sums, whole.policy_version[whole.weight > 0], facts.policy_version)
            if first_update:
                add_mismatch(sums, tokens, view.correction)
        return result.loss

    def _ref_logprobs(
        self, batch: PackedBatch, index: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The reference's log-probabilities [M] of the tokens ``index``; None without a penalty."""
        if not self.settings.has_reference:
            return None
        if self.settings.reference == "actor":
            assert given is not None, "reference=actor: log-probs of the reference did not come"
            return given.to(self.device)[index]
        with torch.no_grad():
            if self.reference is not None:
                return self.reference(batch, index)[0]
            assert self.policy.adapters is not None
            with self.policy.adapters.off():
                return self._engine(batch, index)[0]

    def _step(self) -> tuple[float, bool]:
        """Clip and take the optimiser step; skipped when the gradient is not finite. Returns the
        norm before clipping and whether the step was taken.
        """
        if self._engine.zero_optimization_stage() == 0:
            # Without ZeRO every rank holds the whole reduced gradient, and DeepSpeed neither
            # reports its norm nor looks for numbers that are not finite.
            limit = self.settings.optimizer.grad_clip or math.inf
            parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return norm, False
            self._engine.step()
            return norm, True
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[dict[str, torch.Tensor]]:
        """The weights of the plain model that the policy is, whole; under ZeRO-3 valid inside the
        context only.
        """
        with self._whole_state() as state:
            yield self.policy.weights(state)

    @contextlib.contextmanager
    def _whole_state(self) -> Iterator[dict[str, torch.Tensor]]:
        """The model's own state dict with whole tensors."""
        self._check_awake(weights_suffice=True)
        model = self.policy.model
        parameters = list(model.parameters()) if self._sharded else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self._sharded):
            yield {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def _meta(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "zero_stage": self.settings.zero_stage,
            "dtype": self.settings.dtype,
            "optimizer": self.settings.optimizer.name,
            "lora": asdict(self.settings.lora) if self.settings.lora.is_on else None,
            "reference": self.initial_digest,
            "num_optimizer_steps": self.num_optimizer_steps,
        }


def _join(settings: LearnerSettings, rank: int, world_size: int, init_method: str | None) -> None:
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


def _make_engine(policy: PolicyModel, settings: LearnerSettings) -> Any:
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


def _copy_keeping_ties(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies: dict[int, torch.Tensor] = {}
    return {
        name: copies.setdefault(tensor.data_ptr(), tensor.clone()) for name, tensor in state.items()
    }


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
