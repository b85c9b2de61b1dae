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

_FIRST_TREES = 8  # start whatever their size may be


class TreeRoom:
    """Room for trees in a pool of ``num_slots`` tokens.

    Args:
        segment_length: what a path grows by at most; 0: as far as the strategy allows.
    """

    def __init__(self, strategy: Strategy, num_slots: int, segment_length: int = 0) -> None:
        self._num_slots = num_slots
        self._largest = 0  # tokens of a finished tree
        self._limit = num_slots // _FIRST_TREES
        settings = getattr(strategy, "settings", None)
        if isinstance(settings, FlatSettings | TreePOSettings):
            longest = min(settings.max_response_length, segment_length or self._limit)
            self._limit = min(self._limit, settings.n * longest)

    def has_room(self, num_growing: int, num_tokens: int) -> bool:
        """Whether one more tree, of ``num_tokens`` so far, may start beside those that grow; the
        first always may.
        """
        size = max(self._largest, num_tokens) if self._largest else num_tokens + self._limit
        return not num_growing or (num_growing + 1) * size <= self._num_slots

    def note(self, num_tokens: int) -> None:
        """A tree has ended, finished or put aside, with so many tokens."""
        self._largest = max(self._largest, num_tokens)
