"""The two roads of weights from the learner to the engines (``cluster.weight_transport``); neither
passes through this process. That they arrived is proved in ``treepo/sync.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from treepo.calls import Call, answers, answers_that_meet, begin
from treepo.config import ClusterConfig

# What a rank sends, as references: its manifest, digests and arrays. Rank 0's are those that hold.
Parts = tuple[Any, Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Publication:
    """The learner's weights on their way to the object store.

    Attributes:
        calls: each rank's (manifest, digests); rank 0's are those that hold.
        arrays: where the object store has them.
    """

    calls: list[Call]
    arrays: Any


def put_into_store(learners: list[Any], dtype: str) -> list[Parts]:
    """Have the learner put its weights into the object store, for engines of ``dtype``; by rank."""
    return [learner.publication.options(num_returns=3).remote(dtype) for learner in learners]


def through_object_store(
    learners: list[Any], rollout: list[Any], version: int, dtype: str, timeout: float
) -> tuple[dict[str, int], list[dict[str, int]]]:
    """All engines load what the learner has put into the object store.

    Returns:
        the digests that an engine must find, and those that each engine found, by rank.
    """
    parts = put_into_store(learners, dtype)
    manifests = answers("learner rank", [part[0] for part in parts], timeout)
    digests = answers("learner rank", [part[1] for part in parts], timeout)
    loads = begin(rollout, "load_weights", version, manifests[0], parts[0][2])
    return digests[0], answers("rollout worker", loads, timeout)


@dataclass(kw_only=True, eq=False)
class Broadcasts:
    """Over a group of learner rank 0 and the engines, which a transfer that fails breaks: the next
    one makes another.
    """

    config: ClusterConfig
    learners: list[Any]
    rollout: list[Any]
    _has_group: bool = False

    def send(self, version: int, dtype: str) -> tuple[dict[str, int], list[dict[str, int]]]:
        """As :func:`through_object_store`."""
        if not self._has_group:
            self._make_group()
        self._has_group = False
        found = self._meet(
            begin(self.learners, "send_weights", version, dtype),
            begin(self.rollout, "receive_weights", version),
        )
        self._has_group = True
        return found["learner rank"][0], found["rollout worker"]

    def _make_group(self) -> None:
        timeout, sender = self.config.weight_timeout_seconds, self.learners[:1]
        members = ["learner rank 0", *(f"rollout worker {i}" for i in range(len(self.rollout)))]
        opened = begin(sender, "open_weight_group", timeout)
        (address,) = answers("learner rank", opened, self.config.call_timeout_seconds)
        self._meet(
            begin(sender, "join_weight_group", members, timeout),
            begin(self.rollout, "join_weight_group", address, members, timeout),
        )

    def _meet(self, of_learners: list[Any], of_rollout: list[Any]) -> dict[str, list[Any]]:
        refs = {"rollout worker": of_rollout, "learner rank": of_learners}
        return answers_that_meet(refs, self.config.call_timeout_seconds)
