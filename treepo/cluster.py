"""The roof's one file with Ray: starts the workers, talks to all of them, and says who is missing
when one does not answer.

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
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger
from rollout.settings import EngineSettings
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from rollout.worker import RolloutWorker
from trainers.batch import PackedBatch
from trainers.settings import LearnerSettings
from trainers.worker import LearnerWorker, ReferenceWorker
from treepo.base.errors import RunFailed
from treepo.config import ClusterConfig
from treepo.shares import deal, limits_of_shares
from treepo.turns import Turn, Turns


class WorkerLost(RunFailed):
    """A worker died or did not answer in time; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Call:
    """A method that a worker runs now; ``Cluster.next_answers`` waits for it.

    Attributes:
        name: of the worker, for errors.
        deadline: when it counts as lost, in ``time.monotonic`` seconds.
    """

    name: str
    ref: Any
    deadline: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Publication:
    """The learner's weights on their way to the object store.

    Attributes:
        calls: each rank's (manifest, digests); rank 0's are those that hold.
        arrays: where the object store has them.
    """

    calls: list[Call]
    arrays: Any


def check_resources(config: ClusterConfig, available: dict[str, float]) -> None:
    """Compare what the workers need with what there is.

    Args:
        available: ``{"CPU": ..., "GPU": ...}`` of the machine or the Ray cluster.

    Raises:
        ValueError: not enough of something; says how much is missing and what to lower.
    """
    for kind, a_worker, a_rank, a_reference in (
        (
            "CPU",
            config.cpus_per_rollout_worker,
            config.cpus_per_learner_rank,
            config.cpus_per_reference_worker,
        ),
        (
            "GPU",
            config.gpus_per_rollout_worker,
            config.gpus_per_learner_rank,
            config.gpus_per_reference_worker,
        ),
    ):
        rollout, learner = a_worker * config.num_rollout_workers, a_rank * config.num_learner_ranks
        reference = a_reference * config.num_reference_workers
        need = max(rollout, learner) if config.colocate else rollout + learner
        need += reference
        have = available.get(kind, 0.0)
        if need > have:
            where = f"the Ray cluster at {config.address}" if config.address else "this machine"
            together = "taking turns" if config.colocate else "at the same time"
            raise ValueError(
                f"not enough {kind}s: "
                f"cluster.num_rollout_workers={config.num_rollout_workers} x {a_worker:g} and "
                f"cluster.num_learner_ranks={config.num_learner_ranks} x {a_rank:g}, {together}, "
                f"{_and_references(config, a_reference)}"
                f"need {need:g}, but {where} has {have:g}; {need - have:g} missing. "
                "Lower the numbers or set cluster.address to a larger Ray cluster"
            )


def _and_references(config: ClusterConfig, each: float) -> str:
    count = config.num_reference_workers
    return f"and cluster.num_reference_workers={count} x {each:g} " if count else ""


def local_resources() -> dict[str, float]:
    """Processors and GPUs of this machine that this process may use."""
    import torch

    return {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}


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
    _has_weight_group: bool = False
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
            self._seats = self._reserve_seats()
        needs = self.config.cpus_per_rollout_worker, self.config.gpus_per_rollout_worker
        self.rollout = [
            self._seated(RolloutWorker, rank, *needs).remote(rank)
            for rank in range(self.config.num_rollout_workers)
        ]
        self._rollout_setups = [
            worker.setup.remote(model_path, engine, tokenizer) for worker in self.rollout
        ]

    def start_learners(self, model_path: str, settings: LearnerSettings) -> None:
        """Start the learner ranks, which meet in :meth:`wait_until_ready`, and with
        ``reference=actor`` those who hold the reference.
        """
        if self.config.sleeps and self.rollout:
            timeout = self.config.start_timeout_seconds
            self._get("rollout worker", self._rollout_setups, timeout)  # before others need memory
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
            first = [self.learners[0].rendezvous_address.remote()]
            (address,) = self._get("learner rank", first, self.config.start_timeout_seconds)
        self._learner_setups = [
            learner.setup.remote(address, model_path, settings) for learner in self.learners
        ]

    def _reserve_seats(self) -> Any:
        """Room for one worker of each side, by number. Ray by itself fills a GPU with two workers
        of one side, which then have the turn together, while another GPU is idle.
        """
        config = self.config
        room = {
            "CPU": max(config.cpus_per_rollout_worker, config.cpus_per_learner_rank),
            "GPU": max(config.gpus_per_rollout_worker, config.gpus_per_learner_rank),
        }
        count = max(config.num_rollout_workers, config.num_learner_ranks)
        seats = placement_group([room] * count, strategy="PACK")
        if not seats.wait(config.start_timeout_seconds):
            raise WorkerLost(
                f"the Ray cluster did not free {count} x {room} within "
                f"{config.start_timeout_seconds:.0f} s: something else is running on it"
            )
        return seats

    def _seated(self, worker: type, rank: int, num_cpus: float, num_gpus: float) -> Any:
        """The actor class of worker ``rank`` of either side, which needs so much in its turn."""
        share = 0.5 if self.config.colocate else 1.0
        options: dict[str, Any] = {"num_cpus": num_cpus * share, "num_gpus": num_gpus * share}
        if self._seats is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._seats, placement_group_bundle_index=rank
            )
        return ray.remote(worker).options(**options)

    def _start_references(self, model_path: str, settings: LearnerSettings) -> None:
        actor = ray.remote(ReferenceWorker).options(
            num_cpus=self.config.cpus_per_reference_worker,
            num_gpus=self.config.gpus_per_reference_worker,
        )
        self.references = [actor.remote() for _ in range(self.config.num_reference_workers)]
        self._reference_setups = [
            worker.setup.remote(model_path, settings) for worker in self.references
        ]

    def wait_until_ready(self) -> None:
        """Wait until every worker has loaded its model, at most ``start_timeout_seconds``.

        Raises:
            ValueError: a reference holds another model than the learner began with.
        """
        timeout = self.config.start_timeout_seconds
        self._get("rollout worker", self._rollout_setups, timeout)
        self._get("learner rank", self._learner_setups, timeout)
        self._get("reference worker", self._reference_setups, timeout)
        if self.references:
            expected = self.on_learners("initial_digest")[0]
            calls = [worker.digest.remote() for worker in self.references]
            for rank, digest in enumerate(self._get("reference worker", calls, timeout)):
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
        answers = self._get("rollout worker", refs, self.config.call_timeout_seconds)
        found: dict[int, Tree | Growth] = {}
        ledger = CostLedger()
        for rank, (share, (grown, cost)) in enumerate(zip(shares, answers, strict=True)):
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
        rows: list[Any] = list(mini_batches)
        logprobs: list[Any] = [None] * len(rows)
        if self.references:
            rows = [ray.put(batches) for batches in rows]  # sent to two processes
            logprobs = self._reference_logprobs(rows)
        refs = [
            learner.update.remote(batches, of_reference, policy_version)
            for learner, batches, of_reference in zip(self.learners, rows, logprobs, strict=True)
        ]
        return self._get("learner rank", refs, self.config.call_timeout_seconds)[0]

    def _reference_logprobs(self, rows: list[Any]) -> list[Any]:
        """Where the object store has what the references say of each rank's ``rows``."""
        calls = [
            self.references[rank % len(self.references)].logprobs.remote(batches)
            for rank, batches in enumerate(rows)
        ]
        self._get("reference worker", calls, self.config.call_timeout_seconds)  # who fails is named
        return calls

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
        if self.config.weight_transport == "group":
            return self._broadcast_weights(version, dtype)
        calls = [
            learner.publication.options(num_returns=3).remote(dtype) for learner in self.learners
        ]
        timeout = self.config.call_timeout_seconds
        manifests = self._get("learner rank", [call[0] for call in calls], timeout)
        digests = self._get("learner rank", [call[1] for call in calls], timeout)
        return digests[0], self._call_rollout("load_weights", version, manifests[0], calls[0][2])

    def _broadcast_weights(
        self, version: int, dtype: str
    ) -> tuple[dict[str, int], list[dict[str, int]]]:
        if not self._has_weight_group:
            self._make_weight_group()
        self._has_weight_group = False  # a transfer that fails breaks it
        senders = [learner.send_weights.remote(version, dtype) for learner in self.learners]
        receivers = [worker.receive_weights.remote(version) for worker in self.rollout]
        sent, found = self._meet(senders, receivers)
        self._has_weight_group = True
        return sent[0], found

    def _make_weight_group(self) -> None:
        timeout = self.config.weight_timeout_seconds
        members = ["learner rank 0", *(f"rollout worker {i}" for i in range(len(self.rollout)))]
        opened = [self.learners[0].open_weight_group.remote(timeout)]
        (address,) = self._get("learner rank", opened, self.config.call_timeout_seconds)
        self._meet(
            [self.learners[0].join_weight_group.remote(members, timeout)],
            [worker.join_weight_group.remote(address, members, timeout) for worker in self.rollout],
        )

    def _meet(self, of_learners: list[Any], of_rollout: list[Any]) -> tuple[list[Any], list[Any]]:
        """Answers of calls that wait for each other. When one fails all do, and the error that is
        raised is the one nearest to the cause: a death, then a refusal, then the rest.
        """
        everyone, timeout = of_rollout + of_learners, self.config.call_timeout_seconds
        ray.wait(everyone, num_returns=len(everyone), timeout=timeout)
        answers: dict[str, list[Any]] = {"rollout worker": [], "learner rank": []}
        errors: list[Exception] = []
        for role, refs in (("rollout worker", of_rollout), ("learner rank", of_learners)):
            for rank in range(len(refs)):
                try:
                    answers[role].append(
                        self._answer(f"{role} {rank} of {len(refs)}", refs[rank], 0.0)
                    )
                except GetTimeoutError:
                    errors.append(self._no_answer(role, refs, timeout))
                except (RunFailed, ValueError, OSError) as error:
                    errors.append(error)
        if errors:
            raise min(errors, key=_distance_from_cause)
        return answers["learner rank"], answers["rollout worker"]

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
        refs = [getattr(learner, method).remote(*arguments) for learner in self.learners]
        return self._get("learner rank", refs, self.config.call_timeout_seconds)

    def _call_rollout(self, method: str, *arguments: Any) -> list[Any]:
        refs = [getattr(worker, method).remote(*arguments) for worker in self.rollout]
        return self._get("rollout worker", refs, self.config.call_timeout_seconds)

    # Calls that nobody waits for at once.

    def begin_on_rollout(self, rank: int, method: str, *arguments: Any) -> Call:
        """Have one rollout worker begin a method, after what it was asked before."""
        ref = getattr(self.rollout[rank], method).remote(*arguments)
        return self._call("rollout worker", rank, len(self.rollout), ref)

    def begin_on_learners(self, method: str, *arguments: Any) -> list[Call]:
        """Have every learner rank begin a method; calls by rank."""
        return [
            self._call("learner rank", rank, len(self.learners), ref)
            for rank, ref in enumerate(
                [getattr(learner, method).remote(*arguments) for learner in self.learners]
            )
        ]

    def begin_update(
        self, mini_batches: Sequence[Sequence[Sequence[PackedBatch]]], policy_version: int
    ) -> list[Call]:
        """As :meth:`update`; the learner ranks' calls by rank, then those of the references."""
        rows: list[Any] = list(mini_batches)
        of_reference: list[Any] = [None] * len(rows)
        if self.references:
            rows = [ray.put(batches) for batches in rows]  # sent to two processes
            of_reference = [
                self.references[rank % len(self.references)].logprobs.remote(batches)
                for rank, batches in enumerate(rows)
            ]
        refs = [
            learner.update.remote(batches, logprobs, policy_version)
            for learner, batches, logprobs in zip(self.learners, rows, of_reference, strict=True)
        ]
        workers = len(self.references)
        return [
            *(self._call("learner rank", i, len(refs), ref) for i, ref in enumerate(refs)),
            *(
                self._call("reference worker", i % workers, workers, ref)
                for i, ref in enumerate(of_reference)
                if ref is not None
            ),
        ]

    def begin_publication(self, dtype: str) -> Publication:
        """Have the learner put its weights into the object store, for engines of ``dtype``."""
        parts = [
            learner.publication.options(num_returns=3).remote(dtype) for learner in self.learners
        ]
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
        by_ref = {call.ref: call for call in calls}
        left = max(0.0, min(call.deadline for call in calls) - time.monotonic())
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=left)
        if not ready:
            late = [call.name for call in calls if call.deadline <= time.monotonic()]
            raise WorkerLost(
                f"{', '.join(late)} did not answer within {self.config.call_timeout_seconds:.0f} s"
            )
        more, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
        calls_ready = [by_ref[ref] for ref in dict.fromkeys([*ready, *more])]
        return [(call, self._answer(call.name, call.ref, 0.0)) for call in calls_ready]

    def _call(self, role: str, rank: int, count: int, ref: Any) -> Call:
        deadline = time.monotonic() + self.config.call_timeout_seconds
        return Call(name=f"{role} {rank} of {count}", ref=ref, deadline=deadline)

    def _get(self, role: str, refs: list[Any], timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        answers = []
        for rank in range(len(refs)):
            try:
                left = max(0.0, deadline - time.monotonic())
                answers.append(self._answer(f"{role} {rank} of {len(refs)}", refs[rank], left))
            except GetTimeoutError as error:
                raise self._no_answer(role, refs, timeout) from error
        return answers

    def _no_answer(self, role: str, refs: list[Any], timeout: float) -> WorkerLost:
        waiting = [i for i, ref in enumerate(refs) if not ray.wait([ref], timeout=0)[0]]
        return WorkerLost(
            f"{role} {', '.join(map(str, waiting))} of {len(refs)} "
            f"did not answer within {timeout:.0f} s"
        )

    def _answer(self, name: str, ref: Any, timeout: float) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except RayActorError as error:
            raise WorkerLost(f"{name} died: {error}") from error
        except RayTaskError as error:
            # The user's to mend, or a failure that says all: no traceback of another process.
            if isinstance(error.cause, ValueError | OSError | RunFailed):
                raise error.cause from None
            raise


def _distance_from_cause(error: Exception) -> int:
    """Of errors that came of one failure the smallest is to be shown."""
    kinds = (WorkerLost, ValueError, OSError)
    return next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))
