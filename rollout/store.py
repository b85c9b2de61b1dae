"""Positions in the tree and the slots behind them: handles, locks, room.

A ``Node`` is a handle on a position. Nothing is computed when one is made. It keeps its path's keys
and values until it is freed; a soft one gives them up when slots run short. Handles outlive the
cache: after new weights, or after their nodes were evicted, they find or make their position again
from their tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from rollout.kv_pool import KVPool
from rollout.radix_tree import RadixTree, TreeNode

_EVICT_SHARE = 128  # an eviction frees at least 1 / this of the pool: it looks at every node


class Node:
    """A handle on a position: the end of ``token_ids`` below ``parent``."""

    __slots__ = (
        *("store", "parent", "token_ids", "tree_node"),
        *("epoch", "is_locked", "is_soft", "is_freed"),
    )

    def __init__(
        self, store: TreeStore, parent: Node | None, token_ids: np.ndarray, tree_node: TreeNode
    ) -> None:
        self.store = store
        self.parent = parent
        self.token_ids = token_ids
        self.tree_node = tree_node
        self.epoch = store.epoch
        self.is_locked = False
        self.is_soft = False
        self.is_freed = False

    def path_token_ids(self) -> np.ndarray:
        """int32: all tokens from the root to this position."""
        parts = []
        node: Node | None = self
        while node is not None:
            parts.append(node.token_ids)
            node = node.parent
        return np.concatenate(parts[::-1])


class TreeStore:
    """The radix tree over the pool, with the handles on it.

    Attributes:
        policy_version: of the weights whose keys and values new requests may read.
        epoch: counts how often everything cached was given up; handles of older epochs look their
            position up again.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.tree = RadixTree(pool)
        self.policy_version = 0
        self.epoch = 0
        self._soft: OrderedDict[int, Node] = OrderedDict()

    # Handles.

    @property
    def root(self) -> TreeNode:
        """The empty path under the weights in force."""
        return self.tree.root(self.policy_version)

    def prefill(self, token_ids: np.ndarray) -> Node:
        """A handle on ``token_ids`` (int32 [n], n >= 1) from the root."""
        return self.handle(None, token_ids, self.tree.insert(self.root, token_ids))

    def append(self, node: Node, token_ids: np.ndarray) -> Node:
        """A handle on ``token_ids`` (int32 [n], n >= 0) below ``node``."""
        return self.handle(node, token_ids, self.tree.insert(self.resolve(node), token_ids))

    def handle(self, parent: Node | None, token_ids: np.ndarray, tree_node: TreeNode) -> Node:
        """A locked handle on the end of ``tree_node``."""
        node = Node(self, parent, token_ids, tree_node)
        self._lock(node)
        return node

    def resolve(self, node: Node) -> TreeNode:
        """The tree node at the handle's position under the weights in force, locked.

        Raises:
            ValueError: the handle was freed, or is another engine's.
        """
        self._check_alive(node)
        if not self.is_known(node):
            node.is_locked = False
            node.tree_node = self.tree.insert(self.root, node.path_token_ids())
            node.epoch = self.epoch
        if not node.is_locked:
            self._lock(node)
        return node.tree_node

    def free(self, node: Node, *, drop: bool) -> None:
        """End a handle; with ``drop`` its own tokens leave the cache unless others need them.

        Raises:
            ValueError: the handle was freed before.
        """
        self._check_alive(node)
        node.is_freed = True
        self._unlock(node)
        if not self.is_known(node):
            return
        if self.tree.is_retired(node.tree_node):
            self.release_retired(node.tree_node)  # nobody else finds it
        elif drop and len(node.token_ids):
            end = node.tree_node.end
            self.tree.remove_upwards(node.tree_node, end - len(node.token_ids))

    def soften(self, node: Node) -> None:
        """Let the handle's keys and values go when slots run short."""
        self._check_alive(node)
        node.is_soft = True
        if node.is_locked:
            self._soft[id(node)] = node

    def rest(self, node: Node) -> None:
        """Let go of the handle's keys and values, which stay as cache; the next use locks them."""
        self._check_alive(node)
        self._unlock(node)

    def is_known(self, node: Node) -> bool:
        """Whether the handle's position is in the tree, so that it need not be made again."""
        return node.epoch == self.epoch and node.tree_node.is_alive

    def set_priority(self, node: Node, priority: int) -> None:
        """Evict the handle's own position later (higher) or sooner (lower) than others."""
        self.resolve(node).priority = priority

    # Slots.

    def make_room(self, count: int, *, may_break: bool) -> bool:
        """Have ``count`` slots free: evict, and if allowed break soft locks, lowest priority first,
        then oldest.
        """
        while self.pool.num_free < count:
            wanted = count - self.pool.num_free
            self.tree.evict(max(wanted, self.pool.num_slots // _EVICT_SHARE))
            if self.pool.num_free >= count:
                break
            if not (may_break and self._soft):
                return False
            by_priority = sorted(self._soft.values(), key=lambda node: node.tree_node.priority)
            for node in by_priority[: max(1, len(by_priority) // 4)]:
                self._unlock(node)
        return True

    def give_slots(self, node: TreeNode, *, growth: int = 0, may_break: bool) -> bool:
        """Give every token on a locked path a slot, keeping ``growth`` more free; False if there
        are not enough.
        """
        bare = [n for n in node.path() if len(n.slots) < len(n.token_ids)]
        needed = sum(len(n.token_ids) - len(n.slots) for n in bare)
        if not self.make_room(needed + growth, may_break=may_break):
            return False
        for n in bare:
            self.add_slots(n, len(n.token_ids) - len(n.slots))
            self.tree.fetch(n)
        return True

    def offload(self, nodes: Iterable[Node]) -> None:
        """Move to the host what the paths of resting handles have in the pool, as far as nobody
        uses it.
        """
        for node in nodes:
            if self.is_known(node):
                for n in node.tree_node.path()[1:]:
                    if len(n.slots) and not n.lock_ref:
                        self.tree.offload(n)

    def add_slots(self, node: TreeNode, count: int) -> np.ndarray:
        """``count`` more slots for ``node``, next to what precedes them if possible. They must be
        free.
        """
        if len(node.slots):
            slots = self.pool.allocate_after(int(node.slots[-1]), count)
        else:
            slots = self.pool.allocate(count, at_end=node.is_open)
        assert slots is not None
        self.tree.set_slots(node, np.concatenate([node.slots, slots]))
        return slots

    def discard(self, private: TreeNode) -> None:
        """Give up a private node that was locked once."""
        self.tree.unlock(private)
        self.tree.remove(private)

    def too_small(self, what: str) -> str:
        """The error of a pool in which ``what`` does not fit beside what is held."""
        return (
            f"num_kv_slots={self.pool.num_slots} is too small: {what} finds only "
            f"{self.pool.num_free} slots free while live handles hold {self.tree.num_protected}"
        )

    # New weights.

    def retire(
        self,
        policy_version: int,
        keep: Iterable[TreeNode] = (),
        resting: Iterable[Node] = (),
    ) -> None:
        """Give up everything cached and serve ``policy_version`` from now on.

        Args:
            keep: open nodes of requests in flight. They and their ancestors stay, out of reach of
                every lookup, until ``release_retired``.
            resting: handles that lock nothing. What they stand on stays likewise, for those who
                go on from them.
        """
        stay = [node for node in resting if self.is_known(node)]
        self.tree.retire(keep, [node.tree_node for node in stay])
        self._soft.clear()
        self.policy_version = policy_version
        self.epoch += 1
        for node in stay:
            node.epoch = self.epoch

    def release_retired(self, base: TreeNode) -> None:
        """Drop what a finished request of older weights grew from, as far as no other needs it."""
        self.tree.remove_upwards(base, 0)
        self.tree.forget_empty_roots()

    # Locks.

    def _check_alive(self, node: Node) -> None:
        if not isinstance(node, Node):
            raise ValueError(
                f"{type(node).__name__} is no handle: prefill gives one for a sequence of token ids"
            )
        if node.store is not self:
            raise ValueError("this handle belongs to another engine: prefill its tokens here")
        if node.is_freed:
            raise ValueError(
                f"this handle (of {len(node.path_token_ids())} tokens) was freed: make a new one "
                "with prefill or append before you free the last"
            )

    def _lock(self, node: Node) -> None:
        self.tree.lock(node.tree_node)
        node.is_locked = True
        if node.is_soft:
            self._soft[id(node)] = node

    def _unlock(self, node: Node) -> None:
        if node.is_locked and self.is_known(node):
            self.tree.unlock(node.tree_node)
        node.is_locked = False
        self._soft.pop(id(node), None)
