"""The learner rank and the reference as workers: the classes that become Ray actors."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from trainers.batch import PackedBatch
from trainers.settings import LearnerSettings


class LearnerWorker:
    """A thin shell around :class:`trainers.learner.Learner`, one actor a rank; make it with
    ``ray.remote(LearnerWorker)``.

    Make all ranks, ask rank 0 for :meth:`rendezvous_address`, then call :meth:`setup` on all at
    once: each waits for the others. The other methods are the learner's, and collective too.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.learner: Any = None

    def ping(self) -> int:
        """Answers with the rank once everything called before has been done.

        Raises:
            RuntimeError: :meth:`setup` has not been called or has failed.
        """
        if self.learner is None:
            raise RuntimeError(f"learner rank {self.rank} has not loaded a model")
        return self.rank

    def rendezvous_address(self) -> str:
        """Where the ranks meet, ``tcp://host:port``; ask rank 0."""
        host = ray.util.get_node_ip_address()
        return f"tcp://{host}:{free_port(host)}"

    def setup(self, init_method: str | None, model_path: str, settings: LearnerSettings) -> None:
        """Join the other ranks and load the model (a single rank needs no ``init_method``)."""
        # Imported here, so that an actor answers before torch and DeepSpeed are loaded.
        from trainers.learner import Learner

        self.learner = Learner(model_path, settings, self.rank, self.world_size, init_method)

    def update(
        self,
        mini_batches: Sequence[Sequence[PackedBatch]],
        ref_logprobs: Sequence[Sequence[Any]] | None = None,
        policy_version: int = 0,
    ) -> dict[str, float]:
        return self.learner.update(mini_batches, ref_logprobs, policy_version)

    def initial_digest(self) -> str:
        return self.learner.initial_digest

    def score_paths(self, paths: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.learner.score_paths(paths)

    def publication(self, dtype: str) -> tuple[Any, dict[str, int], dict[str, np.ndarray]]:
        """``(manifest, expected digests, arrays)`` of the weights for engines of ``dtype``; empty
        from ranks other than 0, since one copy is sent.
        """
        from trainers.weight_sender import shared_arrays

        if self.rank:
            self.learner.state_tensors()  # collective where weights are sharded
            return None, {}, {}
        sent = self.learner.publication(dtype)
        return sent.manifest, sent.digests, shared_arrays(sent.tensors, sent.manifest)

    def open_weight_group(self, timeout_seconds: float) -> tuple[str, int]:
        """Rank 0: where receivers of weights meet the learner, (host, port). A later call begins
        anew.
        """
        from treepo.base.weight_group import open_store

        self._weight_store = open_store(ray.util.get_node_ip_address(), timeout_seconds)
        return self._weight_store.host, self._weight_store.port

    def join_weight_group(self, members: Sequence[str], timeout_seconds: float) -> None:
        """Rank 0: wait for the receivers; see ``treepo.base.weight_group.WeightGroup``."""
        from treepo.base.weight_group import SENDER, WeightGroup

        self._weight_group = WeightGroup(
            self._weight_store,
            SENDER,
            members,
            device=self.learner.device,
            timeout_seconds=timeout_seconds,
        )

    def send_weights(self, version: int, dtype: str) -> dict[str, int]:
        """Broadcast the weights to the weight group; the digests that an engine must find (none
        from ranks other than 0). Collective.
        """
        from trainers.weight_sender import send_weights

        tensors = self.learner.state_tensors()
        return {} if self.rank else send_weights(self._weight_group, version, tensors, dtype)

    def digest(self) -> str:
        return self.learner.digest()

    def sleep(self, keep_weights: bool) -> int:
        return self.learner.sleep(keep_weights=keep_weights)

    def wake(self) -> int:
        return self.learner.wake()

    def save(self, folder: str) -> None:
        self.learner.save(folder)

    def load(self, folder: str) -> None:
        self.learner.load(folder)

    def export_hf(self, folder: str) -> None:
        self.learner.export_hf(folder)


class ReferenceWorker:
    """A thin shell around :class:`trainers.reference.Reference`, for ``reference=actor``; make it
    with ``ray.remote(ReferenceWorker)`` and call :meth:`setup`. The other methods are the
    reference's.
    """

    def __init__(self) -> None:
        self.reference: Any = None

    def setup(self, model_path: str, settings: LearnerSettings) -> None:
        from trainers.reference import Reference

        self.reference = Reference(model_path, settings)

    def digest(self) -> str:
        return self.reference.digest()

    def logprobs(self, mini_batches: Sequence[Sequence[PackedBatch]]) -> list[list[Any]]:
        return self.reference.logprobs(mini_batches)


def free_port(host: str = "") -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
