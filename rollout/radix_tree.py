"""The radix tree is the cache: every node holds a run of tokens and the KV slots of their keys and
values.

A lock is a lifetime: locking a node locks its whole path, and only unlocked nodes without children
are evicted. Roots are keyed by policy version, so a request never reads keys and values of other
weights. Nodes are segment-unique: two forks that draw equal tokens stay two nodes; a lookup finds
either.

A node's tokens come in three states, always in this order: computed (the pool holds their keys and
values), slotted (they have a slot that is not written yet), and bare. The computed ones of a node
that nobody uses may be moved to the host's memory; then all are bare until it has slots again.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from rollout.host_kv import HostKV, from_host, to_host
from rollout.kv_pool import KVPool

_NO_TOKENS = np.zeros(0, np.int32)
_NO_SLOTS = np.zeros(0, np.int64)


@dataclass(eq=False, slots=True)
class TreeNode:
    """A run of tokens below ``parent``.

    Attributes:
        start: depth of the first token (number of tokens before it on the path).
        token_ids: int32 [n]; empty while the node is open (being sampled).
        slots: int64 [m], of the first m tokens; an open node's are reserved ahead.
        num_computed: tokens whose keys and values are in the pool, <= m.
        lock_ref: number of locks on this node or below it.
        priority: nodes of lower priority are evicted first.
        host: keys and values of its first tokens, while they are in the host's memory; it has no
            slots then.
        is_open: tokens are still being added; no lookup finds it.
        is_private: no lookup ever finds it.
    """

    parent: TreeNode | None
    policy_version: int
    start: int
    token_ids: np.ndarray = field(default_factory=lambda: _NO_TOKENS)
    slots: np.ndarray = field(default_factory=lambda: _NO_SLOTS)
    num_computed: int = 0
    lock_ref: int = 0
    priority: int = 0
    last_use: int = 0
    host: HostKV | None = None
    is_open: bool = False
    is_private: bool = False
    is_alive: bool = True
    num_children: int = 0
    children: dict[int, list[TreeNode]] = field(default_factory=dict)  # by first token

    @property
    def end(self) -> int:
        """Depth after the last token (of a closed node)."""
        return self.start + len(self.token_ids)

    def path(self) -> list[TreeNode]:
        """Nodes from the root to this one, both included."""
        nodes = []
        node: TreeNode | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def path_token_ids(self) -> np.ndarray:
        """int32 [end]: all tokens from the root to the end of this node."""
        return np.concatenate([node.token_ids for node in self.path()])


class RadixTree:
    """The nodes over one pool."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.roots: dict[int, TreeNode] = {}
        self._retired: list[TreeNode] = []  # roots of older weights that requests still grow from
        self.num_protected = 0  # slots of locked nodes
        self._clock = 0

    def root(self, policy_version: int) -> TreeNode:
        """The empty path under weights ``policy_version``."""
        if policy_version not in self.roots:
            self.roots[policy_version] = TreeNode(None, policy_version, 0)
        return self.roots[policy_version]

    def match(self, node: TreeNode, token_ids: np.ndarray) -> tuple[TreeNode, int]:
        """Follow ``token_ids`` below ``node`` as far as the tree knows them; a node in which they
        end is split there.

        Returns:
            (the node whose end is the longest known prefix, its number of tokens).
        """
        matched = 0
        while matched < len(token_ids):
            rest = token_ids[matched:]
            best, best_length = None, 0
            for child in node.children.get(int(rest[0]), ()):
                length = _common_prefix(child.token_ids, rest)
                if length > best_length:
                    best, best_length = child, length
            if best is None:
                break
            matched += best_length
            if best_length < len(best.token_ids):
                node = self.split(best, best_length)
                break
            node = best
        return node, matched

    def insert(self, node: TreeNode, token_ids: np.ndarray) -> TreeNode:
        """The node at the end of ``token_ids`` below ``node``: found, or made without slots."""
        found, matched = self.match(node, token_ids)
        if matched == len(token_ids):
            return found
        return self._add(found, np.asarray(token_ids[matched:], np.int32))

    def insert_private(self, node: TreeNode, token_ids: np.ndarray) -> TreeNode:
        """A new node below ``node`` that no lookup ever finds."""
        child = TreeNode(node, node.policy_version, node.end, np.asarray(token_ids, np.int32))
        child.is_private = True
        node.num_children += 1
        return child

    def open_child(self, node: TreeNode) -> TreeNode:
        """A new node below ``node`` to which tokens will be added; no lookup finds it before
        ``close``.
        """
        assert not node.is_open, "a node that is still growing cannot be forked"
        child = TreeNode(node, node.policy_version, node.end, is_open=True)
        child.is_private = node.is_private
        node.num_children += 1
        return child

    def close(self, node: TreeNode, token_ids: np.ndarray, num_computed: int, keep: int) -> None:
        """End an open node: set its tokens, keep its first ``keep`` slots and give the others back.

        A node that ends with no token is removed.
        """
        assert node.is_open and node.parent is not None and num_computed <= keep <= len(token_ids)
        node.is_open = False
        node.token_ids = np.array(token_ids, np.int32)
        node.num_computed = num_computed
        self.pool.free(node.slots[keep:])
        self.set_slots(node, node.slots[:keep])
        self.touch(node)
        if not len(token_ids):
            assert not node.lock_ref
            node.parent.num_children -= 1
            node.is_alive = False
        elif not node.is_private:
            node.parent.children.setdefault(int(node.token_ids[0]), []).append(node)

    def publish(self, node: TreeNode, length: int) -> None:
        """Let lookups find a private node, cut after its first ``length`` tokens."""
        assert node.is_private and node.parent is not None and 0 < length <= len(node.token_ids)
        assert length == len(node.token_ids) or not node.num_children
        self.pool.free(node.slots[length:])
        self.set_slots(node, node.slots[:length])
        node.token_ids = node.token_ids[:length]
        node.num_computed = min(node.num_computed, length)
        node.is_private = False
        node.parent.children.setdefault(int(node.token_ids[0]), []).append(node)
        self.touch(node)

    def set_slots(self, node: TreeNode, slots: np.ndarray) -> None:
        """Record that ``node`` holds ``slots``."""
        if node.lock_ref:
            self.num_protected += len(slots) - len(node.slots)
        node.slots = slots

    def split(self, node: TreeNode, offset: int) -> TreeNode:
        """Cut a node after ``offset`` of its tokens. The node itself keeps the lower part, so
        whoever points at its end still does.

        Returns:
            the new upper part.
        """
        assert not node.is_open and not node.is_private and 0 < offset < len(node.token_ids)
        parent = node.parent
        assert parent is not None, "the root is empty"
        upper = TreeNode(
            parent,
            node.policy_version,
            node.start,
            token_ids=node.token_ids[:offset],
            slots=node.slots[:offset],
            num_computed=min(node.num_computed, offset),
            lock_ref=node.lock_ref,
            priority=node.priority,
            last_use=node.last_use,
            num_children=1,
        )
        if node.host is not None:
            upper.host, node.host = node.host.split(offset)
        siblings = parent.children[int(node.token_ids[0])]
        siblings[siblings.index(node)] = upper
        node.parent = upper
        node.start += offset
        node.token_ids = node.token_ids[offset:]
        node.slots = node.slots[offset:]
        node.num_computed = max(0, node.num_computed - offset)
        upper.children[int(node.token_ids[0])] = [node]
        return upper

    def lock(self, node: TreeNode) -> None:
        """Keep ``node`` and its ancestors until ``unlock``."""
        self._clock += 1
        walk: TreeNode | None = node
        while walk is not None:
            if not walk.lock_ref:
                self.num_protected += len(walk.slots)
            walk.lock_ref += 1
            walk.last_use = self._clock
            walk = walk.parent

    def unlock(self, node: TreeNode) -> None:
        walk: TreeNode | None = node
        while walk is not None:
            assert walk.lock_ref > 0, "unlocked more often than locked"
            walk.lock_ref -= 1
            if not walk.lock_ref:
                self.num_protected -= len(walk.slots)
            walk = walk.parent

    def touch(self, node: TreeNode) -> None:
        """Mark as just used."""
        self._clock += 1
        node.last_use = self._clock

    def remove(self, node: TreeNode) -> None:
        """Delete an unlocked node without children and give its slots back."""
        parent = node.parent
        assert parent is not None and not node.lock_ref and not node.num_children
        assert not node.is_open
        self.pool.free(node.slots)
        node.slots = _NO_SLOTS
        node.num_computed = 0
        node.host = None
        node.is_alive = False
        parent.num_children -= 1
        if not node.is_private:
            first = int(node.token_ids[0])
            parent.children[first].remove(node)
            if not parent.children[first]:
                del parent.children[first]

    def remove_upwards(self, node: TreeNode, min_start: int) -> None:
        """Delete ``node`` and then its ancestors, as long as they are unlocked, without children
        and start at depth ``min_start`` or deeper.
        """
        walk: TreeNode | None = node
        while (
            walk is not None
            and walk.parent is not None
            and walk.is_alive
            and not walk.lock_ref
            and not walk.num_children
            and walk.start >= min_start
        ):
            parent = walk.parent
            self.remove(walk)
            walk = parent

    def evict(self, num_slots: int) -> int:
        """Delete unlocked nodes, lowest priority and least recently used first, until ``num_slots``
        slots came free or nothing unlocked is left. A node all of whose children are on the host
        goes there, too.

        Returns:
            slots that came free.
        """
        heap = [
            (node.priority, node.last_use, id(node), node)
            for node in self.nodes()
            if self._may_go(node)
        ]
        heapq.heapify(heap)
        freed = 0
        while heap and freed < num_slots:
            node = heapq.heappop(heap)[3]
            freed += len(node.slots)
            parent = node.parent
            assert parent is not None
            if node.num_children:
                self.offload(node)
            else:
                self.remove(node)
            if self._may_go(parent):
                heapq.heappush(heap, (parent.priority, parent.last_use, id(parent), parent))
        return freed

    def _may_go(self, node: TreeNode) -> bool:
        """Whether nothing that holds slots, and no lock, needs the node's own."""
        if node.lock_ref or node.parent is None or node.host is not None:
            return False
        below = [child for children in node.children.values() for child in children]
        return len(below) == node.num_children and all(child.host is not None for child in below)

    def offload(self, node: TreeNode) -> None:
        """Move an unlocked node's keys and values to the host's memory; its slots come free."""
        assert not node.lock_ref and not node.is_open and node.host is None
        node.host = to_host(self.pool, node.slots[: node.num_computed])
        self.pool.free(node.slots)
        node.slots = _NO_SLOTS
        node.num_computed = 0

    def fetch(self, node: TreeNode) -> None:
        """Bring a node's keys and values back from the host into its slots."""
        if node.host is not None:
            count = node.host.num_tokens
            from_host(self.pool, node.slots[:count], node.host)
            node.num_computed, node.host = count, None

    def retire(self, keep: Iterable[TreeNode] = (), resting: Iterable[TreeNode] = ()) -> None:
        """Delete every node, locked ones too, and give all slots back.

        Args:
            keep: open nodes that stay with all their ancestors, each for one lock of its own. No
                lookup finds them any more.
            resting: closed nodes that stay so, too, without a lock.
        """
        locks: Counter[TreeNode] = Counter()
        for leaf in keep:
            assert leaf.is_open
            locks.update(leaf.path())
        for closed in resting:
            for node in closed.path():
                locks[node] += 0
        num_children = Counter(node.parent for node in locks if node.parent is not None)
        for node in list(self.nodes()):
            if node not in locks:
                assert not node.is_open, "requests are running"
                self.pool.free(node.slots)
                node.slots = _NO_SLOTS
                node.host = None
                node.is_alive = False
        for node, count in locks.items():
            node.lock_ref = count
            node.num_children = num_children[node]
            node.children = {
                first: kept
                for first, below in node.children.items()
                if (kept := [child for child in below if child in locks])
            }
        roots = [*self.roots.values(), *self._retired]
        self._retired = [root for root in roots if root in locks]
        self.roots.clear()
        self.num_protected = sum(len(node.slots) for node, count in locks.items() if count)

    def forget_empty_roots(self) -> None:
        """Forget retired roots below which nothing is left."""
        self._retired = [root for root in self._retired if root.num_children]

    def is_retired(self, node: TreeNode) -> bool:
        """Whether no lookup from a root finds the node, which older weights computed."""
        return bool(self._retired) and node.path()[0] in self._retired

    @property
    def num_host_bytes(self) -> int:
        """Of keys and values in the host's memory."""
        return sum(node.host.num_bytes for node in self.nodes() if node.host is not None)

    def nodes(self) -> Iterator[TreeNode]:
        """All nodes that lookups can reach, roots included, and retired ones."""
        stack = [*self.roots.values(), *self._retired]
        while stack:
            node = stack.pop()
            yield node
            for children in node.children.values():
                stack.extend(children)

    def check_integrity(self, hidden: list[TreeNode] | None = None) -> None:
        """Assert that free + held == total, that no slot has two owners, and that locks and depths
        add up.

        Args:
            hidden: open and private nodes, which lookups cannot reach.
        """
        nodes = list(self.nodes()) + [n for n in (hidden or [])]
        owned = np.concatenate([_NO_SLOTS, *(node.slots for node in nodes)])
        free = [np.arange(start, start + length) for start, length in self.pool.free_runs()]
        every = np.sort(np.concatenate([owned, *free]))
        assert np.array_equal(every, np.arange(self.pool.num_slots)), "free + held != total"
        assert len(owned) == self.pool.num_held
        assert self.num_protected == sum(len(n.slots) for n in nodes if n.lock_ref)
        children: dict[int, list[TreeNode]] = {}
        for node in nodes:
            if node.parent is not None:
                children.setdefault(id(node.parent), []).append(node)
        for node in nodes:
            below = children.get(id(node), [])
            assert node.is_alive and node.num_children == len(below)
            assert node.lock_ref >= sum(child.lock_ref for child in below)
            assert node.num_computed <= len(node.slots)
            if node.host is not None:
                assert not len(node.slots)
                assert 0 < node.host.num_tokens <= len(node.token_ids)
            if not node.is_open:
                assert len(node.slots) <= len(node.token_ids)
                assert all(child.start == node.end for child in below)
            assert node.parent is None or node.policy_version == node.parent.policy_version

    def _add(self, parent: TreeNode, token_ids: np.ndarray) -> TreeNode:
        node = TreeNode(parent, parent.policy_version, parent.end, token_ids)
        parent.children.setdefault(int(token_ids[0]), []).append(node)
        parent.num_children += 1
        self.touch(node)
        return node


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
