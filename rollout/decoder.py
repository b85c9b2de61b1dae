"""Continuous batching: which requests run, one forward for all of them, one draw each.

A request waits until a row of the table and slots for its path are free, then runs: first what is
missing of its path is computed, then a token is drawn each step. When slots run short, cached
nodes are evicted, soft handles give way, and at last the youngest request is put back with what it
has drawn; it is computed again when there is room, and draws on as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from rollout.batching import Batch, gather
from rollout.extend import LENGTH, STOP, ExtendSpec
from rollout.forward import TreeForward
from rollout.kv_pool import MAX_EXTENT
from rollout.requests import Completion, Request
from rollout.running import Drawn, RunningTable
from rollout.settings import EngineSettings
from rollout.stops import StopRules
from rollout.store import Node, TreeStore


class Decoder:
    """See the module."""

    def __init__(
        self, store: TreeStore, forward: TreeForward, settings: EngineSettings, stops: StopRules
    ) -> None:
        self.store = store
        self.settings = settings
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.done: list[Completion] = []
        self.unfinished: set[int] = set()  # ids of waiting and running requests
        self._forward = forward
        self._meter = forward.meter
        self._table = RunningTable(settings.max_running_requests, stops)
        self._next_id = 0
        # The last batch and which of its requests go on, while it can be continued.
        self._last: tuple[Batch, np.ndarray] | None = None

    # What the engine asks.

    def submit(self, node: Node, spec: ExtendSpec, path_key: int) -> int:
        """Queue a request; returns its id. ``node`` may be freed meanwhile."""
        own = self.store.append(node, Drawn().token_ids)
        request = Request(self._next_id, own, spec, path_key)
        self._next_id += 1
        if spec.max_tokens:
            self.store.soften(own)
            self.waiting.append(request)
            self.unfinished.add(request.request_id)
        else:
            self.done.append(self._completion(request, Drawn.nothing(spec), LENGTH, own))
        return request.request_id

    def cancel(self, request_id: int) -> bool:
        """Forget a request, also one whose completion was not fetched yet; False if it is unknown
        or fetched.
        """
        for completion in self.done:
            if completion.request_id == request_id:
                self.done.remove(completion)
                self.store.free(completion.node, drop=True)
                return True
        if request_id not in self.unfinished:
            return False
        self.unfinished.remove(request_id)
        self._meter.count(cancelled=1)
        for request in self.running:
            if request.request_id == request_id:
                self._stop(request)
                self.store.free(request.node, drop=False)
                return True
        for request in [r for r in self.waiting if r.request_id == request_id]:
            self.waiting.remove(request)
            self.store.free(request.node, drop=False)
        return True

    def cut(self, request_id: int) -> Completion | None:
        """End a request now, as if it had drawn all its tokens; None if it is unknown or fetched.
        One that finished comes back as it is.
        """
        for completion in self.done:
            if completion.request_id == request_id:
                self.done.remove(completion)
                return completion
        if request_id not in self.unfinished:
            return None
        request = next(r for r in (*self.running, *self.waiting) if r.request_id == request_id)
        # What is put back, or computed anew, has tokens without keys and values.
        if request.leaf is not None and not request.is_fresh:
            self._finish(request, LENGTH)
            self.running.remove(request)
            self._last = None
            return self.done.pop()
        if request.leaf is not None:
            request.drawn = self._stop(request)
        else:
            self.waiting.remove(request)
        drawn = request.drawn if len(request.drawn.token_ids) else Drawn.nothing(request.spec)
        node = self.store.append(request.node, drawn.token_ids.copy())
        self.store.free(request.node, drop=False)
        self.unfinished.remove(request_id)
        return self._completion(request, drawn, LENGTH, node)

    def known_ids(self) -> set[int]:
        """Ids of requests that are unfinished, or finished and not fetched."""
        return self.unfinished | {completion.request_id for completion in self.done}

    def keep(self, completions: Sequence[Completion]) -> None:
        """Take fetched completions back, for those who ask for them later."""
        self.done[:0] = completions

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit what fits, run one forward, draw; returns the segments that finished."""
        self._admit()
        if self.running:
            self._decode()
        done, self.done = self.done, []
        return done

    def put_all_back(self) -> None:
        """Back to the queue with every running request, in order, with what it has drawn."""
        while self.running:
            self._put_back()

    def keep_running(self) -> list:
        """Let running requests go on from the keys and values they have; returns their open nodes,
        which are to be kept.
        """
        for request in self.running:
            request.is_retired = True
        return [request.leaf for request in self.running]

    def note_version(self, policy_version: int) -> None:
        """What unfinished requests draw from now on is drawn by other weights."""
        self._last = None
        for request in self.running:
            request.versions.append((int(self._table.count[request.row]), policy_version))

    def hidden_nodes(self) -> list:
        """Open and private nodes, which lookups cannot reach; asserts what the table says of
        them.
        """
        hidden = []
        for request in self.running:
            assert request.leaf is not None and request.base is not None
            assert len(request.leaf.slots) == self._table.reserved[request.row]
            hidden.append(request.leaf)
            if request.base.is_private:
                hidden.append(request.base)
        return hidden

    # Admission and the end of requests.

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.settings.max_running_requests:
            if not self._start(self.waiting[0]):
                if not self.running:
                    first = self.waiting[0].request_id
                    raise ValueError(
                        f"{self.store.too_small(f'request {first}')}: cancel it or free handles"
                    )
                break
            self.running.append(self.waiting.popleft())
            self._last = None

    def _start(self, request: Request) -> bool:
        """Lock the path, give it slots and open the segment's node; False if slots are short."""
        store, tree = self.store, self.store.tree
        base = store.resolve(request.node)
        if not self.settings.share_prefixes:
            base = tree.insert_private(store.root, base.path_token_ids())
        tree.lock(base)
        drawn = len(request.drawn.token_ids)
        growth = drawn + min(MAX_EXTENT, request.spec.max_tokens - drawn)
        known = _num_known(base)
        if not store.give_slots(base, growth=growth, may_break=not self.running):
            tree.unlock(base)
            if base.is_private:
                tree.remove(base)
            return False
        leaf = tree.open_child(base)
        tree.lock(leaf)
        tree.unlock(base)
        request.base, request.leaf, request.is_fresh = base, leaf, True
        path = base.path_token_ids() if request.spec.reads_path else None
        request.row = self._table.add(base.end, request.spec, request.path_key, request.drawn, path)
        self._table.add_slots(request.row, store.add_slots(leaf, growth))
        request.versions.append((drawn, store.policy_version))
        if not drawn:
            self._meter.count(path_tokens=base.end, cached_tokens=known)
        return True

    def _stop(self, request: Request) -> Drawn:
        """Take a running request off; its keys and values are given up."""
        tree, leaf, base = self.store.tree, request.leaf, request.base
        assert leaf is not None and base is not None
        self.running.remove(request)
        self._last = None
        drawn = self._table.remove(request.row)
        tree.unlock(leaf)
        tree.close(leaf, drawn.token_ids[:0], 0, 0)
        self._leave(request)
        return drawn

    def _leave(self, request: Request) -> None:
        """Let go of what a request grew from, where nobody else can use it."""
        base = request.base
        assert base is not None
        if request.is_retired:
            self.store.release_retired(base)
        elif base.is_private:
            self.store.tree.remove(base)
        request.base = request.leaf = None
        request.is_retired = False

    def _put_back(self) -> None:
        """The youngest running request to the head of the queue with what it has drawn."""
        request = self.running[-1]
        request.drawn = self._stop(request)
        self.waiting.appendleft(request)
        self._meter.count(preempted=1)

    def _finish(self, request: Request, reason: str) -> None:
        store, tree, leaf, base = self.store, self.store.tree, request.leaf, request.base
        assert leaf is not None and base is not None
        drawn = self._table.remove(request.row)
        count = len(drawn.token_ids)
        is_cache = not (request.is_retired or base.is_private)
        # After a stop token rarely anything follows: its slot is given back, too.
        keep = min(len(leaf.slots), count - 1 if reason == STOP else count) if is_cache else 0
        tree.unlock(leaf)
        if is_cache:
            own = drawn.token_ids.copy()  # the completion's array is its receiver's
            tree.close(leaf, own, count - 1, keep)
            node = store.handle(request.node, own, leaf)
        else:
            tree.close(leaf, drawn.token_ids[:0], 0, 0)
            node = store.append(request.node, drawn.token_ids.copy())
        store.free(request.node, drop=False)
        self._leave(request)
        self.unfinished.remove(request.request_id)
        self.done.append(self._completion(request, drawn, reason, node))

    def _completion(self, request: Request, drawn: Drawn, reason: str, node: Node) -> Completion:
        self._meter.count(segments=1)
        return Completion(
            request_id=request.request_id,
            node=node,
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            sampling_logprobs=drawn.sampling_logprobs,
            finish_reason=reason,
            policy_versions=request.policy_versions(len(drawn.token_ids)),
            stop_reason=drawn.stop_reason,
            entropy=drawn.entropy,
            top_token_ids=drawn.top_token_ids,
            top_logprobs=drawn.top_logprobs,
        )

    # The forward.

    def _decode(self) -> None:
        batch = self._next_batch()
        if not len(batch.drawing):  # only parts of long paths
            self._forward.run(batch.rows, np.zeros(1, np.int64))
            self._forward.settle(batch.rows)
            return
        if batch.is_steady:
            logits = self._forward.run_steady(batch.rows)
        else:
            logits = self._forward.run(batch.rows, batch.wanted)
        if batch.source is not None:
            logits = logits[torch.from_numpy(batch.source).to(logits.device)]
        draws = self._table.draw(batch.drawing, logits)
        if batch.is_steady:
            self._forward.feed(draws.token_ids)
        stopped, full = self._table.record(batch.drawing, draws)
        self._meter.count(generated_tokens=len(batch.drawing))
        self._meter.peak(self.store.tree.num_protected)
        if not batch.is_steady:
            self._settle(batch)
        over = stopped | full
        if over.any():
            self._finish_all(batch.drawing, over, stopped)
        given = self._reserve(batch.drawing[~over])
        goes_on = batch.can_go_on and given is not None and batch.take_slots(given)
        self._last = (batch, ~over) if goes_on else None

    def _next_batch(self) -> Batch:
        """The last batch one token on where only segments ended since; a new one otherwise."""
        last, self._last = self._last, None
        if last is not None:
            batch, goes_on = last
            batch.next(goes_on, self._table)
            return batch
        budget = self.settings.max_tokens_per_step
        return gather(self.running, self._table, self._forward, budget)

    def _settle(self, batch: Batch) -> None:
        """Record what a batch with parts of paths has computed."""
        self._forward.settle(batch.rows)
        drawing = set(batch.drawing.tolist())
        for request in self.running:
            if request.row in drawing:
                request.is_fresh = False

    def _finish_all(self, rows: np.ndarray, over: np.ndarray, stopped: np.ndarray) -> None:
        by_row = {request.row: request for request in self.running}
        for i in np.flatnonzero(over):
            self._finish(by_row[int(rows[i])], STOP if stopped[i] else LENGTH)
        self.running = [request for request in self.running if request.leaf is not None]

    def _reserve(self, rows: np.ndarray) -> dict[int, np.ndarray] | None:
        """Give every request that drew a slot for its token; the youngest are put back while slots
        are short.

        Returns:
            new slots by table row, or None if requests were put back.
        """
        short = set(rows[self._table.count[rows] > self._table.reserved[rows]].tolist())
        given: dict[int, np.ndarray] = {}
        if not short:
            return given
        num_running = len(self.running)
        for request in [r for r in self.running if r.row in short]:
            if request.leaf is None:  # put back meanwhile
                continue
            left = int(self._table.max_tokens[request.row]) - len(request.leaf.slots)
            wanted = min(MAX_EXTENT, left)
            while request.leaf is not None and not self.store.make_room(wanted, may_break=True):
                self._put_back()
            if request.leaf is not None:
                given[request.row] = slots = self.store.add_slots(request.leaf, wanted)
                self._table.add_slots(request.row, slots)
        return given if len(self.running) == num_running else None


def _num_known(node) -> int:
    """Tokens of a path that were computed, be they on the host, or have slots because another
    request computes them.
    """
    return sum(
        min(len(n.slots), len(n.token_ids)) if n.host is None else n.host.num_tokens
        for n in node.path()
    )
