"""Random trees with slots in a pool, and query blocks on their nodes, for tests of attention."""

from __future__ import annotations

import numpy as np
import torch

from rollout.attention.base import Block
from rollout.attention.spans import lay_out
from rollout.kv_pool import KVPool
from rollout.radix_tree import RadixTree, TreeNode

NUM_SLOTS = 3000


class TreeMaker:
    """Adds nodes to a tree over one pool, with slots as scattered as asked for."""

    def __init__(self, seed: int, *, scattered: bool = True, num_slots: int = NUM_SLOTS) -> None:
        self.rng = np.random.default_rng(seed)
        self.pool = KVPool(num_slots, device=torch.device("cpu"), dtype=torch.float32)
        self.tree = RadixTree(self.pool)
        self.free = np.arange(num_slots)
        if scattered:
            self.rng.shuffle(self.free)

    @property
    def root(self) -> TreeNode:
        return self.tree.root(0)

    def slots(self, count: int) -> np.ndarray:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "the test's pool is too small"
        return taken

    def node(self, parent: TreeNode, num_tokens: int) -> TreeNode:
        """A closed node of ``num_tokens`` tokens."""
        node = self.tree.insert_private(parent, self.rng.integers(0, 50, num_tokens))
        self.tree.set_slots(node, self.slots(num_tokens))
        return node

    def open_node(self, parent: TreeNode, reserved: int) -> TreeNode:
        """An open node with ``reserved`` slots."""
        node = self.tree.open_child(parent)
        self.tree.set_slots(node, self.slots(reserved))
        return node

    def random(
        self, num_nodes: int, max_tokens: int, share: float = 0.6, empty: float = 0.0
    ) -> list[Block]:
        """A random tree and blocks on a ``share`` of its nodes, in random order. A share of
        ``empty`` of the nodes has no token, and a block on one no row; the last node has some.
        """
        nodes = [self.root]
        for i in range(num_nodes):
            parent = nodes[self.rng.integers(len(nodes))]
            is_empty = empty and i < num_nodes - 1 and self.rng.random() < empty
            count = 0 if is_empty else int(self.rng.integers(1, max_tokens + 1))
            nodes.append(self.node(parent, count))
        chosen = [node for node in nodes[1:] if self.rng.random() < share]
        if not any(len(node.token_ids) for node in chosen):
            chosen = nodes[-1:]
        blocks = []
        for node in chosen:
            start = int(self.rng.integers(0, max(1, len(node.token_ids))))
            blocks.append(Block(node, start, len(node.token_ids), node.token_ids[start:]))
        self.rng.shuffle(blocks)  # type: ignore[arg-type]
        return blocks


def laid_out(blocks: list[Block]):
    """(blocks in row order, spans, positions [N])."""
    ordered, spans = lay_out(blocks)
    positions = [np.arange(b.node.start + b.start, b.node.start + b.stop) for b in ordered]
    return ordered, spans, np.concatenate(positions)


def last_token(node: TreeNode, count: int) -> Block:
    """The last of ``count`` tokens of an open node, as a block."""
    return Block(node, count - 1, count, np.zeros(1, np.int32))


def random_tensors(
    seed: int,
    num_rows: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    num_slots: int = NUM_SLOTS,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query [N, H, Dk], keys [slots + 1, Hkv, Dk], values [slots + 1, Hkv, Dv])."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    keys = draw(num_slots + 1, kv_heads, head_dim)
    values = draw(num_slots + 1, kv_heads, value_dim or head_dim)
    return draw(num_rows, heads, head_dim) * 2, keys, values
