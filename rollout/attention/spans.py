"""From query blocks to spans: runs of keys that the same query rows see.

Rows are laid out in depth-first order of the tree, so that the rows below any node are one range. A
chain of nodes that the same rows see becomes one span. There are at most twice as many spans as
blocks, however deep the tree is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.attention.base import Block
from rollout.radix_tree import TreeNode

MAX_CAUSAL_ROWS = 128  # longer blocks are cut: their masks stay small, and less is masked
_MIN_VIEW = 256  # keys that are worth a span of their own where that lets them be read in place


@dataclass(slots=True, eq=False)
class Span:
    """Keys at consecutive depths and the query rows that see them.

    Attributes:
        slots: int64 [>= length]; an open node's run on into what it has reserved.
        length: number of keys.
        start: depth of the first key.
        row, num_rows: range of query rows.
        causal: the rows are the last ``num_rows`` keys, and see only up to themselves.
        grows: the one row is the last token of an open node.
    """

    slots: np.ndarray
    length: int
    start: int
    row: int
    num_rows: int
    causal: bool
    grows: bool = False


def lay_out(blocks: Sequence[Block]) -> tuple[list[Block], list[Span]]:
    """Order blocks depth first and find the spans.

    Args:
        blocks: at most one a node; a block's ancestors are computed or covered by other blocks.

    Returns:
        (the blocks in row order, the spans).
    """
    own = {block.node: block for block in blocks}
    assert len(own) == len(blocks), "two blocks of one node"
    roots, below = _active_nodes(blocks)
    ordered: list[Block] = []
    spans: list[Span] = []
    row = 0
    # Depth first without recursion. An entry is a node to enter, with the slots above it that only
    # its rows see; or a span whose rows are now all laid out.
    stack: list[tuple[TreeNode, list[np.ndarray], int] | Span] = [
        (root, [], root.start) for root in reversed(roots)
    ]
    while stack:
        entry = stack.pop()
        if isinstance(entry, Span):
            entry.num_rows = row - entry.row
            continue
        node, above, start = entry
        children = below[node]
        block = own.get(node)
        if block is not None:
            spans.extend(_own_spans(block, above, start, row))
            ordered.append(block)
            row += block.num_rows
        if not children:
            continue
        assert len(node.slots) == len(node.token_ids), "an ancestor without slots"
        pieces = [*above, node.slots] if len(node.slots) else above  # the root has none
        if block is None and len(children) == 1 and not _is_cut(pieces, children[0]):
            stack.append((children[0], pieces, start))
            continue
        if pieces:
            slots = np.concatenate(pieces)
            span = Span(slots, len(slots), start, row, 0, causal=False)
            spans.append(span)
            stack.append(span)
        # In the order of their slots: keys that lie side by side belong to rows side by side.
        children.sort(key=_first_slot, reverse=True)
        stack.extend((child, [], child.start) for child in children)
    return ordered, spans


def _is_cut(above: Sequence[np.ndarray], below: TreeNode) -> bool:
    """Whether a chain is cut between two nodes: both sides can then be read in place."""
    if len(above) != 1 or len(above[0]) < _MIN_VIEW or not len(below.slots):
        return False
    slots = above[0]
    return int(slots[-1]) + 1 != int(below.slots[0]) and is_run(slots)


def _first_slot(node: TreeNode) -> int:
    return int(node.slots[0]) if len(node.slots) else -1


def is_run(slots: np.ndarray) -> bool:
    """Whether slots are consecutive."""
    return int(slots[-1]) - int(slots[0]) == len(slots) - 1 and bool((np.diff(slots) == 1).all())


def _active_nodes(
    blocks: Sequence[Block],
) -> tuple[list[TreeNode], dict[TreeNode, list[TreeNode]]]:
    """Roots, and for every node on a block's path its children that are on one too."""
    roots: list[TreeNode] = []
    below: dict[TreeNode, list[TreeNode]] = {}
    for block in blocks:
        node = block.node
        if node in below:
            continue
        below[node] = []
        while node.parent is not None:
            parent = node.parent
            if parent in below:
                below[parent].append(node)
                break
            below[parent] = [node]
            node = parent
        else:
            roots.append(node)
    return roots, below


def _own_spans(block: Block, above: list[np.ndarray], start: int, row: int) -> list[Span]:
    """What a block's rows see of their own node and of the nodes above that are theirs alone."""
    node = block.node
    grows = node.is_open and block.num_rows == 1
    own = node.slots if grows else node.slots[: block.stop]
    slots = np.concatenate([*above, own]) if above else own
    length = len(slots) - len(own) + block.stop
    spans = []
    for lo in range(0, block.num_rows, MAX_CAUSAL_ROWS):
        hi = min(lo + MAX_CAUSAL_ROWS, block.num_rows)
        seen = length - block.num_rows + hi
        kept = slots if grows else slots[:seen]
        spans.append(Span(kept, seen, start, row + lo, hi - lo, causal=True, grows=grows))
    return spans
