"""The rollout engine: positions in a token tree, segments sampled below them, drafts, scores,
weights.

The position of a drawn token is its depth in tokens, prompt included: with the path key it names
the draw, so draws don't depend on where segments are cut.

How it works inside: ``store.py`` holds the tree and its slots, ``decoder.py`` decides which
requests run, ``batching.py`` what the next forward computes, ``forward.py`` runs it, ``drafts.py``
computes tokens that others propose, ``path_scores.py`` scores a path, ``live_weights.py`` has the
weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollout.checks import (
    checked_int,
    checked_path_key,
    checked_token_ids,
    checked_version,
    find_device,
)
from rollout.decoder import Decoder
from rollout.drafts import Draft, DraftTree, OpenDrafts
from rollout.extend import ExtendSpec
from rollout.forward import TreeForward
from rollout.kv_pool import KVPool
from rollout.live_weights import SLEEPING_WEIGHTS, LiveWeights
from rollout.metrics import CostLedger, EngineGauges, Meter
from rollout.model_runner import ModelRunner, load_model, use_tree_attention
from rollout.path_scores import path_logprobs
from rollout.paused import PausedTrees
from rollout.requests import Completion
from rollout.sampling_settings import TEMPERATURES_ALLOWED, is_temperature
from rollout.scoring import Scorer, score_all
from rollout.settings import EngineSettings
from rollout.stops import StopRules
from rollout.store import Node, TreeStore
from rollout.token_text import TokenText
from rollout.weights import Part, Tensors
from treepo.base.digest import WeightManifest

IN_FLIGHT = ("refuse", "recompute", "keep")


class Engine:
    """See the module.

    Args:
        model: a model folder, or a loaded model (it is switched to tree attention; it keeps its
            dtype, and must be on ``settings.device``). An engine has its model to itself.
        tokenizer: a folder, Hub name or loaded tokenizer, for stop strings; None: the model's.
        load_probe: try the model first. Only the probe itself makes an engine without.

    Raises:
        ValueError: no such folder, another device, or the model does not pass the load probe.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        settings: EngineSettings,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        load_probe: bool = True,
    ) -> None:
        self.settings = settings
        device = find_device(settings.device)
        if isinstance(model, PreTrainedModel):
            self.model = use_tree_attention(model)
        else:
            self.model = load_model(model, dtype=settings.dtype, device=settings.device)
            tokenizer = model if tokenizer is None else tokenizer
        if self.model.device.type != device.type:
            raise ValueError(
                f"engine setting device={settings.device!r} does not fit a model on "
                f"{self.model.device}: move the model or change the setting"
            )
        self.pool = KVPool(settings.num_kv_slots, device=device, dtype=self.model.dtype)
        self.store = TreeStore(self.pool)
        self.paused = PausedTrees(self.store, on_host=settings.kv_on_host)
        self.runner = ModelRunner(self.model, self.pool, settings)
        self._meter = Meter()
        self._forward = TreeForward(self.runner, settings, self._meter)
        self._stops = StopRules(TokenText(tokenizer))
        self._decoder = Decoder(self.store, self._forward, settings, self._stops)
        self._drafts = OpenDrafts(self.store, self._forward)
        self._weights = LiveWeights(self.model)
        self.vocabulary: int = self.model.config.get_text_config().vocab_size
        self._is_asleep = False
        if load_probe:
            from rollout.probe import probe  # the probe drives an engine

            probe(self)
            self._meter.reset()
            # requests count from 0
            self._decoder = Decoder(self.store, self._forward, settings, self._stops)

    @property
    def tree(self):
        """The radix tree (``rollout.radix_tree.RadixTree``)."""
        return self.store.tree

    @property
    def policy_version(self) -> int:
        """Version of the weights in force."""
        return self.store.policy_version

    # Positions in the tree.

    def prefill(self, token_ids: Sequence[int] | np.ndarray) -> Node:
        """A handle on the path ``token_ids`` from the root; what is known of it is shared.

        Raises:
            ValueError: no token, or one that the model does not have.
        """
        ids = checked_token_ids("prompt", token_ids, self.vocabulary)
        if not len(ids):
            raise ValueError("a prompt needs at least one token")
        return self.store.prefill(ids)

    def append(self, node: Node, token_ids: Sequence[int] | np.ndarray) -> Node:
        """A handle on the path of ``node`` followed by ``token_ids`` (none gives the same
        position).

        Raises:
            ValueError: a token that the model does not have, or the handle was freed.
        """
        return self.store.append(
            node, checked_token_ids("appended path", token_ids, self.vocabulary)
        )

    def fork(self, node: Node, n: int) -> list[Node]:
        """``n`` >= 0 further handles on the same position."""
        n = checked_int("fork n", n, 0, None, ">= 0")
        return [self.append(node, ()) for _ in range(n)]

    def split(self, node: Node, offset: int) -> Node:
        """A handle on the first ``offset`` tokens of ``node``'s path, 1 <= offset <= its length."""
        ids = node.path_token_ids()
        allowed = f"in 1..{len(ids)}, the tokens of the path"
        return self.prefill(ids[: checked_int("split offset", offset, 1, len(ids), allowed)])

    def free(self, node: Node, *, drop: bool = False) -> None:
        """End a handle. Its keys and values stay as cache until evicted, or with ``drop`` only if
        others need them.
        """
        self.store.free(node, drop=drop)

    def soften(self, node: Node) -> None:
        """Let the engine give up this handle's keys and values when slots run short."""
        self.store.soften(node)

    def set_priority(self, node: Node, priority: int) -> None:
        """Evict this position's keys and values later (higher) or sooner (lower) than others; all
        start at 0, and among equals the least recently used goes first.
        """
        self.store.set_priority(node, priority)

    def path_token_ids(self, node: Node) -> np.ndarray:
        """int32: the tokens the tree holds for ``node``, which is what the model sees."""
        return self.store.resolve(node).path_token_ids()

    # Sampling.

    def submit(self, node: Node, spec: ExtendSpec, path_key: int) -> int:
        """Queue one segment to be sampled below ``node``; returns the request's id.

        Raises:
            ValueError: the path cannot fit the pool or the model's positions, the engine sleeps,
                the handle is freed or another engine's, the key is no unsigned 64-bit integer, or
                the spec names tokens that the model doesn't have or needs a tokenizer that isn't
                there.
        """
        self._check_awake()
        length = self.store.resolve(node).end
        self.check_length(length, spec.max_tokens)
        spec.check(self.vocabulary, length)
        self._stops.matchers(spec)
        return self._decoder.submit(node, spec, checked_path_key(path_key))

    def cancel(self, request_id: int) -> bool:
        """Forget a request, also one whose completion was not fetched yet; False if it is unknown
        or fetched, which is left alone.
        """
        return self._decoder.cancel(request_id)

    def cut(self, request_id: int) -> Completion | None:
        """End a request here and now: what it has drawn comes back as a segment that ended by
        length, of no token if it has drawn none. One that has finished, but was not fetched, comes
        back as it is; None if the request is unknown or fetched.
        """
        return self._decoder.cut(request_id)

    @property
    def num_waiting(self) -> int:
        return len(self._decoder.waiting)

    @property
    def num_running(self) -> int:
        return len(self._decoder.running)

    @property
    def is_idle(self) -> bool:
        """No request is waiting, running or finished but not fetched."""
        return not (self._decoder.unfinished or self._decoder.done)

    def step(self) -> list[Completion]:
        """Admit what fits, run one forward, draw one token for each request whose path is computed.

        Returns:
            the segments that finished.
        """
        self._weights.check_whole()
        with self._meter.timed():
            return self._decoder.step()

    def collect(self, request_ids: Container[int]) -> list[Completion]:
        """One ``step``; returns what finished of these requests and keeps what finished of others
        for those who will ask for it.
        """
        finished = self.step()
        self._decoder.keep([c for c in finished if c.request_id not in request_ids])
        return [c for c in finished if c.request_id in request_ids]

    def extend(self, items: Iterable[tuple[Node, ExtendSpec, int]]) -> Iterator[Completion]:
        """Sample a segment below each (node, spec, path key); yields each as it finishes.

        Nothing is submitted before the first completion is asked for. ``Completion.request_id``
        ascends in the order of ``items``. A request may be cancelled by its id meanwhile; closing
        the iterator cancels all that is unfinished, as an invalid item does. Several streams may
        take turns.

        Raises:
            ValueError: as ``submit``.
        """
        mine: set[int] = set()
        fetched: list[Completion] = []
        try:
            mine.update(self.submit(*item) for item in items)
            while mine:
                fetched = self.collect(mine)
                while fetched:
                    completion = fetched.pop(0)
                    mine.remove(completion.request_id)
                    yield completion
                # Whoever was cancelled meanwhile is not waited for.
                mine &= self._decoder.known_ids()
        finally:
            self._decoder.keep(fetched)
            for request_id in mine:
                self.cancel(request_id)

    # Drafts and scores.

    @torch.inference_mode()
    def forward(self, node: Node, tree: DraftTree) -> Draft:
        """Compute a draft tree below ``node``: logits of what follows the node and each of its
        tokens. ``commit`` ends it.

        Raises:
            ValueError: a token that the model does not have, it does not fit the pool or the
                model's positions, or the engine sleeps.
        """
        self._check_awake()
        self.check_length(self.store.resolve(node).end, len(tree))
        checked_token_ids("draft", tree.token_ids, self.vocabulary)
        with self._meter.aside():
            budget = self.settings.max_tokens_per_step
            draft = self._drafts.forward(node, tree, budget)
        self._meter.peak(self._num_live_slots())
        return draft

    def commit(self, draft: Draft, path: Sequence[int] = ()) -> Node:
        """Keep the draft's tokens of ``path`` with their keys and values, drop the others, and end
        the draft.

        Args:
            path: indices of draft tokens, from one directly below the node downwards.

        Returns:
            a handle on the last token kept; on the draft's own position if none is.

        Raises:
            ValueError: the indices are no path of the draft, or the draft has ended.
        """
        return self._drafts.commit(draft, path)

    def score(self, items: Sequence[tuple[Node, Scorer]]) -> list[float]:
        """A scorer's number for each node's path; each scorer is called once, with all its paths.

        Raises:
            ValueError: a scorer gave another number of scores than it got paths.
        """
        with self._meter.timed():
            scores = score_all([(self.path_token_ids(node), scorer) for node, scorer in items])
        self._meter.count(scorer_passes=len(items))
        return scores

    @torch.inference_mode()
    def score_path(
        self, token_ids: Sequence[int] | np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        """float32 [n]: log-prob of each token given the ones before it, through the pool and the
        tree attention; 0 for the first. Reads no cache, so it sees the weights as they are now.
        """
        self._check_awake()
        ids = checked_token_ids("path", token_ids, self.vocabulary)
        if not is_temperature(temperature):
            raise ValueError(f"temperature={temperature!r}: it must be {TEMPERATURES_ALLOWED}")
        self.check_length(len(ids), 0)
        if len(ids) < 2:
            return np.zeros(len(ids), np.float32)
        with self._meter.aside():
            return path_logprobs(
                self.store,
                self._forward,
                ids,
                temperature,
                budget=self.settings.max_tokens_per_step,
                may_break=not self.num_running,
            )

    # Weights and state.

    def load_weights(
        self,
        version: int,
        manifest: WeightManifest,
        tensors: Tensors | Iterable[Part],
        *,
        in_flight: str = "refuse",
    ) -> dict[str, int]:
        """Copy a weight set into the live model. No request that starts or goes on from a handle
        afterwards reads keys and values of older ones, but where a tree that was put aside goes on
        and ``kv_over_update='keep'`` is set.

        Args:
            tensors: all at once, or parts that are copied as they come.
            in_flight: what becomes of unfinished requests. 'refuse': there must be none.
                'recompute': they go on with what they have drawn, their paths computed anew.
                'keep': they go on from the keys and values they have; these leave with them.

        Returns:
            digests of the stored state by name, tied names and buffers included.

        Raises:
            ValueError: requests are unfinished and that is refused, drafts are open, or the set
                does not fit the model (nothing is copied then).
            TornWeights: parts were copied but not all came: the engine refuses work until a whole
                set is loaded.
        """
        version = checked_version(version, self.policy_version)
        self._check_in_flight(version, in_flight)
        digests = self._weights.load(manifest, tensors)
        self._put_in_force(version, in_flight)
        return digests

    def digests(self) -> dict[str, int]:
        """Digest of each stored tensor by name.

        Raises:
            ValueError: the engine sleeps and its weights have given up their memory.
        """
        return self._weights.digests()

    def sleep(self, weights: str = "keep") -> int:
        """Give up memory until ``wake``: the pool's with all cached keys and values but those of
        trees that wait on the host, captured steps, and with ``weights`` that of the model. Handles
        live on.

        Args:
            weights: 'keep': they stay. 'host': they are copied to host memory. 'drop': they are
                forgotten, and the engine refuses work until a whole set was loaded.

        Returns:
            bytes that were copied to host memory.

        Raises:
            ValueError: requests are unfinished or drafts are open.
        """
        if weights not in SLEEPING_WEIGHTS:
            raise ValueError(f"weights={weights!r}: choose one of {', '.join(SLEEPING_WEIGHTS)}")
        if not self.is_idle:
            raise ValueError("the engine has unfinished requests: finish or cancel them first")
        self._drafts.check_none("sleep")
        waiting = self.paused.nodes() if self.settings.kv_on_host else []
        self.store.retire(self.policy_version, resting=waiting)
        self.store.offload(waiting)  # what others had locked
        self.pool.release_memory()
        self._forward.release_memory()
        self._is_asleep = True
        return self._weights.give_up(weights)

    def wake(self) -> int:
        """Serve again after ``sleep``; returns the bytes that came back from host memory."""
        self._is_asleep = False
        return self._weights.restore()

    def drop_cache(self) -> None:
        """Forget all keys and values, those of trees that were put aside too: what follows rounds
        as in an engine that was just started.

        Raises:
            ValueError: requests are unfinished or drafts are open.
        """
        self.paused.forget_all()
        self.sleep()
        self.wake()

    def metrics(self) -> CostLedger:
        """Costs since the start or the last ``reset_metrics``."""
        return self._meter.ledger(self.pool.bytes_per_slot)

    def reset_metrics(self) -> None:
        self._meter.reset()

    def add_costs(self, costs: CostLedger) -> None:
        """Add what only a caller can count."""
        self._meter.add(costs)

    def gauges(self) -> EngineGauges:
        """What the engine holds now."""
        live = self._num_live_slots()
        return EngineGauges(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            slots_free=self.pool.num_free,
            slots_held=self.pool.num_held,
            slots_live=live,
            slots_cached=self.pool.num_held - live,
            kv_bytes_per_slot=self.pool.bytes_per_slot,
            num_paused=len(self.paused),
            kv_host_bytes=self.tree.num_host_bytes,
        )

    def _num_live_slots(self) -> int:
        return self.tree.num_protected + self._drafts.num_slots

    def check_integrity(self) -> None:
        """Assert that every slot is free or held by exactly one node and that all locks add up."""
        self.tree.check_integrity([*self._decoder.hidden_nodes(), *self._drafts.runs])

    # Checks.

    def _check_in_flight(self, version: int, in_flight: str) -> None:
        if in_flight not in IN_FLIGHT:
            raise ValueError(f"in_flight={in_flight!r}: choose one of {', '.join(IN_FLIGHT)}")
        self._drafts.check_none(f"weights {version}")
        if in_flight == "refuse" and not self.is_idle:
            raise ValueError(
                f"weights {version} arrived while {len(self._decoder.known_ids())} requests are "
                "unfinished or not fetched: finish or cancel them first, or load with "
                "in_flight='recompute' or 'keep'"
            )

    def _put_in_force(self, version: int, in_flight: str) -> None:
        self.paused.note_update()
        running = []
        if in_flight == "keep":
            running = self._decoder.keep_running()
        else:
            self._decoder.put_all_back()
        self.store.retire(version, running, self.paused.nodes())
        self._decoder.note_version(version)

    def _check_awake(self) -> None:
        self._weights.check_whole()
        if self._is_asleep:
            raise ValueError("the engine is asleep: call wake() first")

    def check_length(self, length: int, max_tokens: int) -> None:
        """
        Raises:
            ValueError: a path of ``length`` tokens and ``max_tokens`` more can never fit the pool
                or the model's positions.
        """
        self.runner.check_length(length, max_tokens)
