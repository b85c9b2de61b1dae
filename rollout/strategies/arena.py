"""What the built-in strategies share: a growing arena of segments and the book of outstanding
requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rollout.extend import STOP, ExtendRequest, ExtendResult, ExtendSpec
from rollout.strategies.base import Prompt
from rollout.strategies.settings import SamplingSettings
from rollout.tree import Segment


def prompt_segment(prompt: Prompt) -> Segment:
    """The root of an arena."""
    token_ids = np.asarray(prompt.token_ids, dtype=np.int32)
    assert token_ids.ndim == 1 and len(token_ids) >= 1, f"prompt of shape {token_ids.shape}"
    zeros = np.zeros(len(token_ids), dtype=np.float32)
    return Segment(
        parent=-1,
        level=0,
        path_key=prompt.root_key,
        token_ids=token_ids,
        logprobs=zeros,
        sampling_logprobs=zeros,
        sampled=False,
        policy_versions=np.zeros(len(token_ids), dtype=np.int32),
    )


def sampled_segment(result: ExtendResult, finish_reason: str) -> Segment:
    """The segment that a result adds to the arena."""
    request = result.request
    return Segment(
        parent=request.parent,
        level=request.level,
        path_key=request.path_key,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        sampling_logprobs=result.sampling_logprobs,
        sampled=True,
        policy_versions=result.policy_versions,
        finish_reason=finish_reason,
    )


def path(segments: Sequence[Segment], index: int) -> list[int]:
    """Arena indices from the root to ``index``, both included."""
    indices = []
    while index >= 0:
        indices.append(index)
        index = segments[index].parent
    return indices[::-1]


def response_length(segments: Sequence[Segment], index: int) -> int:
    """Tokens below the prompt on the path to ``index``."""
    return sum(segments[i].num_tokens for i in path(segments, index)[1:])


def response_token_ids(segments: Sequence[Segment], index: int) -> np.ndarray:
    """The tokens below the prompt on the path to ``index``, int32."""
    parts = [segments[i].token_ids for i in path(segments, index)[1:]]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def response_logprobs(segments: Sequence[Segment], index: int) -> np.ndarray:
    """Log-probs of the tokens below the prompt on the path to ``index``, float32."""
    parts = [segments[i].logprobs for i in path(segments, index)[1:]]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def leaves(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Arena indices of finished trajectories' last segments, ascending."""
    return tuple(i for i, segment in enumerate(segments) if segment.finish_reason)


def heads(segments: Sequence[Segment]) -> set[int]:
    """Arena indices of pieces of a cut segment that another piece of it follows."""
    return {
        segment.parent
        for segment in segments[1:]
        if segment.path_key == segments[segment.parent].path_key
    }


def num_forks(segments: Sequence[Segment]) -> Counter[int]:
    """How many segments were asked for below each path key. The pieces of a cut segment have one
    key and count their children together, so that all children's keys differ.
    """
    parent_keys = [(segments[s.parent].path_key, s.path_key) for s in segments[1:]]
    return Counter(parent for parent, own in parent_keys if parent != own)


def place_of(segments: Sequence[Segment], leaf: int, kept: int) -> tuple[int, int]:
    """Where the first ``kept`` tokens of a response end: (arena index, tokens of that segment that
    belong to them).
    """
    left = kept
    root, *below = path(segments, leaf)
    if kept == 0:
        return root, segments[root].num_tokens
    for index in below:
        if left <= segments[index].num_tokens:
            return index, left
        left -= segments[index].num_tokens
    raise AssertionError(f"kept={kept} is more than the response")


def cut(
    segments: Sequence[Segment], places: Sequence[tuple[int, int]]
) -> tuple[tuple[Segment, ...], list[int]]:
    """Split segments so that one ends at each of ``places`` (arena index, tokens of it, >= 1).

    The pieces of a segment keep its path key and level: its draws were named by the key and the
    depth in tokens, which stay the same. The last piece keeps its children and finish reason.

    Returns:
        the arena, in topological order, and the index in it of the segment that ends at each place.
    """
    inner: dict[int, set[int]] = {}
    for index, offset in places:
        assert 1 <= offset <= segments[index].num_tokens, f"no token {offset} in segment {index}"
        if offset < segments[index].num_tokens:
            inner.setdefault(index, set()).add(offset)
    arena: list[Segment] = []
    last: list[int] = []  # new index of each old segment's last piece
    ends: dict[tuple[int, int], int] = {}
    for index, segment in enumerate(segments):
        parent = last[segment.parent] if index else -1
        offsets = [0, *sorted(inner.get(index, ())), segment.num_tokens]
        for start, end in pairwise(offsets):
            ends[index, end] = len(arena)
            arena.append(_piece(segment, parent, start, end))
            parent = len(arena) - 1
        last.append(parent)
    return tuple(arena), [ends[place] for place in places]


def _piece(segment: Segment, parent: int, start: int, end: int) -> Segment:
    return replace(
        segment,
        parent=parent,
        token_ids=segment.token_ids[start:end],
        logprobs=segment.logprobs[start:end],
        sampling_logprobs=segment.sampling_logprobs[start:end],
        policy_versions=segment.policy_versions[start:end],
        finish_reason=segment.finish_reason if end == segment.num_tokens else "",
    )


def extend_spec(
    settings: SamplingSettings,
    max_tokens: int,
    num_response_tokens: int = 0,
    *,
    wants_entropy: bool = False,
) -> ExtendSpec:
    """One segment by a strategy's settings.

    Args:
        num_response_tokens: of the response above the segment.
    """
    return ExtendSpec(
        max_tokens=max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        ban_token_ids=tuple(settings.ban_token_ids),
        stop_token_ids=tuple(settings.stop_token_ids),
        stop_token_sequences=tuple(map(tuple, settings.stop_token_sequences)),
        stop_strings=tuple(settings.stop_strings),
        num_response_tokens=num_response_tokens,
        wants_entropy=wants_entropy,
    )


def drew_stop(result: ExtendResult) -> bool:
    """Whether the segment ends with a stop, be it its only token or the last that fitted."""
    spec = result.request.spec
    last_is_stop = len(result.token_ids) > 0 and int(result.token_ids[-1]) in spec.stop_token_ids
    stopped = last_is_stop or result.finish_reason == STOP
    assert not stopped or last_is_stop or spec.stop_token_sequences or spec.stop_strings, (
        "a segment stopped without a stop"
    )
    return stopped


def collect(
    outstanding: tuple[ExtendRequest, ...],
    received: tuple[ExtendResult, ...],
    results: Sequence[ExtendResult],
) -> tuple[tuple[ExtendRequest, ...], tuple[ExtendResult, ...]]:
    """Book results: what is still outstanding, and all received so far by request id, so that the
    order of arrival leaves no trace.
    """
    waiting = {request.request_id: request for request in outstanding}
    for result in results:
        request = waiting.pop(result.request.request_id, None)
        assert request is not None, f"unasked result of request {result.request.request_id}"
        assert request == result.request, f"altered request {request.request_id}"
        assert len(result.token_ids) <= request.spec.max_tokens, "longer than was asked"
    booked = sorted((*received, *results), key=lambda result: result.request.request_id)
    return tuple(waiting.values()), tuple(booked)
