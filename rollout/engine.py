"""The rollout engine: positions in a token tree, segments sampled below them, continuous batching.

A ``Node`` is a handle on a position in the tree. Nothing is computed when a handle is made; the
keys and values a segment needs are computed in the step that first needs them, once for all that
share them. A step forwards the missing tokens of newly admitted paths and the last token of every
running segment together, and draws one token for each running segment.

The position of a drawn token is its depth in tokens, prompt included: with the path key it names
the draw, so draws don't depend on where segments are cut.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from rollout.attention.base import Block, Plan
from rollout.attention.cpu import NodePlan
from rollout.attention.reference import ReferencePlan
from rollout.attention.spans import lay_out
from rollout.extend import LENGTH, STOP, ExtendSpec
from rollout.kv_pool import MAX_EXTENT, KVPool
from rollout.metrics import CostLedger
from rollout.model_runner import ModelRunner, load_model, use_tree_attention
from rollout.radix_tree import RadixTree, TreeNode
from rollout.running import Drawn, RunningTable
from rollout.sampler import log_probabilities, sample
from rollout.settings import EngineSettings
from rollout.weights import copy_weights, stored_state
from treepo.base.digest import WeightManifest, tensor_digests

_SCORE_CHUNK = 256  # query rows of one scoring forward


class Node:
    """A handle on a position: the end of ``token_ids`` below ``parent``.

    It keeps its path's keys and values until it is freed. A soft one gives them up when slots run
    short; they are computed again when needed.
    """

    __slots__ = ("parent", "token_ids", "tree_node", "is_locked", "is_soft", "is_freed")

    def __init__(self, parent: Node | None, token_ids: np.ndarray, tree_node: TreeNode) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.tree_node = tree_node
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """One sampled segment. Arrays are [n]; see ``rollout.extend.ExtendResult``.

    Attributes:
        request_id: as ``submit`` returned it.
        node: handle on the segment's end; the caller frees it.
    """

    request_id: int
    node: Node
    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    finish_reason: str
    policy_version: int


@dataclass(eq=False, slots=True)
class _Request:
    request_id: int
    node: Node
    spec: ExtendSpec
    path_key: int
    drawn: Drawn = field(default_factory=Drawn)
    base: TreeNode | None = None  # what the segment grows from, while running
    leaf: TreeNode | None = None  # the open node, while running
    row: int = -1
    is_fresh: bool = True  # admitted, not yet stepped


@dataclass(eq=False, slots=True)
class _Batch:
    """What one forward computes: its rows, and which row each request reads."""

    plan: Plan
    blocks: list[Block]
    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray  # [W], ascending
    source: np.ndarray | None  # [requests], index in ``wanted``; None: one each, in order
    rows: np.ndarray  # [requests], table rows
    is_steady: bool  # every block is the last token of an open node
    goes_on: np.ndarray | None = None  # bool [requests], those that did not end with this forward


class Engine:
    """See the module.

    Args:
        model: a model folder, or a loaded model (it is switched to tree attention).

    Raises:
        ValueError: no such folder, or the model does not pass the load probe.
    """

    def __init__(self, model: str | Path | PreTrainedModel, settings: EngineSettings) -> None:
        self.settings = settings
        if isinstance(model, PreTrainedModel):
            self.model = use_tree_attention(model)
        else:
            self.model = load_model(model, dtype=settings.dtype, device=settings.device)
        device = torch.device(settings.device)
        self.pool = KVPool(settings.num_kv_slots, device=device, dtype=self.model.dtype)
        self.tree = RadixTree(self.pool)
        self.runner = ModelRunner(self.model, self.pool)
        self.policy_version = 0
        self._is_asleep = False
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # in order of admission
        self._table = RunningTable(settings.max_running_requests)
        self._batch: _Batch | None = None
        self._done: list[Completion] = []
        self._soft: OrderedDict[int, Node] = OrderedDict()
        self._next_id = 0
        self._ledger = CostLedger()
        from rollout.probe import probe  # the probe drives an engine

        probe(self)
        self._ledger = CostLedger()

    # Positions in the tree.

    def prefill(self, token_ids: Sequence[int] | np.ndarray) -> Node:
        """A handle on the path ``token_ids`` from the root; what is known of it is shared."""
        ids = np.asarray(token_ids, np.int32)
        if not len(ids):
            raise ValueError("a prompt needs at least one token")
        return self._handle(None, ids, self.tree.insert(self._root(), ids))

    def append(self, node: Node, token_ids: Sequence[int] | np.ndarray) -> Node:
        """A handle on the path of ``node`` followed by ``token_ids`` (none gives the same
        position).
        """
        ids = np.asarray(token_ids, np.int32)
        return self._handle(node, ids, self.tree.insert(self._resolve(node), ids))

    def fork(self, node: Node, n: int) -> list[Node]:
        """``n`` further handles on the same position."""
        return [self.append(node, ()) for _ in range(n)]

    def split(self, node: Node, offset: int) -> Node:
        """A handle on the first ``offset`` tokens of ``node``'s path, 1 <= offset <= its length."""
        ids = node.path_token_ids()
        if not 1 <= offset <= len(ids):
            raise ValueError(f"split offset={offset} is outside the path of {len(ids)} tokens")
        return self.prefill(ids[:offset])

    def free(self, node: Node, *, drop: bool = False) -> None:
        """End a handle. Its keys and values stay as cache until evicted, or with ``drop`` only if
        others need them.
        """
        assert not node.is_freed, "freed twice"
        node.is_freed = True
        self._unlock(node)
        if drop and node.tree_node.is_alive and len(node.token_ids):
            end = node.tree_node.end
            self.tree.remove_upwards(node.tree_node, end - len(node.token_ids))

    def soften(self, node: Node) -> None:
        """Let the engine give up this handle's keys and values when slots run short."""
        node.is_soft = True
        if node.is_locked:
            self._soft[id(node)] = node

    def path_token_ids(self, node: Node) -> np.ndarray:
        """int32: the tokens the tree holds for ``node``, which is what the model sees."""
        return self._resolve(node).path_token_ids()

    # Sampling.

    def submit(self, node: Node, spec: ExtendSpec, path_key: int) -> int:
        """Queue one segment to be sampled below ``node``; returns the request's id.

        Raises:
            ValueError: the path cannot fit the pool or the model's positions, or the engine sleeps.
        """
        self._check_awake()
        assert not node.is_freed, "the handle was freed"
        length = self._resolve(node).end
        self._check_length(length, spec.max_tokens)
        request = _Request(self._next_id, node, spec, path_key)
        self._next_id += 1
        if spec.max_tokens:
            self._waiting.append(request)
        else:
            self._done.append(self._completion(request, Drawn(), LENGTH, self.append(node, ())))
        return request.request_id

    def cancel(self, request_id: int) -> None:
        """Forget a request. A finished or unknown one is left alone."""
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return
        for request in self._running:
            if request.request_id == request_id:
                self._stop(request)
                return

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """No request is waiting, running or finished but not fetched."""
        return not (self._waiting or self._running or self._done)

    def step(self) -> list[Completion]:
        """Admit what fits, run one forward, draw one token for each running request.

        Returns:
            the segments that finished.
        """
        began = time.perf_counter()
        self._admit()
        if self._running:
            self._decode()
        done, self._done = self._done, []
        self._ledger += CostLedger(wall_seconds=time.perf_counter() - began)
        return done

    def extend(self, items: Iterable[tuple[Node, ExtendSpec, int]]) -> Iterator[Completion]:
        """Sample a segment below each (node, spec, path key); yields each as it finishes.

        ``Completion.request_id`` ascends in the order of ``items``. Closing the iterator cancels
        what is unfinished.
        """
        mine = {self.submit(*item) for item in items}
        others: list[Completion] = []
        try:
            while mine:
                for completion in self.step():
                    if completion.request_id in mine:
                        mine.remove(completion.request_id)
                        yield completion
                    else:
                        others.append(completion)
        finally:
            for request_id in mine:
                self.cancel(request_id)
            self._done[:0] = others

    @torch.inference_mode()
    def score_path(
        self, token_ids: Sequence[int] | np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        """float32 [n]: log-prob of each token given the ones before it, through the pool and the
        tree attention; 0 for the first. Reads no cache, so it sees the weights as they are now.
        """
        self._check_awake()
        ids = np.asarray(token_ids, np.int32)
        self._check_length(len(ids), 0)
        if len(ids) < 2:
            return np.zeros(len(ids), np.float32)
        node = self.tree.insert_private(self._root(), ids)
        self.tree.lock(node)
        if not self._give_slots(node, may_break=not self._running):
            self._discard(node)
            raise ValueError(self._too_small(f"scoring {len(ids)} tokens"))
        targets = torch.from_numpy(ids.astype(np.int64)).to(self.pool.device)
        chunk = min(_SCORE_CHUNK, (len(ids) + 1) // 2)  # at least two, so that the pool is read
        scores = [torch.zeros(1)]
        for lo in range(0, len(ids) - 1, chunk):
            hi = min(lo + chunk, len(ids) - 1)
            logits = self.forward([Block(node, lo, hi, ids[lo:hi])])
            scores.append(log_probabilities(logits, targets[lo + 1 : hi + 1], temperature).cpu())
        self._discard(node)
        return torch.cat(scores).numpy()

    def forward(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Logits [N, V] of every row of the blocks, in the order of ``blocks``.

        The blocks' nodes must have slots; their ancestors must be computed or be blocks too.
        """
        batch = self._assemble(blocks)
        logits = self._run(batch, np.arange(len(batch.token_ids)))
        first = dict(zip(batch.blocks, _row_starts(batch.blocks), strict=True))
        order = np.concatenate([first[b] + np.arange(b.num_rows) for b in blocks])
        return logits[torch.from_numpy(order).to(logits.device)]

    # Weights and state.

    def load_weights(
        self,
        version: int,
        manifest: WeightManifest,
        tensors: Mapping[str, torch.Tensor | np.ndarray],
    ) -> dict[str, int]:
        """Copy a weight set into the live model and drop all keys and values of older ones.

        Returns:
            digests of the stored state by name, tied names and buffers included.

        Raises:
            ValueError: requests are unfinished, or the set does not fit the model (nothing is
                copied then).
        """
        if not self.is_idle:
            raise ValueError(
                f"weights {version} arrived while {self.num_running + self.num_waiting} requests "
                "are unfinished: finish or cancel them first"
            )
        digests = copy_weights(self.model, manifest, tensors)
        self._drop_cache()
        self.policy_version = version
        return digests

    def digests(self) -> dict[str, int]:
        """Digest of each stored tensor by name."""
        return tensor_digests(stored_state(self.model))

    def sleep(self) -> None:
        """Give up the pool's memory and all cached keys and values until ``wake``. Handles live on.

        Raises:
            ValueError: requests are unfinished.
        """
        if not self.is_idle:
            raise ValueError("the engine has unfinished requests: finish or cancel them first")
        self._drop_cache()
        self._is_asleep = True

    def wake(self) -> None:
        """Serve again after ``sleep``."""
        self._is_asleep = False

    def metrics(self) -> CostLedger:
        """Costs since the start or the last ``reset_metrics``."""
        return replace(
            self._ledger, peak_kv_bytes=self._ledger.peak_kv_slots * self.pool.bytes_per_slot
        )

    def reset_metrics(self) -> None:
        self._ledger = CostLedger()

    def add_costs(self, costs: CostLedger) -> None:
        """Add what only a caller can count."""
        self._ledger += costs

    def check_integrity(self) -> None:
        """Assert that every slot is free or held by exactly one node and that all locks add up."""
        hidden = []
        for request in self._running:
            assert request.leaf is not None and request.base is not None
            hidden.append(request.leaf)
            if request.base.is_private:
                hidden.append(request.base)
            assert len(request.leaf.slots) == self._table.reserved[request.row]
        self.tree.check_integrity(hidden)

    # Handles and locks.

    def _root(self) -> TreeNode:
        return self.tree.root(self.policy_version)

    def _handle(self, parent: Node | None, token_ids: np.ndarray, tree_node: TreeNode) -> Node:
        node = Node(parent, token_ids, tree_node)
        self._lock(node)
        return node

    def _resolve(self, node: Node) -> TreeNode:
        """The tree node at the handle's position under the current weights, locked."""
        assert not node.is_freed, "the handle was freed"
        if not node.tree_node.is_alive:
            node.is_locked = False
            node.tree_node = self.tree.insert(self._root(), node.path_token_ids())
        if not node.is_locked:
            self._lock(node)
        return node.tree_node

    def _lock(self, node: Node) -> None:
        self.tree.lock(node.tree_node)
        node.is_locked = True
        if node.is_soft:
            self._soft[id(node)] = node

    def _unlock(self, node: Node) -> None:
        if node.is_locked and node.tree_node.is_alive:
            self.tree.unlock(node.tree_node)
        node.is_locked = False
        self._soft.pop(id(node), None)

    def _drop_cache(self) -> None:
        self.tree.clear()
        self.pool.release_memory()
        self._batch = None

    def _discard(self, private: TreeNode) -> None:
        self.tree.unlock(private)
        self.tree.remove(private)

    # Slots.

    def _make_room(self, count: int, *, may_break: bool) -> bool:
        """Have ``count`` slots free: evict, and if allowed break soft locks, oldest first."""
        while self.pool.num_free < count:
            self.tree.evict(count - self.pool.num_free)
            if self.pool.num_free >= count:
                break
            if not (may_break and self._soft):
                return False
            for node in list(self._soft.values())[: max(1, len(self._soft) // 4)]:
                self._unlock(node)
        return True

    def _give_slots(self, node: TreeNode, *, growth: int = 0, may_break: bool) -> bool:
        """Give every token on a locked path a slot, keeping ``growth`` more free; False if there
        are not enough.
        """
        bare = [n for n in node.path() if len(n.slots) < len(n.token_ids)]
        needed = sum(len(n.token_ids) - len(n.slots) for n in bare)
        if not self._make_room(needed + growth, may_break=may_break):
            return False
        for n in bare:
            self._add_slots(n, len(n.token_ids) - len(n.slots))
        return True

    def _add_slots(self, node: TreeNode, count: int) -> np.ndarray:
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

    def _check_awake(self) -> None:
        if self._is_asleep:
            raise ValueError("the engine is asleep: call wake() first")

    def _check_length(self, length: int, max_tokens: int) -> None:
        total = length + max_tokens
        if total > self.pool.num_slots:
            raise ValueError(
                f"num_kv_slots={self.pool.num_slots} is too small: a path of {length} tokens plus "
                f"max_tokens={max_tokens} needs {total}"
            )
        limit = self.runner.max_position
        if limit is not None and total > limit:
            raise ValueError(
                f"a path of {length} tokens plus max_tokens={max_tokens} exceeds the {limit} "
                "positions this model can serve from a cache"
            )

    def _too_small(self, what: str) -> str:
        return (
            f"num_kv_slots={self.pool.num_slots} is too small: {what} finds only "
            f"{self.pool.num_free} slots free while live handles hold {self.tree.num_protected}"
        )

    # Requests.

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.settings.max_running_requests:
            if not self._start(self._waiting[0]):
                if not self._running:
                    raise ValueError(self._too_small("a request"))
                break
            self._running.append(self._waiting.popleft())
            self._batch = None

    def _start(self, request: _Request) -> bool:
        """Lock the path, give it slots and open the segment's node; False if slots are short."""
        base = self._resolve(request.node)
        if not self.settings.share_prefixes:
            base = self.tree.insert_private(self._root(), base.path_token_ids())
        self.tree.lock(base)
        drawn = len(request.drawn.token_ids)
        growth = drawn + min(MAX_EXTENT, request.spec.max_tokens - drawn)
        if not self._give_slots(base, growth=growth, may_break=not self._running):
            self.tree.unlock(base)
            if base.is_private:
                self.tree.remove(base)
            return False
        leaf = self.tree.open_child(base)
        self.tree.lock(leaf)
        self.tree.unlock(base)
        request.base, request.leaf, request.is_fresh = base, leaf, True
        request.row = self._table.add(base.end, request.spec, request.path_key, request.drawn)
        self._table.add_slots(request.row, self._add_slots(leaf, growth))
        return True

    def _stop(self, request: _Request) -> Drawn:
        """Take a running request off; its keys and values are given up."""
        assert request.leaf is not None and request.base is not None
        self._running.remove(request)
        self._batch = None
        drawn = self._table.remove(request.row)
        self.tree.unlock(request.leaf)
        self.tree.close(request.leaf, drawn.token_ids[:0], 0, 0)
        if request.base.is_private:
            self.tree.remove(request.base)
        request.base = request.leaf = None
        return drawn

    def _preempt(self) -> None:
        """Put the youngest running request back to the head of the queue with what it has drawn."""
        request = self._running[-1]
        request.drawn = self._stop(request)
        self._waiting.appendleft(request)
        self._ledger += CostLedger(preempted=1)

    def _finish(self, request: _Request, reason: str) -> None:
        leaf, base = request.leaf, request.base
        assert leaf is not None and base is not None
        drawn = self._table.remove(request.row)
        count = len(drawn.token_ids)
        # After a stop token rarely anything follows: its slot is given back, too.
        keep = min(len(leaf.slots), count - 1 if reason == STOP else count)
        self.tree.unlock(leaf)
        self.tree.close(leaf, drawn.token_ids, count - 1, keep)
        if base.is_private:
            self.tree.remove(leaf)
            self.tree.remove(base)
            leaf = self.tree.insert(self._resolve(request.node), drawn.token_ids)
        node = self._handle(request.node, drawn.token_ids, leaf)
        self._done.append(self._completion(request, drawn, reason, node))
        request.base = request.leaf = None

    def _completion(self, request: _Request, drawn: Drawn, reason: str, node: Node) -> Completion:
        self._ledger += CostLedger(segments=1)
        return Completion(
            request_id=request.request_id,
            node=node,
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            sampling_logprobs=drawn.sampling_logprobs,
            finish_reason=reason,
            policy_version=self.policy_version,
        )

    # The forward.

    @torch.inference_mode()
    def _decode(self) -> None:
        batch = self._next_batch()
        logits = self._run(batch, batch.wanted)
        if batch.source is not None:
            logits = logits[torch.from_numpy(batch.source).to(logits.device)]
        params, keys, positions = self._table.sampling(batch.rows, self.pool.device)
        draws = sample(logits, params, keys, positions)
        stopped, full = self._table.record(batch.rows, draws)
        self._ledger += CostLedger(
            generated_tokens=len(batch.rows), peak_kv_slots=self.tree.num_protected
        )
        self._batch = None
        if not batch.is_steady:
            for request in self._running:
                request.is_fresh = False
        over = stopped | full
        if over.any():
            by_row = {request.row: request for request in self._running}
            for i in np.flatnonzero(over):
                self._finish(by_row[int(batch.rows[i])], STOP if stopped[i] else LENGTH)
            self._running = [request for request in self._running if request.leaf is not None]
        changed = self._reserve(batch.rows[~over])
        if not changed and batch.is_steady and isinstance(batch.plan, NodePlan):
            batch.goes_on = ~over
            self._batch = batch

    def _next_batch(self) -> _Batch:
        """The last batch one token on where only segments ended since; a new one otherwise."""
        batch, self._batch = self._batch, None
        if batch is None:
            return self._gather_batch()
        assert isinstance(batch.plan, NodePlan) and batch.goes_on is not None
        if not batch.goes_on.all():
            batch.plan.keep(batch.goes_on)
            batch.rows = batch.rows[batch.goes_on]
            batch.wanted = np.arange(len(batch.rows))
        batch.plan.advance()
        batch.token_ids, batch.positions, batch.slots = self._table.last_tokens(batch.rows)
        return batch

    def _reserve(self, rows: np.ndarray) -> bool:
        """Give every running request a slot for its last drawn token; the youngest are put back
        while slots are short. True if anything changed.
        """
        short = set(rows[self._table.count[rows] > self._table.reserved[rows]].tolist())
        for request in [r for r in self._running if r.row in short] if short else ():
            if request.leaf is None:  # put back meanwhile
                continue
            left = int(self._table.max_tokens[request.row]) - len(request.leaf.slots)
            wanted = min(MAX_EXTENT, left)
            while request.leaf is not None and not self._make_room(wanted, may_break=True):
                self._preempt()
            if request.leaf is not None:
                self._table.add_slots(request.row, self._add_slots(request.leaf, wanted))
        return bool(short)

    def _gather_batch(self) -> _Batch:
        """Blocks for all running requests: missing tokens of new paths and last drawn tokens."""
        blocks: dict[TreeNode, Block] = {}
        sources: list[TreeNode] = []
        for request in self._running:
            leaf, base = request.leaf, request.base
            assert leaf is not None and base is not None
            if request.is_fresh:
                for node in base.path():
                    if node.num_computed < len(node.token_ids) and node not in blocks:
                        lo = node.num_computed
                        blocks[node] = Block(node, lo, len(node.token_ids), node.token_ids[lo:])
            count = int(self._table.count[request.row])
            if count:
                lo = 0 if request.is_fresh else count - 1
                blocks[leaf] = Block(leaf, lo, count, self._table.token_ids(request.row, lo))
                sources.append(leaf)
                continue
            if base not in blocks:  # computed before, but its logits were not kept
                last = len(base.token_ids) - 1
                blocks[base] = Block(base, last, last + 1, base.token_ids[last:], writes=False)
            sources.append(base)
        batch = self._assemble(list(blocks.values()))
        starts = _row_starts(batch.blocks)
        last_rows = {
            block.node: start + block.num_rows - 1
            for block, start in zip(batch.blocks, starts, strict=True)
        }
        wanted_of = np.array([last_rows[node] for node in sources])
        batch.wanted, batch.source = np.unique(wanted_of, return_inverse=True)
        batch.rows = np.array([request.row for request in self._running])
        batch.is_steady = all(not request.is_fresh for request in self._running)
        if batch.is_steady:  # one request a row: put the requests in row order
            batch.rows = batch.rows[np.argsort(batch.source)]
            batch.source = None
        return batch

    def _assemble(self, blocks: list[Block] | Sequence[Block]) -> _Batch:
        ordered, spans = lay_out(blocks)
        positions = np.concatenate(
            [np.arange(b.node.start + b.start, b.node.start + b.stop) for b in ordered]
        )
        trash = self.pool.trash_slot
        slots = np.concatenate(
            [
                b.node.slots[b.start : b.stop] if b.writes else np.full(b.num_rows, trash)
                for b in ordered
            ]
        )
        plan: Plan
        if self.settings.attention == "reference":
            plan = ReferencePlan(ordered, self.pool.device)
        else:
            plan = NodePlan(
                spans,
                positions,
                num_slots=self.pool.num_slots,
                slot_bytes=self.pool.bytes_per_slot // max(1, len(self.pool.keys)),
                device=self.pool.device,
            )
        return _Batch(
            plan=plan,
            blocks=ordered,
            token_ids=np.concatenate([b.token_ids for b in ordered]),
            positions=positions,
            slots=slots,
            wanted=np.zeros(0, np.int64),
            source=None,
            rows=np.zeros(0, np.int64),
            is_steady=False,
        )

    def _run(self, batch: _Batch, wanted: np.ndarray) -> torch.Tensor:
        logits = self.runner.forward(
            batch.token_ids, batch.positions, batch.slots, batch.plan, wanted
        )
        if not batch.is_steady:
            for block in batch.blocks:
                if block.writes:
                    block.node.num_computed = max(block.node.num_computed, block.stop)
        self._ledger += CostLedger(sequential_steps=1, query_tokens=len(batch.token_ids))
        return logits


def _row_starts(blocks: Sequence[Block]) -> list[int]:
    ends = np.cumsum([block.num_rows for block in blocks])
    return [0, *ends[:-1].tolist()]
