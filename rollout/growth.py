"""Unfinished trees as records: what was drawn of a tree, and what is still asked for.

A tree can be served in pieces, over several calls (``rollout.scheduler.grow``): a strategy asks for
segments as ever, and a request that is cut short is put aside with what it has drawn. As draws are
named by path key and depth, a tree grown in pieces under constant weights has exactly the tokens of
one grown at once.

With flat sampling this is partial rollout: Kimi k1.5 (arXiv 2501.12599, section 2.6.2), UloRL's
segment rollout (arXiv 2507.19766, Algorithm 1: ``segment_length``) and APRIL (arXiv 2509.18521:
``stop_when_finished``). A Growth holds no keys and values, so it may be kept in a file and go on in
another process, under other weights.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.extend import ExtendRequest, ExtendResult
from treepo.base.typed import check_types

if TYPE_CHECKING:  # the settings above load without torch
    from rollout.requests import Completion

_DRAWN = (
    *("token_ids", "logprobs", "sampling_logprobs", "policy_versions"),
    *("entropy", "top_token_ids", "top_logprobs"),
)
_FORMAT = 1  # of what ``dump_growths`` writes


@dataclass
class GrowthLimits:
    """When a call ends though trees are unfinished.

    Raises:
        ValueError: a field is out of range.
    """

    # tokens that a path may grow by in one call; 0: no limit. What continues a path, a forked child
    # too, has what the path has left
    segment_length: int = 0
    # the call ends as soon as so many trees are finished; 0: when all are finished or at the limit
    stop_when_finished: int = 0

    def __post_init__(self) -> None:
        check_types(self, "growth limit ")
        for field in ("segment_length", "stop_when_finished"):
            value = getattr(self, field)
            if value < 0:
                raise ValueError(f"growth limit {field}={value}: it must be >= 0 (0 sets no limit)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Partial:
    """What was drawn of a requested segment, arrays [n] with 0 <= n < ``spec.max_tokens``; see
    ``rollout.extend.ExtendResult``.
    """

    request: ExtendRequest
    token_ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    sampling_logprobs: np.ndarray  # float32
    policy_versions: np.ndarray  # int32
    entropy: np.ndarray | None = None  # float32
    top_token_ids: np.ndarray | None = None  # int32 [n, num_top_logprobs]
    top_logprobs: np.ndarray | None = None  # float32 [n, num_top_logprobs]

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Growth:
    """An unfinished tree.

    Attributes:
        state: the strategy's own (``rollout.strategies.base``), with what was delivered to it.
        partials: one for each request that the strategy waits for, by request id; of a request that
            was not begun with no token.
    """

    problem_id: str
    state: Any
    partials: tuple[Partial, ...]

    @property
    def root_key(self) -> int:
        """The prompt's, which names the tree."""
        return self.state.segments[0].path_key

    @property
    def _parts(self) -> tuple[Any, ...]:
        """All that holds tokens; ``received`` is where the built-in strategies keep results."""
        received = getattr(self.state, "received", ())
        return (*self.state.segments, *received, *self.partials)

    @property
    def num_tokens(self) -> int:
        """Tokens of the tree so far, the prompt's and those of unfinished segments included."""
        return sum(len(part.token_ids) for part in self._parts)

    @property
    def checksum(self) -> int:
        """Of its tokens and how they are cut: differs from that of the tree further on."""
        found = 0
        for part in self._parts:
            found = zlib.crc32(b"%d" % len(part.token_ids), found)
            found = zlib.crc32(part.token_ids.tobytes(), found)
        return found


def nothing_drawn(request: ExtendRequest) -> Partial:
    """Of a request that was not begun."""
    spec, n = request.spec, request.spec.num_top_logprobs
    return Partial(
        request=request,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        sampling_logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
        entropy=np.zeros(0, np.float32) if spec.wants_entropy else None,
        top_token_ids=np.zeros((0, n), np.int32) if n else None,
        top_logprobs=np.zeros((0, n), np.float32) if n else None,
    )


def joined(partial: Partial, completion: Completion) -> Partial:
    """What was drawn of a segment and what a later request drew behind it."""
    if not partial.num_tokens:
        parts = {name: getattr(completion, name) for name in _DRAWN}
    else:
        parts = {
            name: None if before is None else np.concatenate([before, getattr(completion, name)])
            for name in _DRAWN
            for before in [getattr(partial, name)]
        }
    return Partial(request=partial.request, **parts)


def result(drawn: Partial, completion: Completion) -> ExtendResult:
    """The whole segment ``drawn``, whose last piece was ``completion``."""
    return ExtendResult(
        request=drawn.request,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        **{name: getattr(drawn, name) for name in _DRAWN},
    )


def dump_growths(growths: Sequence[Growth]) -> bytes:
    """For a checkpoint; ``load_growths`` reads it. Strategy states are pickled as they are."""
    records = [(growth.problem_id, growth.state, growth.partials) for growth in growths]
    return pickle.dumps((_FORMAT, records), protocol=5)


def load_growths(data: bytes) -> list[Growth]:
    """What ``dump_growths`` wrote. It is unpickled: read your own files alone.

    Raises:
        ValueError: it was written in another format.
    """
    found, records = pickle.loads(data)
    if found != _FORMAT:
        raise ValueError(
            f"unfinished trees in format {found}: this version reads format {_FORMAT}; go on with "
            "the version that wrote them, or start a new run"
        )
    return [Growth(problem_id=p, state=state, partials=parts) for p, state, parts in records]
