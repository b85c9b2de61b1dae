"""Draft trees: tokens somebody else proposes, forwarded in one go below a position, of which some
are kept.

Speculative decoding, scoring and look-ahead are this one verb: add a few nodes to the tree, read
the logits at each, keep a path of them with its keys and values, drop the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.attention.base import Block
from rollout.forward import TreeForward
from rollout.radix_tree import TreeNode
from rollout.store import Node, TreeStore
from treepo.base.typed import as_int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DraftTree:
    """Tokens below one position.

    Attributes:
        parents: int64 [n], index of each token's parent; -1 for those directly below the position.
            Parents come before their children.
        token_ids: int64 [n], not checked against a vocabulary yet.

    Raises:
        ValueError: these are no vectors of integers of one length, or a parent does not come before
            its child.
    """

    parents: np.ndarray
    token_ids: np.ndarray

    def __post_init__(self) -> None:
        for name in ("parents", "token_ids"):  # lists, too
            value = np.asarray(getattr(self, name))
            if value.size and value.dtype.kind not in "iu":
                raise ValueError(f"draft tree: {name} must be integers, not {value.dtype}")
            object.__setattr__(self, name, value.astype(np.int64))
        if self.parents.shape != self.token_ids.shape or self.parents.ndim != 1:
            raise ValueError(
                f"draft tree: parents {self.parents.shape} and token_ids {self.token_ids.shape} "
                "must be vectors of one length"
            )
        order = np.arange(len(self.parents))
        if ((self.parents < -1) | (self.parents >= order)).any():
            bad = int(np.flatnonzero((self.parents < -1) | (self.parents >= order))[0])
            raise ValueError(
                f"draft tree: parents[{bad}]={self.parents[bad]}: a parent is -1 or the index of "
                "an earlier token"
            )

    @classmethod
    def chain(cls, token_ids: Sequence[int] | np.ndarray) -> DraftTree:
        """One path."""
        ids = np.asarray(token_ids)
        return cls(parents=np.arange(-1, ids.size - 1), token_ids=ids)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draft:
    """A forwarded draft tree. It holds slots until it is committed.

    Attributes:
        node: what it hangs below.
        logits: [n + 1, V]; row 0 predicts what follows the node, row i + 1 what follows token i.
        base: the node's place in the radix tree, locked.
        runs: radix nodes, each a run of tokens without a fork inside, parents first.
        run_of: int64 [n], the run that holds each token.
        offset_of: int64 [n], its place in the run.
    """

    node: Node
    tree: DraftTree
    logits: torch.Tensor
    base: TreeNode
    runs: tuple[TreeNode, ...]
    run_of: np.ndarray
    offset_of: np.ndarray


class OpenDrafts:
    """The draft trees of one engine that were computed and are not committed yet."""

    def __init__(self, store: TreeStore, forward: TreeForward) -> None:
        self._store = store
        self._forward = forward
        self._drafts: set[Draft] = set()

    def forward(self, node: Node, tree: DraftTree, budget: int) -> Draft:
        """Compute a draft tree below ``node``, and what is missing of the node's own path,
        ``budget`` rows a forward.

        Raises:
            ValueError: slots are short.
        """
        store = self._store
        base = store.resolve(node)
        store.tree.lock(base)
        if not store.give_slots(base, growth=len(tree), may_break=True):
            store.tree.unlock(base)
            raise ValueError(store.too_small(f"a draft of {len(tree)} tokens"))
        runs: list[TreeNode] = []
        try:
            run_of, offset_of = _plant(store, base, tree, runs)
            logits = _logits(self._forward, base, runs, run_of, budget)
        except BaseException:  # such as no memory: nothing may stay behind
            for run in reversed(runs):
                store.tree.remove(run)
            store.tree.unlock(base)
            raise
        self._forward.meter.count(draft_tokens=len(tree))
        draft = Draft(
            node=node,
            tree=tree,
            logits=logits,
            base=base,
            runs=tuple(runs),
            run_of=run_of,
            offset_of=offset_of,
        )
        self._drafts.add(draft)
        return draft

    def commit(self, draft: Draft, path: Sequence[int]) -> Node:
        """Keep the tokens of ``path`` and drop the others; the draft has ended.

        Args:
            path: indices of tokens, from one directly below the node downwards; empty keeps none.

        Returns:
            a handle on the last token kept (on the node's own position if there is none).

        Raises:
            ValueError: the indices are no path of the draft tree, or the draft has ended.
        """
        if draft not in self._drafts:
            raise ValueError(
                "this draft is not open here: it was committed before, or is another engine's"
            )
        store = self._store
        path = _checked_path(draft.tree, path)
        kept: dict[int, int] = {}  # run -> tokens of it that stay
        for index in path:
            kept[int(draft.run_of[index])] = int(draft.offset_of[index]) + 1
        for number in reversed(range(len(draft.runs))):
            if number not in kept:
                store.tree.remove(draft.runs[number])
        end = draft.base
        for number, length in kept.items():
            end = draft.runs[number]
            store.tree.publish(end, length)
        token_ids = draft.tree.token_ids[np.asarray(path, np.int64)].astype(np.int32)
        node = store.handle(draft.node, token_ids, end)
        store.tree.unlock(draft.base)
        self._drafts.remove(draft)
        self._forward.meter.count(wasted_draft_tokens=len(draft.tree) - len(path))
        return node

    @property
    def runs(self) -> list[TreeNode]:
        """The private radix nodes of all."""
        return [run for draft in self._drafts for run in draft.runs]

    @property
    def num_slots(self) -> int:
        return sum(len(run.slots) for run in self.runs)

    def check_none(self, what: str) -> None:
        """
        Raises:
            ValueError: drafts are open, which ``what`` would invalidate.
        """
        if self._drafts:
            raise ValueError(f"{what}: {len(self._drafts)} drafts are open: commit them first")


def _plant(
    store: TreeStore, base: TreeNode, tree: DraftTree, runs: list[TreeNode]
) -> tuple[np.ndarray, np.ndarray]:
    """Append to ``runs`` a private node with slots for every run of the draft; returns the run that
    holds each token and its place there.
    """
    count = len(tree)
    num_children = np.bincount(tree.parents + 1, minlength=count + 1)
    run_of, offset_of = np.zeros(count, np.int64), np.zeros(count, np.int64)
    tokens: list[list[int]] = []
    above: list[int] = []  # run that each run hangs below, -1 for the base
    for index, parent in enumerate(tree.parents.tolist()):
        if parent >= 0 and num_children[parent + 1] == 1:
            run_of[index], offset_of[index] = run_of[parent], offset_of[parent] + 1
            tokens[run_of[index]].append(int(tree.token_ids[index]))
        else:
            run_of[index] = len(tokens)
            tokens.append([int(tree.token_ids[index])])
            above.append(int(run_of[parent]) if parent >= 0 else -1)
    for ids, parent in zip(tokens, above, strict=True):
        start = runs[parent] if parent >= 0 else base
        run = store.tree.insert_private(start, np.array(ids, np.int32))
        store.add_slots(run, len(ids))
        runs.append(run)
    return run_of, offset_of


def _logits(
    forward: TreeForward,
    base: TreeNode,
    runs: Sequence[TreeNode],
    run_of: np.ndarray,
    budget: int,
) -> torch.Tensor:
    """[n + 1, V] of the base's last token and of every draft token, ``budget`` rows a forward."""
    blocks = [
        Block(node, node.num_computed, len(node.token_ids), node.token_ids[node.num_computed :])
        for node in base.path()
        if node.num_computed < len(node.token_ids)
    ]
    if not blocks or blocks[-1].node is not base:
        last = len(base.token_ids) - 1
        blocks.append(Block(base, last, last + 1, base.token_ids[last:], writes=False))
    blocks += [Block(run, 0, len(run.token_ids), run.token_ids) for run in runs]
    by_run = np.split(np.argsort(run_of, kind="stable"), np.cumsum(np.bincount(run_of))[:-1])
    tokens_of = {id(run): tokens + 1 for run, tokens in zip(runs, by_run, strict=False)}
    found: list[torch.Tensor] = []
    index_of: list[np.ndarray] = []  # where each of their rows goes
    for part in _parts(blocks, budget):
        rows = forward.rows(part)
        last_row = rows.last_rows()
        wanted: list[np.ndarray] = []
        index: list[np.ndarray] = []
        for block in part:
            last = last_row[id(block.node)]
            if id(block.node) in tokens_of:
                index.append(tokens_of[id(block.node)][block.start : block.stop])
                wanted.append(last + 1 - block.num_rows + np.arange(block.num_rows))
            elif block.node is base and block.stop == len(base.token_ids):
                index.append(np.zeros(1, np.int64))
                wanted.append(np.array([last]))
        logits = forward.run(rows, np.concatenate(wanted) if wanted else np.zeros(1, np.int64))
        forward.settle(rows)
        if wanted:
            found.append(logits)
            index_of.append(np.concatenate(index))
    order = torch.from_numpy(np.argsort(np.concatenate(index_of)))
    return torch.cat(found)[order.to(found[0].device)]


def _parts(blocks: Sequence[Block], budget: int) -> Iterator[list[Block]]:
    """The blocks in order, cut so that each part has at most ``budget`` rows."""
    part: list[Block] = []
    room = budget
    for block in blocks:
        start = block.start
        while start < block.stop:
            stop = min(block.stop, start + room)
            ids = block.token_ids[start - block.start : stop - block.start]
            part.append(Block(block.node, start, stop, ids, writes=block.writes))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], budget
    if part:
        yield part


def _checked_path(tree: DraftTree, path: Sequence[int]) -> list[int]:
    above = -1
    found: list[int] = []
    for value in path:
        try:
            index = as_int(value)
        except (TypeError, OverflowError):
            raise ValueError(f"commit path: {value!r} is no index of a draft token") from None
        if not 0 <= index < len(tree) or tree.parents[index] != above:
            raise ValueError(
                f"commit path={[*found, index]} is no path of the draft tree: token {index} is not "
                f"a child of {'the node' if above < 0 else f'token {above}'}"
            )
        above = index
        found.append(index)
    return found
