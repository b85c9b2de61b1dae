"""TreePO's segment-wise tree sampling (arXiv 2508.17445, section 2) as a state machine.

1. D paths leave the prompt (the initial divergence, fixed or drawn per prompt).
2. Every active path is extended by one segment. When all segments of the prompt's level are there,
   each path is classified: ended (end of sequence, repetition, answer, length, depth) or active.
   Ended paths are leaves, whatever their reward will be.
3. The active paths share a budget of paths (``branching.level_budget``), which hands what ended
   early on to the others; go to 2.
4. If no path is active and leaves are missing, ended trajectories that hold an answer or an end of
   sequence are cut at a random segment boundary and go on from there (the fallback); go to 2.
   Without any, new paths leave the prompt. This choice favours prefixes that end early, so leaves
   are neither independent nor drawn from the policy alone: a known bias of the method
   (``fallback='none'`` avoids it and returns fewer leaves).

All decisions of a level are taken at once, when it is complete, from path keys: the tree does not
depend on the order or grouping in which results arrive. Other prompts are never waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rollout.extend import ExtendRequest, ExtendResult
from rollout.strategies.arena import (
    collect,
    drew_stop,
    extend_spec,
    leaves,
    prompt_segment,
    response_length,
    response_token_ids,
    sampled_segment,
)
from rollout.strategies.base import Prompt
from rollout.strategies.branching import level_budget
from rollout.strategies.finish import answer_detectors, is_repetitive
from rollout.strategies.settings import BRANCHINGS, FALLBACKS, NO_FALLBACK, TreePOSettings
from rollout.tree import ANSWER, DEPTH, EOS, REPETITION, TRUNCATED, Segment, Tree, TreeCounters
from treepo.base.keys import Purpose, child_key, uniform


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TreePOState:
    """An unfinished (or finished) tree.

    Attributes:
        segments: the arena so far: all complete levels.
        outstanding: requests without a result, by request id.
        received: results of the level that is not complete yet, by request id.
        next_request_id: of the next request.
        initial_divergence: D, paths that leave the prompt at the start or in a restart.
        fallback_rounds: how often nothing was active and leaves were missing.
    """

    problem_id: str
    segments: tuple[Segment, ...]
    outstanding: tuple[ExtendRequest, ...] = ()
    received: tuple[ExtendResult, ...] = ()
    next_request_id: int = 0
    initial_divergence: int
    fallback_rounds: int = 0
    counters: TreeCounters = field(default_factory=TreeCounters)


class TreePO:
    """Grows trees of ``settings.n`` leaves (fewer only if the fallback is 'none').

    Raises:
        ValueError: settings that name an unknown rule or lack an answer detector.
    """

    Settings = TreePOSettings

    def __init__(self, settings: TreePOSettings) -> None:
        self.settings = settings
        self._detectors = answer_detectors(settings)
        self._branching = BRANCHINGS.get(settings.branching)
        no_fallback = settings.fallback == NO_FALLBACK
        self._fallback = None if no_fallback else FALLBACKS.get(settings.fallback)

    def start(self, prompt: Prompt) -> tuple[TreePOState, list[ExtendRequest]]:
        divergence = self._initial_divergence(prompt.root_key)
        state = TreePOState(
            problem_id=prompt.problem_id,
            segments=(prompt_segment(prompt),),
            initial_divergence=divergence,
            counters=TreeCounters(branches=divergence - 1),
        )
        return self._ask(state, [0] * divergence)

    def advance(
        self, state: TreePOState, results: Sequence[ExtendResult]
    ) -> tuple[TreePOState, list[ExtendRequest]]:
        outstanding, received = collect(state.outstanding, state.received, results)
        if outstanding:
            return replace(state, outstanding=outstanding, received=received), []
        segments = state.segments
        added = tuple(sampled_segment(r, self._finish_reason(segments, r)) for r in received)
        state = replace(state, segments=segments + added, outstanding=(), received=())
        return self._next_level(state, num_added=len(added))

    def tree(self, state: TreePOState) -> Tree | None:
        if state.outstanding:
            return None
        return Tree(
            problem_id=state.problem_id,
            segments=state.segments,
            leaves=leaves(state.segments),
            temperature=self.settings.temperature,
            counters=state.counters,
        )

    def _initial_divergence(self, root_key: int) -> int:
        low, high = self.settings.initial_divergence_min, self.settings.initial_divergence_max
        return low + int(uniform(root_key, 0, Purpose.DIVERGENCE) * (high - low + 1))

    def _finish_reason(self, segments: tuple[Segment, ...], result: ExtendResult) -> str:
        """Why the path ends with this segment; "" if it goes on."""
        settings, request = self.settings, result.request
        response = np.concatenate([response_token_ids(segments, request.parent), result.token_ids])
        if drew_stop(result):
            return ANSWER if settings.finish != "eos" and self._has_answer(response) else EOS
        if settings.repetition_count and is_repetitive(
            response, ngram=settings.repetition_ngram, count=settings.repetition_count
        ):
            return REPETITION
        if settings.finish == "boxed_as_eos" and self._has_answer(response):
            return ANSWER
        if len(response) >= settings.max_response_length:
            return TRUNCATED
        return DEPTH if request.level >= settings.max_depth else ""

    def _has_answer(self, response: np.ndarray) -> bool:
        return any(detector(response) for detector in self._detectors)

    def _next_level(
        self, state: TreePOState, *, num_added: int
    ) -> tuple[TreePOState, list[ExtendRequest]]:
        """Decide what follows a complete level, the last ``num_added`` segments of the arena."""
        segments = state.segments
        new = range(len(segments) - num_added, len(segments))
        active = [i for i in new if not segments[i].finish_reason]
        finished = leaves(segments)
        if active:
            budget = level_budget(
                active=len(active),
                finished=len(finished),
                finished_this_step=num_added - len(active),
                width=self.settings.n,
            )
            copies = self._branching(segments, active, budget)
            assert len(copies) == len(active) and sum(copies) == budget and min(copies) >= 1
            parents = [i for i, k in zip(active, copies, strict=True) for _ in range(k)]
            counters = state.counters
            counters = replace(counters, branches=counters.branches + budget - len(active))
            return self._ask(replace(state, counters=counters), parents)
        missing = self.settings.n - len(finished)
        if missing and self._fallback is not None:
            return self._fall_back(state, finished, missing)
        return state, []

    def _fall_back(
        self, state: TreePOState, finished: Sequence[int], missing: int
    ) -> tuple[TreePOState, list[ExtendRequest]]:
        assert self._fallback is not None
        candidates = [leaf for leaf in finished if self._may_be_cut(state.segments, leaf)]
        if candidates:
            parents = self._fallback(state.segments, candidates, missing, state.fallback_rounds)
            assert 1 <= len(parents) <= missing
        else:
            parents = [0] * min(missing, state.initial_divergence)
        counters = replace(
            state.counters,
            fallbacks=state.counters.fallbacks + len(parents),
            restarts=state.counters.restarts + parents.count(0),
        )
        state = replace(state, counters=counters, fallback_rounds=state.fallback_rounds + 1)
        return self._ask(state, parents)

    def _may_be_cut(self, segments: tuple[Segment, ...], leaf: int) -> bool:
        """Whether the trajectory holds an end of sequence or an answer."""
        if segments[leaf].finish_reason in (EOS, ANSWER):
            return True
        return bool(self._detectors) and self._has_answer(response_token_ids(segments, leaf))

    def _ask(
        self, state: TreePOState, parents: Sequence[int]
    ) -> tuple[TreePOState, list[ExtendRequest]]:
        """One request below each of ``parents`` (an index once for each path)."""
        segments, settings = state.segments, self.settings
        num_children = Counter(segment.parent for segment in segments)
        requests = []
        for request_id, parent in enumerate(parents, start=state.next_request_id):
            above = response_length(segments, parent)
            room = settings.max_response_length - above
            requests.append(
                ExtendRequest(
                    request_id=request_id,
                    parent=parent,
                    path_key=child_key(segments[parent].path_key, num_children[parent]),
                    level=segments[parent].level + 1,
                    spec=extend_spec(settings, min(settings.segment_length, room), above),
                )
            )
            num_children[parent] += 1
        state = replace(
            state,
            outstanding=tuple(requests),
            next_request_id=state.next_request_id + len(requests),
        )
        return state, requests
