"""The fully asynchronous pipeline at work: what ``treepo/async_schedule.py`` says is begun on the
cluster, answers are waited for together, and each becomes an event.

A step is one update. Slices run on over its end, over checkpoints too: these hold the trees of
running slices as they were when the slices began, so a resumed run grows them again from there. An
evaluation needs the engines: it waits until running slices have ended. Which weights draw a token
depends on when they arrived, so two runs are not equal, nor is a resumed one to one left alone;
what holds is that each prompt is used once an epoch, and no token is trained on that is too old.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rollout.growth import GrowthLimits
from rollout.metrics import CostLedger
from rollout.strategies.base import Prompt
from treepo import async_schedule as schedule
from treepo.advantages import filter_groups
from treepo.calls import Call
from treepo.data import Problem
from treepo.data_order import DataPosition
from treepo.drawing import expectations, finished_part_of
from treepo.dynamic_sampling import GenBatch
from treepo.idle_time import IdleTime
from treepo.lesson import Lesson
from treepo.pipelines import num_in_flight
from treepo.pools import Group
from treepo.segmented import SegmentBatch, gen_batch, num_segments
from treepo.step import make_prompts
from treepo.step_metrics import version_metrics
from treepo.sync import Weights, prove_arrival

if TYPE_CHECKING:
    from treepo.session import Session


# Batches of prompts without a signal after which a step is skipped (DAPO samples as many at most).
_MOST_FILTERED = 10


@dataclass(kw_only=True, eq=False)
class _Task:
    """Calls that are done when all are answered, and what is done then with the answers."""

    calls: Sequence[Call]
    then: Callable[[list[Any]], None]
    answers: dict[Call, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Seen:
    """What happened since the last step."""

    sampled: GenBatch
    judged: list[Group] = field(default_factory=list)
    filtered: list[Group] = field(default_factory=list)
    num_judgements: int = 0
    versions_behind: list[int] = field(default_factory=list)  # of slices that ended
    golden_difference: float = 0.0


class AsyncRun:
    """Samples and learns at once, for a session whose engines hold its policy version."""

    def __init__(self, session: Session) -> None:
        self.session = session
        trainer = session.config.trainer
        segments, size = trainer.segments, trainer.train_batch_size
        self._finished_part = finished_part_of(session)
        num_workers = session.config.cluster.num_rollout_workers
        self.now = schedule.begin(
            schedule.Rules(
                batch_size=size,
                max_staleness=segments.max_staleness,
                on_stale=segments.on_stale,
                num_in_flight=num_in_flight(trainer),
                total_steps=trainer.total_steps,
                max_response_length=session.strategy[1].max_response_length,
            ),
            session.order,
            position=DataPosition.of(session.state.data_position),
            pools=session.pools,
            num_workers=num_workers,
            step=session.state.step,
            version=session.state.policy_version,
        )
        # A slice ends when a worker's share of a batch is finished, if not by its segment.
        self._limits = GrowthLimits(
            segment_length=segments.segment_length, stop_when_finished=-(-size // num_workers)
        )
        self._tasks: list[_Task] = []
        self._weights: Weights | None = None  # the newest published ones
        self._is_draining = False
        self._learns_since = 0.0
        self._batch: tuple[Group, ...] = ()
        self._lesson: Lesson | None = None
        self._learned: dict[str, float] | None = None
        self._seen = _Seen(sampled=_nothing_sampled())
        self._workers_idle = IdleTime(num_workers)
        self._learner_idle = IdleTime(1)

    # A step.

    def step(self) -> dict[str, float]:
        """Go on until an update has ended. Advances the session's state.

        Returns:
            The step's metrics.
        """
        session, began = self.session, time.monotonic()
        session.timings = {}
        before = self.now
        self._workers_idle.start()
        self._learner_idle.start()
        while self.now.step == before.step:
            if self._has_no_signal:
                self._skip_step()
                break
            self._begin_loads()
            self._begin_slices()
            self._begin_update()
            if self.now.step == before.step:  # else the batch had nothing to follow
                self._handle_answers()
        metrics = self._end_step(before)
        metrics["pipeline/rollout_idle_frac"] = self._workers_idle.share()
        metrics["pipeline/learner_idle_frac"] = self._learner_idle.share()
        return metrics | session.time_metrics(metrics, time.monotonic() - began)

    @property
    def _has_no_signal(self) -> bool:
        """Whether a step has found so many prompts without a signal that it gives up. Otherwise a
        run whose responses all score the same would go through its data for ever.
        """
        most = _MOST_FILTERED * self.session.config.trainer.train_batch_size
        return self.now.training is None and len(self._seen.filtered) >= most

    def _skip_step(self) -> None:
        self._batch, self._lesson = (), self.session.prepare(self.now.step + 1, [])
        self.now = schedule.step_skipped(self.now)

    def _end_step(self, before: schedule.Schedule) -> dict[str, float]:
        session, seen, now, lesson = self.session, self._seen, self.now, self._lesson
        algorithm = session.config.algorithm
        assert lesson is not None
        judged = [group.scored(algorithm.overlong) for group in seen.judged]
        batch = SegmentBatch(
            sampled=seen.sampled,
            settled=gen_batch([*self._batch, *seen.filtered]),
            kept=list(lesson.kept),
            counts=filter_groups(judged, algorithm.filter_groups_metric)[1],
            pools=replace(now.pools(), num_finished=now.num_finished - before.num_finished),
            after=now.position,
            num_new=now.num_begun - before.num_begun,
            num_dropped=now.num_dropped - before.num_dropped,
            spans=version_metrics(lesson.kept) | num_segments(self._batch),
        )
        session.write_trees(now.step, batch.settled, lesson)
        metrics = session.describe(batch)
        metrics |= self._learned or session.skip(now.step, batch, lesson)
        metrics["pipeline/num_slices"] = float(len(seen.versions_behind))
        if behind := seen.versions_behind:
            metrics["pipeline/versions_behind/mean"] = sum(behind) / len(behind)
            metrics["pipeline/versions_behind/max"] = float(max(behind))
        if seen.golden_difference:
            metrics["sync/golden_logprob_diff_max"] = seen.golden_difference
        session.pools = batch.pools
        session.state = replace(session.state, step=now.step, data_position=now.position)
        self._seen = _Seen(sampled=_nothing_sampled())
        self._batch, self._lesson, self._learned = (), None, None
        return metrics

    def drain(self) -> None:
        """Wait until nothing runs and every engine holds the learner's weights. What was sampled
        meanwhile counts to the next step.
        """
        self.session.progress.stage("waiting for running slices")
        self._begin_loads()
        while self._tasks:
            self._handle_answers(begins=False)
            self._begin_loads()
        assert self.now.is_quiet

    # What is begun.

    def _begin_loads(self) -> None:
        self.now, ranks = schedule.load(self.now)
        for rank in ranks:
            weights, cluster = self._weights, self.session.cluster
            assert weights is not None
            calls = [
                cluster.begin_on_rollout(
                    rank, "load_weights", weights.version, weights.manifest, weights.arrays
                ),
                cluster.begin_on_rollout(rank, "score_paths", self.session.golden),
            ]
            self._workers_idle.begin(rank)
            self._await(calls, partial(self._loaded, rank, weights))

    def _begin_slices(self) -> None:
        self.now, begun = schedule.slices(self.now, self._make_prompts)
        segment_length = self._limits.segment_length
        for rank, entries in begun:
            expected = expectations(
                self.session, entries, self.now.lengths, segment_length, self._finished_part
            )
            call = self.session.cluster.begin_on_rollout(
                rank,
                "grow",
                [entry.work for entry in entries],
                *self.session.strategy,
                self.now.workers[rank].version,
                self._limits,
                expected,
            )
            self._workers_idle.begin(rank)
            self._await([call], partial(self._slice_ended, rank))

    def _begin_update(self) -> None:
        self.now, taken = schedule.batch(self.now)
        if taken is None:
            return
        session, step = self.session, self.now.step + 1
        overlong = session.config.algorithm.overlong
        self._batch = taken
        self._lesson = session.prepare(step, [group.scored(overlong) for group in taken])
        if not self._lesson.mini_batches:
            self.now = schedule.update_ended(self.now, is_skipped=True)
            return
        calls = session.cluster.begin_update(self._lesson.mini_batches, self.now.version)
        self._learns_since = time.monotonic()
        self._learner_idle.begin(0)
        session.progress.stage("sampling and learning")
        self._await(calls, self._updated)

    def _begin_publication(self) -> None:
        cluster, version = self.session.cluster, self.now.version
        sent = cluster.begin_publication(self.session.config.engine.dtype)
        scores = cluster.begin_on_learners("score_paths", self.session.golden)

        def then(answers: list[Any]) -> None:
            self.now = schedule.weights_published(self.now, version)
            if self.now.published == version:  # no newer one came first
                self._weights = Weights(
                    version=version,
                    manifest=answers[0],
                    digests=answers[1],
                    arrays=sent.arrays,
                    golden_logprobs=answers[len(sent.calls)],
                )
            if self.now.training is None:
                self._learner_idle.end(0)

        self._await([*sent.calls, *scores], then)

    # What has ended.

    def _handle_answers(self, begins: bool = True) -> None:
        """Wait for the next answers.

        Args:
            begins: whether slices may begin.
        """
        assert self._tasks, "nothing runs and nothing may begin"
        self._is_draining = not begins
        open_calls = {
            call: task for task in self._tasks for call in task.calls if call not in task.answers
        }
        for call, answer in self.session.cluster.next_answers(list(open_calls)):
            task = open_calls[call]
            task.answers[call] = answer
            if len(task.answers) == len(task.calls):
                self._tasks.remove(task)
                task.then([task.answers[each] for each in task.calls])

    def _slice_ended(self, rank: int, answers: list[Any]) -> None:
        ((grown, ledger),) = answers
        behind = self.now.version - self.now.workers[rank].version
        self._seen.versions_behind.append(behind)
        self._seen.sampled += replace(_nothing_sampled(), ledger=ledger)
        self.now = schedule.slice_ended(self.now, rank, grown)
        self._workers_idle.end(rank)
        if not self._is_draining:  # the worker goes on while verdicts are waited for
            self._begin_loads()
            self._begin_slices()
        self._judge()

    def _judge(self) -> None:
        if not self.now.unjudged:
            return
        session, seen = self.session, self._seen
        problems = [entry.problem for entry, _ in self.now.unjudged]
        trees = [tree for _, tree in self.now.unjudged]
        verdicts = session.judge(problems, trees, seen.num_judgements)
        seen.num_judgements += 1
        seen.sampled += GenBatch(
            problems=problems, trees=trees, verdicts=verdicts, ledger=CostLedger()
        )
        session.check_verdicts(seen.sampled)  # now: without verdicts no step would ever end
        self.now, groups, filtered = schedule.judged(self.now, verdicts, session.config.algorithm)
        seen.judged += groups
        seen.filtered += filtered

    def _loaded(self, rank: int, weights: Weights, answers: list[Any]) -> None:
        session = self.session
        digests, scores = answers
        dtypes = session.config.engine.dtype, session.config.trainer.learner.dtype
        difference = prove_arrival(f"rollout worker {rank}", weights, digests, scores, dtypes)
        self._seen.golden_difference = max(self._seen.golden_difference, difference)
        confirmed = session.cluster.begin_on_rollout(rank, "confirm", weights.version)
        self._await([confirmed], lambda answers: None)
        self.now = schedule.weights_loaded(self.now, rank, weights.version)
        self._workers_idle.end(rank)

    def _updated(self, answers: list[Any]) -> None:
        session = self.session
        assert self._lesson is not None
        session.timings["update_actor"] = time.monotonic() - self._learns_since
        self._learned = session.accept(self.now.step + 1, self._lesson, answers[0])
        self.now = schedule.update_ended(self.now, is_skipped=False)
        self._begin_publication()

    # Small things.

    def _await(self, calls: Sequence[Call], then: Callable[[list[Any]], None]) -> None:
        self._tasks.append(_Task(calls=calls, then=then))

    def _make_prompts(self, problems: Sequence[Problem], step: int, epoch: int) -> list[Prompt]:
        # A problem may come again within a step, but then of another epoch.
        return make_prompts(problems, self.session.config.seed, "train", step, epoch)

    def summary(self) -> dict[str, float]:
        """For ``summary.json``: shares of this life of the run's steps."""
        return {
            "rollout_idle_frac": self._workers_idle.share_of_all(),
            "learner_idle_frac": self._learner_idle.share_of_all(),
        }


def _nothing_sampled() -> GenBatch:
    return GenBatch(problems=[], trees=[], verdicts=[], ledger=CostLedger())
