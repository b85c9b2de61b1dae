"""The record that leaves the rollout room: one prompt's token tree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

# Why a trajectory ended, in the field's words. Every leaf has one of these as its finish reason.
EOS = "eos"  # an end-of-sequence token was drawn
ANSWER = "answer"  # a complete answer was seen and the policy ends there
TRUNCATED = "length"  # the response length limit
DEPTH = "depth"  # TreePO's maximum depth
REPETITION = "repetition"
FINISH_REASONS = (EOS, ANSWER, TRUNCATED, DEPTH, REPETITION)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """A run of tokens without a fork inside. Arrays are [n], n >= 0.

    Attributes:
        parent: index in ``Tree.segments``, always smaller than the segment's own; -1 for the root
            (the prompt).
        level: TreePO's segment level, 0 for the prompt; not changed by radix splits, cuts or
            version changes. The pieces of a segment that a fallback cut inside have its level, and
            so has what was sampled in place of the later piece.
        path_key: names every random draw of the segment, with the position. Pieces of a cut segment
            share it.
        token_ids: int32.
        logprobs: float32, of each token under softmax(logits / temperature); zeros where not
            sampled.
        sampling_logprobs: float32, under the behaviour policy (after top-p and the rest); zeros
            where not sampled.
        sampled: False for prompt and forced tokens, which are never trained.
        policy_versions: int32, of the weights that drew each token; zeros where not sampled.
        finish_reason: one of ``FINISH_REASONS`` for a trajectory's last segment, "" inside.
    """

    parent: int
    level: int
    path_key: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    sampling_logprobs: np.ndarray
    sampled: bool
    policy_versions: np.ndarray
    finish_reason: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeCounters:
    """What happened while the tree grew."""

    branches: int = 0  # forks that added a path
    fallbacks: int = 0  # paths restarted from a finished leaf's prefix
    restarts: int = 0  # of these, from the prompt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tree:
    """One prompt's sampled tree: an arena of segments in topological order and the list of leaves.

    Attributes:
        problem_id: of the ``Problem`` it answers.
        segments: ``segments[0]`` is the prompt.
        leaves: indices of the last segments of trajectories, ascending. The path from the root to a
            leaf is a trajectory.
        temperature: that all segments were sampled with.
    """

    problem_id: str
    segments: tuple[Segment, ...]
    leaves: tuple[int, ...]
    temperature: float
    counters: TreeCounters = field(default_factory=TreeCounters)

    def path(self, index: int) -> list[int]:
        """Arena indices from the root to segment ``index``, both included."""
        indices = []
        while index >= 0:
            indices.append(index)
            index = self.segments[index].parent
        return indices[::-1]

    def path_token_ids(self, index: int, *, with_prompt: bool = True) -> np.ndarray:
        """Token ids (int32) from the root, or from the first segment below it, to the end of
        segment ``index``.
        """
        path = self.path(index)
        parts = [self.segments[i].token_ids for i in (path if with_prompt else path[1:])]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    @property
    def num_leaves(self) -> int:
        return len(self.leaves)

    def pruned(self) -> Tree:
        """The tree without the segments that no leaf's path uses, in the same order."""
        used = sorted({0}.union(*(self.path(leaf) for leaf in self.leaves)))
        place = {index: i for i, index in enumerate(used)}
        segments = (self.segments[index] for index in used)
        return replace(
            self,
            segments=tuple(replace(s, parent=place.get(s.parent, -1)) for s in segments),
            leaves=tuple(place[leaf] for leaf in self.leaves),
        )

    def same_tokens(self, other: Tree) -> bool:
        """Whether both trees have the same shape, path keys, tokens and finish reasons (log-probs
        may differ in rounding).
        """
        if self.leaves != other.leaves or len(self.segments) != len(other.segments):
            return False
        return all(
            (a.parent, a.level, a.path_key, a.sampled, a.finish_reason)
            == (b.parent, b.level, b.path_key, b.sampled, b.finish_reason)
            and np.array_equal(a.token_ids, b.token_ids)
            for a, b in zip(self.segments, other.segments, strict=True)
        )


def num_unique_tokens(tree: Tree) -> int:
    """Tokens of a tree from which another token was predicted, each counted once: what must at
    least be forwarded to grow it without a cache from earlier trees.
    """
    has_next = {segment.parent for segment in tree.segments if segment.num_tokens}
    total = 0
    for index, segment in enumerate(tree.segments):
        if segment.num_tokens:
            total += segment.num_tokens - (0 if _is_continued(tree, index, has_next) else 1)
    return total


def _is_continued(tree: Tree, index: int, has_next: set[int]) -> bool:
    """Whether some segment with tokens follows, perhaps after empty ones."""
    if index in has_next:
        return True
    empty = [i for i, s in enumerate(tree.segments) if s.parent == index and not s.num_tokens]
    return any(_is_continued(tree, i, has_next) for i in empty)
