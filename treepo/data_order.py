"""In what order problems are trained on.

Every epoch is a shuffle of its own, a pure function of (seed, epoch). A position says what has been
consumed, is stored with every checkpoint, and gives the next batch again: so each problem is
consumed exactly once an epoch, over any crash and resume, whatever the batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from treepo.data import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPosition:
    """What has been consumed: the first ``offset`` problems of the epoch's shuffle, less
    ``deferred``.

    Attributes:
        epoch: number of shuffles used up.
        deferred: indices of problems that were passed over because the batch, begun in the epoch
            before, already held them, or given back; they come first in the next batch.
    """

    epoch: int = 0
    offset: int = 0
    deferred: tuple[int, ...] = ()

    @classmethod
    def of(cls, stored: DataPosition | Mapping[str, Any]) -> DataPosition:
        """A position, or what JSON made of one."""
        if isinstance(stored, DataPosition):
            return stored
        return cls(
            epoch=int(stored["epoch"]),
            offset=int(stored["offset"]),
            deferred=tuple(int(index) for index in stored.get("deferred", ())),
        )


class ProblemOrder:
    """Batches of problems by position.

    Raises:
        ValueError: no problems.
    """

    start = DataPosition()

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise ValueError("the training data holds no problems")
        self.problems = list(problems)
        self.seed = seed
        self._index = {problem.id: index for index, problem in enumerate(self.problems)}

    def next_batch(
        self,
        position: DataPosition | Mapping[str, Any],
        n: int,
        besides: Sequence[Problem] = (),
    ) -> tuple[list[Problem], DataPosition]:
        """The ``n`` different problems that follow ``position``, and the position after them.

        A batch may reach into the next epoch; a problem that it already holds is then deferred to
        the batch after.

        Args:
            besides: different problems that the batch adds to, and must not repeat.

        Raises:
            ValueError: a batch larger than the data, or a position that is not of this data.
        """
        here, size = DataPosition.of(position), len(self.problems)
        if n < 1 or n + len(besides) > size:
            raise ValueError(
                f"a batch of {n + len(besides)} problems cannot be drawn from {size}: set "
                f"trainer.train_batch_size <= {size}, or provide more data"
            )
        if not 0 <= here.offset <= size or any(not 0 <= i < size for i in here.deferred):
            raise ValueError(
                f"data position {here} is not one of {size} problems: the data changed since the "
                "checkpoint was written"
            )
        epoch, offset, waiting = here.epoch, here.offset, list(here.deferred)
        held = {self._index[problem.id] for problem in besides}
        chosen: list[int] = []
        deferred: list[int] = []
        while len(chosen) < n:
            if waiting:
                index = waiting.pop(0)
            else:
                if offset == size:
                    epoch, offset = epoch + 1, 0
                index = int(shuffle(self.seed, epoch, size)[offset])
                offset += 1
            if index in held:
                deferred.append(index)
            else:
                chosen.append(index)
                held.add(index)
        after = DataPosition(epoch=epoch, offset=offset, deferred=(*deferred, *waiting))
        return [self.problems[index] for index in chosen], after

    def give_back(self, position: DataPosition, problems: Sequence[Problem]) -> DataPosition:
        """The position when ``problems`` are not consumed after all: they come first in the next
        batch.
        """
        indices = (self._index[problem.id] for problem in problems)
        return replace(position, deferred=(*indices, *position.deferred))


@functools.lru_cache(maxsize=4)
def shuffle(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of ``range(size)`` for one epoch, int64 [size]."""
    return np.random.Generator(np.random.PCG64([seed, epoch, 0xDA7A])).permutation(size)
