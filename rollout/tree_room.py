"""How many trees may grow at one time.

Trees begin narrow, so many could start before the first has its size; then their keys and values no
longer fit, are given up, and are computed again and again. So a tree starts only if all that grow
would fit, were each as large as the largest so far. Before one has finished, that is as large as
the strategy allows, but an eighth of the pool at most: responses rarely have the length they may
have.
"""

from __future__ import annotations

from rollout.strategies.base import Strategy
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import Tree

_FIRST_TREES = 8  # start whatever their size may be


class TreeRoom:
    """Room for trees in a pool of ``num_slots`` tokens."""

    def __init__(self, strategy: Strategy, num_slots: int) -> None:
        self._num_slots = num_slots
        self._largest = 0  # tokens of a finished tree
        self._limit = num_slots // _FIRST_TREES
        settings = getattr(strategy, "settings", None)
        if isinstance(settings, FlatSettings | TreePOSettings):
            self._limit = min(self._limit, settings.n * settings.max_response_length)

    def has_room(self, num_growing: int, prompt_length: int) -> bool:
        """Whether one more tree may start beside those that grow; the first always may."""
        size = self._largest or prompt_length + self._limit
        return not num_growing or (num_growing + 1) * size <= self._num_slots

    def note(self, tree: Tree) -> None:
        """A tree has finished."""
        size = sum(segment.num_tokens for segment in tree.segments)
        self._largest = max(self._largest, size)
