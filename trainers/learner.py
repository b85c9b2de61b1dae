"""One rank of the learner: the policy in a DeepSpeed engine, updated on packed rows.

The gradient of an update is exactly that of ``sum of token losses / denominator`` over all rows of
all ranks, however they are distributed: DeepSpeed's averaging over ranks is multiplied out, its
division by accumulation steps is not used, and the accumulation boundary is set by hand, so that
the number of rows may differ from update to update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainers.batch import PackedBatch, on_device
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.deepspeed_engine import is_sharded, join, make_engine, take_step, whole_weights
from trainers.export import export_policy
from trainers.held_memory import tensors_of_model, tensors_of_optimizer
from trainers.losses import POLICY_LOSSES, trained_tokens
from trainers.metrics import MetricSums
from trainers.mismatch import add_ages, add_mismatch
from trainers.model import PolicyModel, load_policy
from trainers.objective import objective
from trainers.off_policy import trained_index
from trainers.packing import pack_row, path_tree
from trainers.policy_view import (
    UpdateFacts,
    add_masked,
    facts_of_update,
    policy_view,
    ratio_logprobs,
)
from trainers.reference import load_reference
from trainers.schedule import learning_rate
from trainers.settings import LearnerSettings, loss_traits
from trainers.weight_sync import Publication, prepare
from treepo.base.aside import Aside, storages
from treepo.base.digest import combine_digests, tensor_digests


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
        join(settings, rank, world_size, init_method)
        policy = load_policy(model_path, settings)
        # Of what a resumed run has to find in the model's folder: frozen weights, and those that a
        # KL penalty is towards.
        self.initial_digest = ""
        if settings.lora.is_on or settings.has_reference:
            self.initial_digest = combine_digests(
                tensor_digests(policy.weights(policy.model.state_dict()))
            )
        self._engine = make_engine(policy, settings)
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
            grad_norm, applied = take_step(self._engine, self.settings.optimizer.grad_clip)
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
            return _copy_keeping_ties(state) if is_sharded(self._engine) else state

    def digest(self) -> str:
        """64-bit digest (16 hex digits) of :meth:`state_tensors`."""
        with self._gathered() as state:
            return combine_digests(tensor_digests(state))

    def save(self, folder: str | Path) -> None:
        """Write weights, optimiser, step count and random states; all ranks into one folder."""
        self._check_awake()
        save_checkpoint(Path(folder), self._engine, self._note(), self.rank)

    def load(self, folder: str | Path) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            ValueError: the folder is no learner checkpoint, or one of other ranks, ZeRO stage,
                dtype, optimiser, adapters or frozen model.
        """
        self._check_awake()
        saved = load_checkpoint(
            Path(folder), self._engine, self._note(), self.rank, self.model_path
        )
        self.num_optimizer_steps = saved["num_optimizer_steps"]

    def export_hf(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` loads: safetensors, configuration, and the
        tokenizer's files of the original model. With adapters they are merged into the weights,
        and stand by themselves in its subfolder ``adapter``. Written by rank 0.
        """
        with self._whole_state() as own:
            if self.rank == 0:
                export_policy(self.policy, own, Path(folder), self.model_path)
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
        with whole_weights(self._engine, model):
            yield {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def _note(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "zero_stage": self.settings.zero_stage,
            "dtype": self.settings.dtype,
            "optimizer": self.settings.optimizer.name,
            "lora": asdict(self.settings.lora) if self.settings.lora.is_on else None,
            "reference": self.initial_digest,
            "num_optimizer_steps": self.num_optimizer_steps,
        }


def _copy_keeping_ties(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies: dict[int, torch.Tensor] = {}
    return {
        name: copies.setdefault(tensor.data_ptr(), tensor.clone()) for name, tensor in state.items()
    }
