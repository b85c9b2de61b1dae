"""The model that a KL penalty is towards, frozen: the one that training began with.

A learner keeps one itself (``reference=own``), or a process apart from it does (``actor``) and says
the log-probabilities of packed rows before the update, so that learner and reference need not be in
one memory. With adapters the policy itself is the reference while they are off (``lora_off``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.batch import PackedBatch, on_device
from trainers.model import PolicyModel, load_policy
from trainers.settings import LearnerSettings
from treepo.base.digest import combine_digests, tensor_digests


def load_reference(model_path: str, settings: LearnerSettings, device: torch.device) -> PolicyModel:
    """The model of ``model_path`` as the learner computes it, without gradient."""
    return load_policy(model_path, settings, trained=False).requires_grad_(False).to(device)


class Reference:
    """A reference by itself, without a learner.

    Args:
        model_path: folder or Hub name, the learner's.
        settings: the learner's.
    """

    def __init__(self, model_path: str, settings: LearnerSettings) -> None:
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy = load_reference(model_path, settings, self.device)

    def digest(self) -> str:
        """Of the weights; :attr:`trainers.learner.Learner.initial_digest` must be the same."""
        return combine_digests(tensor_digests(dict(self.policy.model.state_dict())))

    @torch.no_grad()
    def logprobs(self, mini_batches: Sequence[Sequence[PackedBatch]]) -> list[list[torch.Tensor]]:
        """Log-probabilities [T] of the trained tokens of every row under its temperature, 0
        elsewhere, as nested as ``mini_batches``. On the CPU, float32 or wider.
        """
        return [[self._of_row(row) for row in rows] for rows in mini_batches]

    def _of_row(self, row: PackedBatch) -> torch.Tensor:
        batch = on_device(row, self.device)
        index = torch.nonzero(batch.weight > 0).squeeze(1)
        logprobs, _ = self.policy(batch, index)
        full = torch.zeros(row.num_tokens, dtype=logprobs.dtype, device=self.device)
        full[index] = logprobs
        return full.cpu()
