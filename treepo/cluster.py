"""The running workers: starts them, and talks to all of them.

Rollout workers hold an engine each; learner ranks hold a DeepSpeed engine each. In the synchronous
colocated pipeline they take turns, so they share processors.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from rollout.worker import RolloutWorker
from trainers.batch import PackedBatch
from trainers.settings import LearnerSettings
from trainers.worker import LearnerWorker, ReferenceWorker
from treepo.calls import Call, answers, begin, next_answers
from treepo.config import ClusterConfig
from treepo.resources import check_resources, local_resources
from treepo.seats import actor_class, reserve_seats
from treepo.shares import deal, limits_of_shares
from treepo.turns import Turn, Turns
from treepo.weight_roads import Broadcasts, Publication, put_into_store, through_object_store


@dataclass(kw_only=True, eq=False)
class Cluster:
    """The running workers. Use as a context manager: leaving it stops every process that it
    started.
    """

    config: ClusterConfig
    rollout: list[Any] = field(default_factory=list)
    learners: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    _rollout_setups: list[Any] = field(default_factory=list)
    _learner_setups: list[Any] = field(default_factory=list)
    _reference_setups: list[Any] = field(default_factory=list)
    _broadcasts: Broadcasts | None = None
    _keeps_kv: bool = False
    _homes: dict[int, int] = field(default_factory=dict)  # of unfinished trees, by root key
    _turns: Turns | None = None
    _seats: Any = None  # a placement group where sides share GPUs

    def __enter__(self) -> Cluster:
        if self.config.address is None:
            check_resources(self.config, local_resources())
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray replaces CUDA_VISIBLE_DEVICES of workers without a GPU unless told not to.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=self.config.address or "local",
            include_dashboard=False if self.config.address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place, which aborts
        if self.config.address is not None:
            check_resources(self.config, ray.cluster_resources())
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self.rollout + self.learners + self.references:
            ray.kill(actor)
        ray.shutdown()

    def start_rollout(
        self, model_path: str, engine: EngineSettings, tokenizer: str | None = None
    ) -> None:
        """Start the rollout workers, each of which loads and probes the model.

        Args:
            tokenizer: for stop strings, if it is not the model's own.
        """
        self._keeps_kv = engine.keeps_kv
        if self.config.shares_gpus:
            self._seats = reserve_seats(self.config)
        needs = self.config.cpus_per_rollout_worker, self.config.gpus_per_rollout_worker
        self.rollout = [
            self._seated(RolloutWorker, rank, *needs).remote(rank)
            for rank in range(self.config.num_rollout_workers)
        ]
        self._rollout_setups = begin(self.rollout, "setup", model_path, engine, tokenizer)

    def start_learners(self, model_path: str, settings: LearnerSettings) -> None:
        """Start the learner ranks, which meet in :meth:`wait_until_ready`, and with
        ``reference=actor`` those who hold the reference.
        """
        if self.config.sleeps and self.rollout:
            timeout = self.config.start_timeout_seconds
            answers("rollout worker", self._rollout_setups, timeout)  # before others need memory
            self._call_rollout("sleep", "host")
            self._turns = Turns(self._call_rollout, self._call_learners, samplers_sleep=True)
        if settings.reference == "actor":
            self._start_references(model_path, settings)
        world = self.config.num_learner_ranks
        needs = self.config.cpus_per_learner_rank, self.config.gpus_per_learner_rank
        self.learners = [
            self._seated(LearnerWorker, rank, *needs).remote(rank, world) for rank in range(world)
        ]
        address = None
        if world > 1:
            first = begin(self.learners[:1], "rendezvous_address")
            (address,) = answers("learner rank", first, self.config.start_timeout_seconds)
        self._learner_setups = begin(self.learners, "setup", address, model_path, settings)

    def _seated(self, worker: type, rank: int, num_cpus: float, num_gpus: float) -> Any:
        """The actor class of worker ``rank`` of either side, which needs so much in its turn."""
        share = 0.5 if self.config.colocate else 1.0
        return actor_class(worker, num_cpus * share, num_gpus * share, self._seats, seat=rank)

    def _start_references(self, model_path: str, settings: LearnerSettings) -> None:
        needs = self.config.cpus_per_reference_worker, self.config.gpus_per_reference_worker
        actor = actor_class(ReferenceWorker, *needs)
        self.references = [actor.remote() for _ in range(self.config.num_reference_workers)]
        self._reference_setups = begin(self.references, "setup", model_path, settings)

    def wait_until_ready(self) -> None:
        """Wait until every worker has loaded its model, at most ``start_timeout_seconds``.

        Raises:
            ValueError: a reference holds another model than the learner began with.
        """
        timeout = self.config.start_timeout_seconds
        answers("rollout worker", self._rollout_setups, timeout)
        answers("learner rank", self._learner_setups, timeout)
        answers("reference worker", self._reference_setups, timeout)
        if self.references:
            expected = self.on_learners("initial_digest")[0]
            calls = begin(self.references, "digest")
            for rank, digest in enumerate(answers("reference worker", calls, timeout)):
                if digest != expected:
                    raise ValueError(
                        f"reference worker {rank} loaded another model (digest {digest}) than the "
                        f"learner ({expected}): the folder of model.path must be the same on every "
                        "machine"
                    )

    def sample(
        self, prompts: Sequence[Prompt], strategy: str, settings: Any, policy_version: int
    ) -> tuple[list[Tree], CostLedger]:
        """Grow one tree a prompt; trees come back in the prompts' order, whichever worker grew
        them.
        """
        grown, ledger = self.grow(prompts, strategy, settings, policy_version, GrowthLimits())
        return [tree for tree in grown if isinstance(tree, Tree)], ledger

    def grow(
        self,
        work: Sequence[Prompt | Growth],
        strategy: str,
        settings: Any,
        policy_version: int,
        limits: GrowthLimits,
        expected_tokens: Sequence[float] | None = None,
    ) -> tuple[list[Tree | Growth], CostLedger]:
        """Grow new and unfinished trees until they are finished or the limits are reached; they
        come back in the order of ``work``. A tree may go on on any worker; it goes back to the one
        that has kept its keys and values, if any.

        Args:
            expected_tokens: of each tree yet; the longest are served first and dealt evenly.
        """
        self._take(Turn.SAMPLING)
        homes = [self._homes.get(t.root_key) if isinstance(t, Growth) else None for t in work]
        shares = deal(homes, len(self.rollout), expected_tokens)
        refs = [
            worker.grow.remote(
                [work[i] for i in share],
                strategy,
                settings,
                policy_version,
                limit,
                None if expected_tokens is None else [expected_tokens[i] for i in share],
            )
            for worker, share, limit in zip(
                self.rollout, shares, limits_of_shares(limits, list(map(len, shares))), strict=False
            )
        ]
        grown_by_rank = answers("rollout worker", refs, self.config.call_timeout_seconds)
        found: dict[int, Tree | Growth] = {}
        ledger = CostLedger()
        for rank, (share, (grown, cost)) in enumerate(zip(shares, grown_by_rank, strict=True)):
            found.update(zip(share, grown, strict=True))
            ledger = ledger + cost
            self._note_homes(rank, grown)
        return [found[i] for i in range(len(work))], ledger

    def drop_cache(self) -> None:
        """Forget all keys and values, so that what follows is as in workers just started."""
        self.on_rollout("drop_cache")
        self._homes.clear()

    def _note_homes(self, rank: int, grown: Sequence[Tree | Growth]) -> None:
        if self._keeps_kv:
            for tree in grown:
                if isinstance(tree, Growth):
                    self._homes[tree.root_key] = rank
                else:
                    self._homes.pop(tree.segments[0].path_key, None)

    def update(
        self, mini_batches: Sequence[Sequence[Sequence[PackedBatch]]], policy_version: int
    ) -> dict[str, float]:
        """One optimiser step a mini-batch.

        Args:
            mini_batches: indexed [rank][mini-batch][micro-batch].
            policy_version: of the learner's weights now.
        """
        self._take(Turn.LEARNING, forget=True)
        timeout = self.config.call_timeout_seconds
        rows, logprobs = self._ask_references(mini_batches)
        answers("reference worker", logprobs, timeout)  # who fails is named
        return answers("learner rank", self._send_rows(rows, logprobs, policy_version), timeout)[0]

    def _ask_references(self, mini_batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The ranks' rows, as they can be sent to a process, and references to the
        log-probabilities of each; none of these without workers that hold the reference.
        """
        if not self.references:
            return list(mini_batches), []
        rows = [ray.put(batches) for batches in mini_batches]  # sent to two processes
        return rows, [
            self.references[rank % len(self.references)].logprobs.remote(batches)
            for rank, batches in enumerate(rows)
        ]

    def _send_rows(self, rows: list[Any], logprobs: list[Any], policy_version: int) -> list[Any]:
        """Have the learner ranks begin their update."""
        of_reference = logprobs or [None] * len(rows)
        return [
            learner.update.remote(*of_rank, policy_version)
            for learner, *of_rank in zip(self.learners, rows, of_reference, strict=True)
        ]

    def transfer_weights(
        self, version: int, dtype: str
    ) -> tuple[dict[str, int], list[dict[str, int]]]:
        """Bring the learner's weights to every engine as ``version``, by the configured road and
        without passing through this process.

        Args:
            dtype: of the engines.

        Returns:
            the digests that an engine must find, and those that each engine found, by rank.
        """
        self._take(Turn.PUBLISHING)
        if self.config.weight_transport == "object_store":
            timeout = self.config.call_timeout_seconds
            return through_object_store(self.learners, self.rollout, version, dtype, timeout)
        if self._broadcasts is None:
            self._broadcasts = Broadcasts(
                config=self.config, learners=self.learners, rollout=self.rollout
            )
        return self._broadcasts.send(version, dtype)

    def on_learners(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every learner rank with the same arguments; answers by rank."""
        if self._turns is not None:
            self._turns.take_for_learners(method)
        return self._call_learners(method, *arguments)

    def on_rollout(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rollout worker with the same arguments; answers by rank."""
        self._take(Turn.SAMPLING)
        return self._call_rollout(method, *arguments)

    def turn_metrics(self) -> dict[str, float]:
        """What it cost since this was last asked that one side slept while the other worked."""
        return {} if self._turns is None else self._turns.metrics()

    def _take(self, turn: Turn, *, forget: bool = False) -> None:
        if self._turns is not None:
            self._turns.take(turn, forget=forget)

    def _call_learners(self, method: str, *arguments: Any) -> list[Any]:
        refs = begin(self.learners, method, *arguments)
        return answers("learner rank", refs, self.config.call_timeout_seconds)

    def _call_rollout(self, method: str, *arguments: Any) -> list[Any]:
        refs = begin(self.rollout, method, *arguments)
        return answers("rollout worker", refs, self.config.call_timeout_seconds)

    # Calls that nobody waits for at once.

    def begin_on_rollout(self, rank: int, method: str, *arguments: Any) -> Call:
        """Have one rollout worker begin a method, after what it was asked before."""
        (ref,) = begin(self.rollout[rank : rank + 1], method, *arguments)
        return self._call("rollout worker", rank, len(self.rollout), ref)

    def begin_on_learners(self, method: str, *arguments: Any) -> list[Call]:
        """Have every learner rank begin a method; calls by rank."""
        refs = begin(self.learners, method, *arguments)
        return [self._call("learner rank", i, len(refs), ref) for i, ref in enumerate(refs)]

    def begin_update(
        self, mini_batches: Sequence[Sequence[Sequence[PackedBatch]]], policy_version: int
    ) -> list[Call]:
        """As :meth:`update`; the learner ranks' calls by rank, then those of the references."""
        rows, logprobs = self._ask_references(mini_batches)
        updates, count = self._send_rows(rows, logprobs, policy_version), len(self.references)
        return [
            *(self._call("learner rank", i, len(updates), ref) for i, ref in enumerate(updates)),
            *(
                self._call("reference worker", i % count, count, ref)
                for i, ref in enumerate(logprobs)
            ),
        ]

    def begin_publication(self, dtype: str) -> Publication:
        """Have the learner put its weights into the object store, for engines of ``dtype``."""
        parts = put_into_store(self.learners, dtype)
        calls = [
            self._call("learner rank", rank, len(parts), ref)
            for rank, (manifest, digests, _) in enumerate(parts)
            for ref in (manifest, digests)
        ]
        return Publication(calls=calls, arrays=parts[0][2])

    def next_answers(self, calls: Sequence[Call]) -> list[tuple[Call, Any]]:
        """Wait until one of ``calls`` is answered; all that are.

        Raises:
            WorkerLost: a worker died, or did not answer in time.
        """
        return next_answers(calls, self.config.call_timeout_seconds)

    def all_answers(self, calls: Sequence[Call]) -> list[Any]:
        """Wait for all of ``calls``; answers in their order. Raises as :meth:`next_answers`."""
        found: dict[Call, Any] = {}
        while waiting := [call for call in calls if call not in found]:
            found |= self.next_answers(waiting)
        return [found[call] for call in calls]

    def _call(self, role: str, rank: int, count: int, ref: Any) -> Call:
        deadline = time.monotonic() + self.config.call_timeout_seconds
        return Call(name=f"{role} {rank} of {count}", ref=ref, deadline=deadline)
