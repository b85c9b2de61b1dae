"""How responses are sampled in segments over several steps: a plain dataclass, checked when it is
built (UloRL, arXiv 2507.19766, Algorithm 1; what it does is in ``treepo/pools.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from treepo.base.typed import check_types
from treepo.checks_of_settings import require_one_of

REFILLS = ("constant", "keep_in_flight", "to_target")
GROUP_POLICIES = ("wait_all", "finished_part")
TRAIN_ON = ("all", "full_batch")
ON_STALE = ("finish", "drop")
SUBMIT = ("in_order", "longest_first")


@dataclass
class SegmentSettings:
    """Segmented rollout with a pool of unfinished trees and one of experience."""

    # tokens that a path grows by in one step, under one set of weights; then it is put aside and
    # goes on in the next. 0: whole responses at once. UloRL: 16,384 of 131,072, so 8 segments. Not
    # rollout.segment_length, at whose multiples TreePO's trees fork
    segment_length: int = 0
    # a step ends when so many trees are done, of however many are in flight; what is cut goes on in
    # the next (APRIL, arXiv 2509.18521). 0: all grow by segment_length
    stop_when_finished: int = 0
    # which trees a step serves first: 'in_order', the oldest; or 'longest_first', by what the run
    # has seen of lengths, so that few are left at the end of a step
    submit: str = "in_order"
    # how many new prompts a step begins. 'constant': trainer.train_batch_size; 'keep_in_flight': as
    # many as prompts_in_flight lacks; 'to_target': as many as are likely to bring
    # trainer.train_batch_size finished groups, by the share that finished in the step before, at
    # most trainer.train_batch_size
    refill: str = "constant"
    prompts_in_flight: int = 0  # with keep_in_flight; 0: 2 x trainer.train_batch_size
    # 'wait_all': a group trains when all its responses are done; 'finished_part': its finished
    # responses train as soon as min_finished of them are new, the others later
    group_policy: str = "wait_all"
    min_finished: int = 0  # with finished_part; 0: half of rollout.n
    # what an update takes from the experience pool: 'all', or 'full_batch':
    # trainer.train_batch_size groups, the oldest first, and none before so many are there
    train_on: str = "all"
    # most new versions of the weights (one a step that made an update) between a token and its
    # training; 0: no cap
    max_staleness: int = 0
    # what happens to a prompt that would exceed it: 'finish': the step grows its tree to the end,
    # or trains on it at once; 'drop': it is given up and begun anew
    on_stale: str = "finish"

    def __post_init__(self) -> None:
        check_types(self, "trainer.segments.")
        for name in (
            *("segment_length", "stop_when_finished"),
            *("prompts_in_flight", "min_finished", "max_staleness"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.segments.{name}={getattr(self, name)}: it must be >= 0")
        for name, allowed in (
            ("submit", SUBMIT),
            ("refill", REFILLS),
            ("group_policy", GROUP_POLICIES),
            ("train_on", TRAIN_ON),
            ("on_stale", ON_STALE),
        ):
            require_one_of(f"trainer.segments.{name}", getattr(self, name), allowed)
        if not self.segment_length:
            for field in fields(self):
                self._unused(field.name, "segment_length=0", "segment_length > 0")
        if self.refill != "keep_in_flight":
            self._unused("prompts_in_flight", f"refill={self.refill!r}", "refill='keep_in_flight'")
        if self.group_policy != "finished_part":
            self._unused(
                "min_finished", f"group_policy={self.group_policy!r}",
                "group_policy='finished_part'",
            )  # fmt: skip
        if not self.max_staleness:
            self._unused("on_stale", "max_staleness=0, which sets no cap", "max_staleness > 0")

    @property
    def is_on(self) -> bool:
        return self.segment_length > 0

    def num_segments(self, max_response_length: int) -> int:
        """Segments of the longest response."""
        return -(-max_response_length // self.segment_length) if self.is_on else 1

    def in_flight(self, batch_size: int) -> int:
        """Unfinished trees that 'keep_in_flight' keeps. ``batch_size``: prompts an update."""
        return self.prompts_in_flight or 2 * batch_size

    def check_against(self, *, n: int, max_response_length: int, batch_size: int) -> None:
        """
        Args:
            n: responses a prompt.
            max_response_length: in tokens: the limit over all segments.
            batch_size: prompts an update.

        Raises:
            ValueError: a segment longer than a response, a floor above the group's size, or a
                number of finished trees that is never reached, or less than what is begun.
        """
        self._check_stop(batch_size)
        if self.segment_length > max_response_length:
            raise ValueError(
                f"trainer.segments.segment_length={self.segment_length} is more than "
                f"rollout.max_response_length={max_response_length}, the limit over all segments: "
                "lower the one, raise the other, or set trainer.segments.segment_length=0 for "
                "whole responses"
            )
        if self.min_finished > n:
            raise ValueError(
                f"trainer.segments.min_finished={self.min_finished} is more than rollout.n={n} "
                f"responses a prompt: set it to {n} at most (0: half of them)"
            )

    def _check_stop(self, batch_size: int) -> None:
        stop = self.stop_when_finished
        if not stop:
            return
        where = f"trainer.segments.stop_when_finished={stop}"
        if self.refill != "keep_in_flight" and stop < batch_size:
            raise ValueError(
                f"{where} ends fewer trees a step than trainer.segments.refill={self.refill!r} "
                f"begins (trainer.train_batch_size={batch_size}), so ever more would wait: set "
                f"trainer.segments.refill=keep_in_flight, or stop_when_finished to {batch_size} or "
                "more"
            )
        if self.submit == "longest_first" and not self.max_staleness:
            raise ValueError(
                f"{where} with trainer.segments.submit='longest_first' may cut every step before "
                "the turn of a tree that is nearly done: set trainer.segments.max_staleness, to 4 "
                "say, or submit=in_order"
            )
        most = self.in_flight(batch_size)
        if self.refill == "keep_in_flight" and stop >= most:
            raise ValueError(
                f"{where} leaves nothing to cut, as {most} trees are in flight "
                "(trainer.segments.prompts_in_flight): lower it, or raise prompts_in_flight"
            )

    def _unused(self, name: str, choice: str, better: str) -> None:
        if getattr(self, name) != type(self).__dataclass_fields__[name].default:
            raise ValueError(
                f"trainer.segments.{name}={getattr(self, name)!r} is not used with "
                f"trainer.segments.{choice}: set trainer.segments.{better}, or leave it out"
            )
