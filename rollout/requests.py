"""A segment to be sampled, from its submission to its completion."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rollout.extend import ExtendSpec, StopReason
from rollout.radix_tree import TreeNode
from rollout.running import Drawn
from rollout.store import Node


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One sampled segment. Arrays are [n]; see ``rollout.extend.ExtendResult``.

    Attributes:
        request_id: as ``submit`` returned it.
        node: handle on the segment's end; the caller frees it.
        policy_versions: int32, of the weights that drew each token.
    """

    request_id: int
    node: Node
    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish_reason: str
    policy_versions: np.ndarray
    stop_reason: StopReason | None = None
    entropy: np.ndarray | None = None
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


@dataclass(eq=False, slots=True)
class Request:
    """A request's mutable state.

    Attributes:
        node: its own handle on the position it grows from.
        drawn: what it had drawn when it was put back; while it runs the table holds it.
        base: what the segment grows from, while running.
        leaf: the open node, while running.
        row: in the table, while running.
        is_fresh: some of its path is not computed yet.
        versions: (number of the first token, weights) of each stretch drawn under one version.
        is_retired: it grows from keys and values of older weights.
    """

    request_id: int
    node: Node
    spec: ExtendSpec
    path_key: int
    drawn: Drawn = field(default_factory=Drawn)
    base: TreeNode | None = None
    leaf: TreeNode | None = None
    row: int = -1
    is_fresh: bool = True
    versions: list[tuple[int, int]] = field(default_factory=list)
    is_retired: bool = False

    def policy_versions(self, count: int) -> np.ndarray:
        """int32 [count]: weights that drew each token."""
        found = np.zeros(count, np.int32)
        for first, version in self.versions:
            found[first:] = version
        return found
