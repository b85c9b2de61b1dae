"""Flat sampling (GRPO): independent responses from one prompt, one segment each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rollout.extend import ExtendRequest, ExtendResult
from rollout.strategies.arena import (
    collect,
    drew_stop,
    extend_spec,
    leaves,
    prompt_segment,
    sampled_segment,
)
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings
from rollout.tree import EOS, TRUNCATED, Segment, Tree
from treepo.base.keys import child_key


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlatState:
    """Responses in the making.

    Attributes:
        segments: the prompt alone, until all responses are there.
        outstanding: requests without a result, by request id.
        received: results that wait for the others, by request id.
    """

    problem_id: str
    segments: tuple[Segment, ...]
    outstanding: tuple[ExtendRequest, ...]
    received: tuple[ExtendResult, ...] = ()


class Flat:
    """``settings.n`` responses from the prompt, each one segment of at most
    ``settings.max_response_length`` tokens.
    """

    Settings = FlatSettings

    def __init__(self, settings: FlatSettings) -> None:
        self.settings = settings

    def start(self, prompt: Prompt) -> tuple[FlatState, list[ExtendRequest]]:
        spec = extend_spec(self.settings, self.settings.max_response_length)
        requests = [
            ExtendRequest(
                request_id=ordinal,
                parent=0,
                path_key=child_key(prompt.root_key, ordinal),
                level=1,
                spec=spec,
            )
            for ordinal in range(self.settings.n)
        ]
        state = FlatState(
            problem_id=prompt.problem_id,
            segments=(prompt_segment(prompt),),
            outstanding=tuple(requests),
        )
        return state, requests

    def advance(
        self, state: FlatState, results: Sequence[ExtendResult]
    ) -> tuple[FlatState, list[ExtendRequest]]:
        outstanding, received = collect(state.outstanding, state.received, results)
        if outstanding:
            return replace(state, outstanding=outstanding, received=received), []
        arena = (*state.segments, *map(_response, received))
        return replace(state, segments=arena, outstanding=(), received=()), []

    def tree(self, state: FlatState) -> Tree | None:
        return None if state.outstanding else self.finished_part(state)

    def finished_part(self, state: FlatState) -> Tree:
        """The responses that are finished, as a tree."""
        segments = (*state.segments, *map(_response, state.received))
        return Tree(
            problem_id=state.problem_id,
            segments=segments,
            leaves=leaves(segments),
            temperature=self.settings.temperature,
        )


def _response(result: ExtendResult) -> Segment:
    return sampled_segment(result, EOS if drew_stop(result) else TRUNCATED)
