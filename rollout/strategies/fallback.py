"""Which finished responses go on when all paths of a tree have ended before its width is reached
(TreePO, section 2.2). Where they are cut: ``rollout.strategies.fallback_cuts``.

A chooser is a function ``chooser(responses, round) -> responses``: those that may be cut, in the
order in which they are taken. Each is cut once in a round, and ``COPIES`` paths go on from there;
if that doesn't fill the width, the new paths branch as any others do, and a further round follows
when they have ended. Where a chooser offers none, new paths leave the prompt. ``round`` counts a
tree's fallbacks from 0 and keeps their draws apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treepo.base.keys import Purpose, draw_word, uniform

COPIES = 2  # paths that leave each cut


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ended:
    """A finished response of n >= 1 tokens.

    Attributes:
        leaf: arena index of its last segment.
        path_key: of its last segment.
        logprobs: float32 [n], of its tokens under softmax(logits / temperature).
        borders: tokens above each of its segments, ascending from 0: the cuts that split none.
        is_complete: whether it holds an answer or an end of sequence.
    """

    leaf: int
    path_key: int
    logprobs: np.ndarray
    borders: tuple[int, ...]
    is_complete: bool

    @property
    def num_tokens(self) -> int:
        return len(self.logprobs)

    def draw(self, round: int) -> float:
        """Uniform in (0, 1): where this response is cut in this round."""
        return uniform(self.path_key, 2 * round + 1, Purpose.FALLBACK)


def random(responses: Sequence[Ended], round: int) -> list[Ended]:
    """Complete responses in a random order, as the paper has it."""
    return sorted(_complete(responses), key=lambda response: _lot(response, round))


def finished_first(responses: Sequence[Ended], round: int) -> list[Ended]:
    """Complete responses in a random order, then those cut off by length, depth or repetition, also
    in a random order: there is no restart from the prompt.
    """
    return sorted(responses, key=lambda r: (not r.is_complete, _lot(r, round)))


def longer_first(responses: Sequence[Ended], round: int) -> list[Ended]:
    """Complete responses, the longest first, equally long ones in a random order."""
    return sorted(_complete(responses), key=lambda r: (-r.num_tokens, _lot(r, round)))


def _complete(responses: Sequence[Ended]) -> list[Ended]:
    return [response for response in responses if response.is_complete]


def _lot(response: Ended, round: int) -> tuple[int, int]:
    return draw_word(response.path_key, 2 * round, Purpose.FALLBACK), response.path_key
