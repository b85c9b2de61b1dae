"""The learner rank as a worker: the class that becomes a Ray actor."""

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

    def update(self, mini_batches: Sequence[Sequence[PackedBatch]]) -> dict[str, float]:
        return self.learner.update(mini_batches)

    def logprobs(self, batches: Sequence[PackedBatch]) -> list[Any]:
        return self.learner.logprobs(batches)

    def score_paths(self, paths: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.learner.score_paths(paths)

    def publication(self, dtype: str) -> tuple[Any, dict[str, int], dict[str, Any]]:
        """``(manifest, expected digests, tensors)`` of the weights for engines of ``dtype``; ranks
        other than 0 return no tensors, since one copy is sent.
        """
        sent = self.learner.publication(dtype)
        return sent.manifest, sent.digests, sent.tensors if self.rank == 0 else {}

    def digest(self) -> str:
        return self.learner.digest()

    def save(self, folder: str) -> None:
        self.learner.save(folder)

    def load(self, folder: str) -> None:
        self.learner.load(folder)

    def export_hf(self, folder: str) -> None:
        self.learner.export_hf(folder)

    def close(self) -> None:
        self.learner.close()


def free_port(host: str = "") -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
