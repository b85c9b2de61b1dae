"""The one-step off-policy pipeline: while the learner makes an update, the engines draw the next
step's batch under the weights from before it.

A step learns from the batch that is there, draws the next one meanwhile, and publishes the new
weights when both are done. So from the second step on every token is one version old when it trains
(0 after a step that made none; trees in segments as much older as in the synchronous pipeline), and
a run is as reproducible as a synchronous one: which weights draw what does not depend on who is
faster. The batch that waits is a part of the checkpoint. The last step draws none; a run that is
continued beyond it with more steps begins like a new one, with a batch of the newest weights.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from treepo.dynamic_sampling import StepBatch
from treepo.saved_record import Layout
from treepo.segmented import SegmentBatch

if TYPE_CHECKING:
    from treepo.lesson import Lesson
    from treepo.session import Session

AHEAD_FILE = "ahead.pkl"  # in a checkpoint's folder
_LAYOUT = Layout(name="batches ahead", version=1, kinds=(StepBatch, SegmentBatch))
dump_ahead, load_ahead = _LAYOUT.dump, _LAYOUT.load


def one_step(session: Session) -> dict[str, float]:
    """Learn from the batch ahead while the next one is drawn. Advances the session's state.

    Returns:
        The step's metrics: of the batch that was learned from, not of the one that was drawn.
    """
    step, version = session.state.step + 1, session.state.policy_version
    began = time.monotonic()
    batch = session.ahead or session.draw(trains_at=version)
    metrics = session.describe(batch)
    lesson = session.prepare(step, batch.kept)
    session.write_trees(step, batch.settled, lesson)
    update = _Update(session, lesson) if lesson.mini_batches else None
    session.advance(batch)
    session.ahead = None
    if step < session.config.trainer.total_steps:
        session.ahead = session.draw(trains_at=version + (update is not None))
    if update is None:
        metrics |= session.skip(step, batch, lesson)
    else:
        session.progress.stage("learning")
        metrics |= session.accept(step, lesson, update.wait())
        session.progress.stage("publishing weights")
        metrics |= session.publish()
    seconds = time.monotonic() - began
    for side, part in (("rollout", "gen"), ("learner", "update_actor")):
        metrics[f"pipeline/{side}_idle_frac"] = 1 - session.timings.get(part, 0.0) / seconds
    return metrics


class _Update:
    """An update that runs on the learner while this process does something else."""

    def __init__(self, session: Session, lesson: Lesson) -> None:
        self._session, self._began = session, time.monotonic()
        self._ended: list[float] = []
        version = session.state.policy_version
        self._calls = session.cluster.begin_update(lesson.mini_batches, version)
        for call in self._calls[: len(lesson.mini_batches)]:  # the learner's, by rank
            call.ref.future().add_done_callback(lambda _: self._ended.append(time.monotonic()))

    def wait(self) -> dict[str, float]:
        """Its metrics, when it has ended; notes how long the learner took."""
        answers = self._session.cluster.all_answers(self._calls)
        ended = max(self._ended, default=time.monotonic())
        self._session.timings["update_actor"] = ended - self._began
        return answers[0]
