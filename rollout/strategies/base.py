"""What a sampling strategy is: a pure state machine between requests and results.

``start(prompt) -> (state, requests)`` and ``advance(state, results) -> (state, requests)``. The
state is a frozen, picklable record, so an unfinished tree can be checkpointed, moved to another
process and resumed. A strategy never sees the engine; it may be handed results in any grouping and
order, and its tree must not depend on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rollout.extend import ExtendRequest, ExtendResult
from rollout.tree import Tree
from treepo.base.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """What a tree grows from.

    Attributes:
        problem_id: carried to the tree.
        token_ids: int32 [P], P >= 1.
        root_key: names all random draws of the tree (``treepo.base.keys.root_key`` of seed, step
            and problem).
    """

    problem_id: str
    token_ids: np.ndarray
    root_key: int


class Strategy(Protocol):
    """See the module. ``State`` is the strategy's own frozen record; it has ``segments``, the arena
    so far.

    A strategy may also have ``finished_part(state) -> Tree``: the trajectories that a growing tree
    has finished, each a leaf of the final tree too, whose last segment keeps its path key. Training
    on parts of groups needs it.
    """

    def start(self, prompt: Prompt) -> tuple[Any, list[ExtendRequest]]: ...

    def advance(
        self, state: Any, results: Sequence[ExtendResult]
    ) -> tuple[Any, list[ExtendRequest]]: ...

    def tree(self, state: Any) -> Tree | None:
        """The finished tree, or None while it grows. Requests that are outstanding when it is
        finished are cancelled.
        """
        ...


# name -> class built from its own settings dataclass, `cls(settings)`
STRATEGIES: Registry[Any] = Registry(
    "rollout strategy",
    builtin={
        "flat": "rollout.strategies.flat:Flat",
        "treepo": "rollout.strategies.treepo:TreePO",
    },
)
