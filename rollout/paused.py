"""Keys and values of trees that were put aside, kept over new weights (``kv_over_update=keep``).

A path that goes on where it stopped reads the keys and values that older weights computed for it,
as PipelineRL does with requests in flight (arXiv 2509.19128, "in-flight weight updates"); its next
tokens, and their keys and values, are the new weights'. All else is computed anew: what leaves the
prompt, what leaves a cut inside a segment, and other trees. Until a tree goes on, the engine may
give its keys and values up when slots run short; then its path is computed anew, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rollout.growth import Growth
from rollout.store import Node, TreeStore

Place = tuple[int, int]  # (path key of the segment that ends there, depth in tokens)
_MOST_UPDATES = 2  # weight sets that pass before a tree that does not go on is given up


@dataclass(eq=False, slots=True)
class _Paused:
    checksum: int
    places: dict[Place, Node]
    num_updates: int = 0  # weight sets since it was put aside


class PausedTrees:
    """Where the paths of trees that were put aside stand, by the trees' root keys.

    Args:
        on_host: keys and values move to the host's memory meanwhile.
    """

    def __init__(self, store: TreeStore, *, on_host: bool) -> None:
        self._store = store
        self._on_host = on_host
        self._trees: dict[int, _Paused] = {}

    def __len__(self) -> int:
        return len(self._trees)

    def put(self, growth: Growth, places: Mapping[Place, Node]) -> None:
        """Take a tree's handles; they lock nothing from here on."""
        self.forget(growth.root_key)
        self._trees[growth.root_key] = _Paused(growth.checksum, dict(places))
        for node in places.values():
            self._store.rest(node)
        if self._on_host:
            self._store.offload(places.values())

    def take(self, growth: Growth) -> dict[Place, Node]:
        """Give a tree's handles back; none if it is not known here, or grew on elsewhere since."""
        paused = self._trees.get(growth.root_key)
        if paused is None or paused.checksum != growth.checksum:
            self.forget(growth.root_key)
            return {}
        del self._trees[growth.root_key]
        return paused.places

    def forget(self, root_key: int) -> None:
        """Give a tree up."""
        if root_key in self._trees:
            for node in reversed(self._trees.pop(root_key).places.values()):
                self._store.free(node, drop=True)

    def forget_all(self) -> None:
        """Give all trees up."""
        for root_key in list(self._trees):
            self.forget(root_key)

    def note_update(self) -> None:
        """New weights are about to come: trees that nobody goes on with are given up."""
        for root_key, paused in list(self._trees.items()):
            paused.num_updates += 1
            has_any = any(self._store.is_known(node) for node in paused.places.values())
            if paused.num_updates > _MOST_UPDATES or not has_any:
                self.forget(root_key)

    def nodes(self) -> list[Node]:
        """All trees' handles."""
        return [node for paused in self._trees.values() for node in paused.places.values()]
