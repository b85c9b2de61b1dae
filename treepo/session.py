"""A run at work: what it holds open, and what can be done with it: step, publish, evaluate, save,
export.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.pool import RewardPool
from rewards.records import RewardResult
from rollout.tree import Tree
from trainers.batch import TokenTree
from treepo.advantages import ScoredTree
from treepo.alarms import alarm_of
from treepo.asynchronous import AsyncRun
from treepo.base.errors import RunFailed
from treepo.base.keys import root_key
from treepo.checkpoint import RunState, save_checkpoint
from treepo.cluster import Cluster
from treepo.config import TrainConfig
from treepo.data import Problem, ProblemOrder
from treepo.data_order import DataPosition
from treepo.drawing import draw_batches, draw_segments
from treepo.dynamic_sampling import GenBatch, StepBatch
from treepo.evaluation import EVALUATION_SEED, Evaluation, evaluate, require_a_verdict
from treepo.held_out import evaluation_passes, sample_flat
from treepo.lesson import Lesson, prepare_lesson
from treepo.one_step import AHEAD_FILE, dump_ahead, one_step
from treepo.overlong import overlong_verdicts
from treepo.package_versions import package_versions
from treepo.pools import POOLS_FILE, Pools, dump_pools
from treepo.progress import Progress
from treepo.run_folder import RunFolder
from treepo.segmented import SegmentBatch
from treepo.step import reward_items, shuffle_verdicts
from treepo.step_metrics import reward_metrics, rollout_metrics, tree_metrics
from treepo.sync import publish_weights
from treepo.text import Decoder
from treepo.tracking import Tracker
from treepo.tree_file import write_trees


@dataclass(kw_only=True)
class Session:
    """An open run.

    Attributes:
        strategy: the rollout strategy's name and settings, stop tokens filled in.
        order: in which problems are trained on.
        splits: held-out problems by name.
        golden: token sequences that prove every publication.
        state: where the run stands.
        pools: what waits between two steps of segmented rollout.
        ahead: the next step's batch, drawn before the last update ended (the one-step pipeline).
        asynchronous: what runs on between two steps of the asynchronous pipeline.
    """

    config: TrainConfig
    run: RunFolder
    cluster: Cluster
    rewards: RewardPool
    tracker: Tracker
    progress: Progress
    decoder: Decoder
    strategy: tuple[str, Any]
    order: ProblemOrder
    splits: Mapping[str, Sequence[Problem]]
    golden: Sequence[np.ndarray]
    state: RunState
    pools: Pools = field(default_factory=Pools)
    ahead: StepBatch | SegmentBatch | None = None
    asynchronous: AsyncRun | None = None
    timings: dict[str, float] = field(default_factory=dict)
    last_look: float = field(default_factory=time.monotonic)

    def publish(self) -> dict[str, float]:
        """Send the learner's weights to every engine as the state's policy version, with proof."""
        with self.clock("sync"):
            return publish_weights(
                self.cluster,
                self.state.policy_version,
                self.config.engine.dtype,
                self.golden,
                learner_dtype=self.config.trainer.learner.dtype,
            )

    def step(self) -> dict[str, float]:
        """One round: sample trees, judge them, learn from them, publish. Advances the state.

        Returns:
            The step's metrics.
        """
        if self.config.trainer.pipeline == "async":
            self.asynchronous = self.asynchronous or AsyncRun(self)
            return self.asynchronous.step()
        began, self.timings = time.monotonic(), {}
        if self.config.trainer.pipeline == "one_step":
            metrics = one_step(self)
        else:
            batch = self.draw(trains_at=self.state.policy_version)
            metrics = self.describe(batch) | self.learn(self.state.step + 1, batch)
            self.advance(batch)
        return metrics | self.time_metrics(metrics, time.monotonic() - began)

    def draw(self, *, trains_at: int) -> StepBatch | SegmentBatch:
        """The next step's batch, under the weights in force.

        Args:
            trains_at: the policy version that its update starts from.

        Raises:
            RunFailed: hardly a response has a verdict. So no such batch waits or is saved.
        """
        step, position = self.state.step + 1, DataPosition.of(self.state.data_position)
        batch: StepBatch | SegmentBatch
        if self.config.trainer.segments.is_on:
            batch = draw_segments(self, step, position, trains_at)
        else:
            batch = draw_batches(self, step, position)
        self.check_verdicts(batch.sampled)
        return batch

    def advance(self, batch: StepBatch | SegmentBatch) -> None:
        """The step of ``batch`` is done, as far as the data go."""
        if isinstance(batch, SegmentBatch):
            self.pools = batch.pools
        self.state = replace(self.state, step=self.state.step + 1, data_position=batch.after)

    def describe(self, batch: StepBatch | SegmentBatch) -> dict[str, float]:
        """Metrics of what a step sampled."""
        sampled = batch.sampled
        metrics = rollout_metrics(sampled.trees, sampled.ledger)
        if sampled.trees:
            metrics |= tree_metrics(sampled.trees) | reward_metrics(sampled.verdicts)
        metrics["training/epoch"] = float(batch.after.epoch)
        return metrics | batch.metrics()

    def check_verdicts(self, sampled: GenBatch) -> None:
        """
        Raises:
            RunFailed: not a response has a verdict. Not of few prompts: their verifier may fail
                where others don't.
        """
        if 2 * len(sampled.trees) >= self.config.trainer.train_batch_size:
            require_a_verdict(
                [(v.has_verdict, v.detail) for of_tree in sampled.verdicts for v in of_tree]
            )

    def time_metrics(self, metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
        """
        Args:
            metrics: of the step, without these.
            seconds: that it took.
        """
        found = {f"timing_s/{name}": spent for name, spent in self.timings.items()}
        found["timing_s/step"] = seconds
        found["perf/throughput"] = metrics["rollout/trajectory_tokens"] / seconds
        found["training/policy_version"] = float(self.state.policy_version)
        return found | self.cluster.turn_metrics()

    def judge(
        self, problems: Sequence[Problem], trees: Sequence[Tree], number: int = 0
    ) -> list[list[RewardResult]]:
        """A verdict for every leaf, by tree.

        Args:
            number: of the batch in the step, from 0: names the control experiment's shuffle.
        """
        self.progress.stage("judging responses")
        with self.clock("reward"):
            items = [
                reward_items(tree, problem, self.decoder)
                for tree, problem in zip(trees, problems, strict=True)
            ]
            scored = iter(self.rewards.score([item for of_tree in items for item in of_tree]))
            verdicts = [
                overlong_verdicts(
                    tree, [next(scored) for _ in of_tree], self.config.algorithm.overlong
                )
                for tree, of_tree in zip(trees, items, strict=True)
            ]
        if self.config.trainer.shuffle_rewards:
            names = (self.config.seed, "shuffle", self.state.step)
            key = root_key(*names, number) if number else root_key(*names)
            verdicts = shuffle_verdicts(verdicts, key)
        return verdicts

    def learn(self, step: int, batch: StepBatch | SegmentBatch) -> dict[str, float]:
        """Advantages, the update and the publication of its outcome. A batch that leaves nothing
        to follow is skipped: no update, no new version, and a metric and a line that say so.
        """
        lesson = self.prepare(step, batch.kept)
        self.write_trees(step, batch.settled, lesson)
        if not lesson.mini_batches:
            return self.skip(step, batch, lesson)
        self.progress.stage("learning")
        with self.clock("update_actor"):
            metrics = self.cluster.update(lesson.mini_batches, self.state.policy_version)
        metrics = self.accept(step, lesson, metrics)
        self.progress.stage("publishing weights")
        return metrics | self.publish()

    def prepare(self, step: int, kept: Sequence[ScoredTree]) -> Lesson:
        """Advantages of the groups to train on, and the learner's batches."""
        with self.clock("adv"):
            return prepare_lesson(kept, self.config, step, self.strategy[1].max_response_length)

    def write_trees(self, step: int, settled: GenBatch, lesson: Lesson) -> None:
        """The step's file of trees, if it is to have one."""
        frequency = self.config.trainer.save_trees_freq
        if frequency and step % frequency == 0:
            with self.clock("adv"):
                write_trees(
                    self.run.trees_file(step),
                    settled.trees,
                    settled.verdicts,
                    lesson.by_problem,
                    self.decoder,
                )

    def skip(self, step: int, batch: StepBatch | SegmentBatch, lesson: Lesson) -> dict[str, float]:
        """The step ends without an update."""
        self.progress.say(f"step {step} skipped: {_why_skipped(batch, lesson.trees)}")
        return {"training/skipped_steps": 1.0}

    def accept(self, step: int, lesson: Lesson, metrics: dict[str, float]) -> dict[str, float]:
        """The learner has made its update: the state has a new policy version, if no alarm rings.

        Raises:
            RunFailed: an alarm on the mismatch of sampler and learner.
        """
        trainer = self.config.trainer
        if alarm := alarm_of(metrics, trainer.learner.off_policy.alarms, step, self.run.path):
            self.tracker.log(step, metrics)  # the row that shows it
            raise RunFailed(alarm)
        self.state = replace(self.state, policy_version=self.state.policy_version + 1)
        return metrics | {
            "training/trained_tokens": float(lesson.num_tokens * trainer.ppo_epochs),
            "training/skipped_steps": 0.0,
        }

    def evaluate(self) -> Evaluation:
        """Score the held-out splits, greedily and at the evaluation's temperature."""
        if self.asynchronous is not None:
            self.asynchronous.drain()
        if self.splits:
            self.progress.stage("evaluating on held-out problems")
        with self.clock("testing"):
            result = evaluate(
                self.splits,
                evaluation_passes(self.config, EVALUATION_SEED),
                sample=lambda problems, settings: sample_flat(
                    self.cluster,
                    problems,
                    settings,
                    self.strategy[1],
                    self.state.policy_version,
                ),
                score=self.rewards.score,
                decoder=self.decoder,
            )
        if self.splits:
            self.progress.evaluated(self.state.step, result.scores)
        return result

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write the step's row and show it."""
        self.tracker.log(self.state.step, metrics)
        self.progress.update(self.state.step, metrics)

    def save(self) -> Path:
        """Write a checkpoint of everything that a resumed run needs."""
        self.progress.stage("saving a checkpoint")

        def write(folder: Path) -> None:
            self.cluster.on_learners("save", str(folder / "learner"))
            self.cluster.on_learners("export_hf", str(folder / "hf"))
            if self.config.trainer.segments.is_on:
                (folder / POOLS_FILE).write_bytes(dump_pools(self.pools))
            if self.ahead is not None:
                (folder / AHEAD_FILE).write_bytes(dump_ahead(self.ahead))

        self.state = replace(
            self.state,
            seconds=self.state.seconds + self._seconds_since_last_look(),
            digest=self.cluster.on_learners("digest")[0],
            tracking=self.tracker.state(),
        )
        folder = save_checkpoint(
            self.run.checkpoints, self.state, write, self.config.trainer.keep_checkpoints
        )
        if self.asynchronous is None:
            # A resumed run computes keys and values anew, which rounds otherwise than those cached.
            self.cluster.drop_cache()
        return folder

    def export(self) -> Path:
        """Write the Hugging Face folder of the finished model."""
        self.progress.stage("exporting the model")
        self.cluster.on_learners("export_hf", str(self.run.export))
        return self.run.export

    def summary(self, after: Mapping[str, float]) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return {
            "experiment": self.run.experiment,
            "run_id": self.run.run_id,
            "seed": self.config.seed,
            "steps": self.state.step,
            "before": dict(self.state.before),
            "after": dict(after),
            "seconds": self.state.seconds + self._seconds_since_last_look(),
            "digest": self.state.digest,
            "model": str(self.run.export),
            "versions": package_versions(),
            **({"pipeline": self.asynchronous.summary()} if self.asynchronous else {}),
        }

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time of a part of the step to ``timing_s/<name>``."""
        began = time.monotonic()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.monotonic() - began

    def _seconds_since_last_look(self) -> float:
        now = time.monotonic()
        spent, self.last_look = now - self.last_look, now
        return spent


def _why_skipped(batch: StepBatch | SegmentBatch, trees: Sequence[TokenTree]) -> str:
    if not batch.kept:
        return f"{batch.why_nothing_is_kept}, so there is nothing to learn"
    if not trees:
        return "no response is trained on"
    return "every advantage is 0, so there is nothing to learn"
