"""Where a fallback cuts a finished response.

A rule is a function ``rule(response, draw, settings) -> kept``: how many of the response's n tokens
stay, 0 (from the prompt) to n - 1; ``draw`` is uniform in (0, 1). Rules but ``segment`` may cut
inside a segment, which the strategy then splits in two.
"""

from __future__ import annotations

import numpy as np

from rollout.strategies.branching import SCORE_GRID
from rollout.strategies.fallback import Ended
from rollout.strategies.settings import TreePOSettings


def segment(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """A uniformly random border of its segments, the prompt's end included: the paper's rule."""
    return response.borders[int(draw * len(response.borders))]


def from_start(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """From the prompt."""
    return 0


def lowest_logprob(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """Before the token of the lowest log-prob, the first of several that differ by no more than
    their rounding in a batch (``SCORE_GRID``).
    """
    return int(np.argmin(np.round(response.logprobs / SCORE_GRID)))


def block_softmax(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """Before a block of ``block_length`` tokens, drawn by softmax(x), x the mean log-prob of its
    tokens: confident blocks are drawn again. The last block may be shorter.
    """
    return _softmax_block(response, draw, settings, sign=1.0)


def block_softmax_inverse(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """The same by softmax(-x): uncertain blocks are drawn again."""
    return _softmax_block(response, draw, settings, sign=-1.0)


def misaligned(response: Ended, draw: float, settings: TreePOSettings) -> int:
    """A uniformly random multiple of ``block_length``, which is no multiple of the segments' length
    (the paper: 512 on segments of 1024), 0 included.
    """
    block = settings.block_length()
    return block * int(draw * -(-response.num_tokens // block))


def _softmax_block(response: Ended, draw: float, settings: TreePOSettings, sign: float) -> int:
    block = settings.block_length()
    starts = np.arange(0, response.num_tokens, block)
    sizes = np.diff([*starts, response.num_tokens])
    x = np.add.reduceat(response.logprobs.astype(np.float64), starts) / sizes
    weights = np.exp(sign * x - (sign * x).max())
    cumulative = np.cumsum(weights)
    chosen = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(starts[min(chosen, len(starts) - 1)])
