"""What a step samples, on the session's workers: whole trees of new problems, or one segment more
of all that is unfinished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rollout.growth import Growth, GrowthLimits
from rollout.length_statistics import LengthStatistics
from rollout.metrics import CostLedger
from rollout.strategies.base import STRATEGIES
from rollout.tree import Tree
from treepo.data import Problem
from treepo.data_order import DataPosition
from treepo.dynamic_sampling import GenBatch, StepBatch, gather
from treepo.pools import Unfinished
from treepo.segmented import SegmentBatch, Servants, segmented_step
from treepo.step import make_prompts
from treepo.submission import expected_tokens

if TYPE_CHECKING:
    from treepo.session import Session


def draw_batches(session: Session, step: int, position: DataPosition) -> StepBatch:
    """Whole trees of one batch of problems, or of as many as dynamic sampling needs, judged."""
    config = session.config

    def draw(number: int, problems: list[Problem]) -> GenBatch:
        where = ("train", step, number) if number else ("train", step)
        prompts = make_prompts(problems, config.seed, *where)
        session.progress.stage("sampling trees")
        with session.clock("gen"):
            trees, ledger = session.cluster.sample(
                prompts, *session.strategy, session.state.policy_version
            )
        verdicts = session.judge(problems, trees, number)
        return GenBatch(problems=problems, trees=trees, verdicts=verdicts, ledger=ledger)

    size = config.trainer.train_batch_size
    return gather(draw, session.order, position, size, config.algorithm)


def finished_part_of(session: Session) -> Callable[[Growth], Tree] | None:
    """How to get the responses that an unfinished tree has finished, as a tree; None: the session's
    strategy cannot tell.
    """
    name, settings = session.strategy
    finished_part = getattr(STRATEGIES.get(name)(settings), "finished_part", None)
    return finished_part and (lambda growth: finished_part(growth.state))


def expectations(
    session: Session,
    growing: Sequence[Unfinished],
    lengths: LengthStatistics,
    segment_length: int,
    finished_part: Callable[[Growth], Tree] | None,
) -> list[float] | None:
    """What each tree is expected to draw, so that the longest can be served first; None: they are
    served as they come (``trainer.segments.submit``).
    """
    if session.config.trainer.segments.submit != "longest_first":
        return None
    return expected_tokens(
        growing,
        lengths,
        segment_length=segment_length,
        rollout=session.strategy[1],
        finished_part=finished_part,
    )


def draw_segments(
    session: Session, step: int, position: DataPosition, trains_at: int
) -> SegmentBatch:
    """One segment more of the session's unfinished trees and of new problems, and what the update
    takes from the experience pool.

    Args:
        trains_at: the policy version that this update starts from.
    """
    name, settings = session.strategy
    version, finished_part = session.state.policy_version, finished_part_of(session)

    def grow(
        growing: Sequence[Unfinished], limits: GrowthLimits
    ) -> tuple[list[Tree | Growth], CostLedger]:
        session.progress.stage("sampling segments")
        expected = expectations(
            session, growing, session.pools.lengths, limits.segment_length, finished_part
        )
        work = [entry.work for entry in growing]
        with session.clock("gen"):
            return session.cluster.grow(work, name, settings, version, limits, expected)

    return segmented_step(
        session.pools,
        position,
        step=step,
        version=version,
        trains_at=trains_at,
        order=session.order,
        config=session.config,
        rollout=settings,
        servants=Servants(
            prompts=lambda problems: make_prompts(problems, session.config.seed, "train", step),
            grow=grow,
            judge=session.judge,
            finished_part=finished_part,
        ),
    )
