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

How a budget is shared, how large it is, which trajectories are cut and where are named rules
(``rollout.strategies.rule_settings``). A cut inside a segment of level j splits it in two pieces of
its level; what is sampled below the first has level j too, and the full length of a segment. So a
path's level is 1 + the number of whole segments above, ``max_depth`` limits the level, and a path
may have a segment's length more tokens than depth x segment_length, never more than
``max_response_length``.

All decisions of a level are taken at once, when it is complete, from path keys: the tree does not
depend on the order or grouping in which results arrive. Other prompts are never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rollout.extend import ExtendRequest, ExtendResult
from rollout.strategies.arena import (
    collect,
    cut,
    drew_stop,
    extend_spec,
    heads,
    leaves,
    num_forks,
    path,
    place_of,
    prompt_segment,
    response_length,
    response_logprobs,
    response_token_ids,
    sampled_segment,
)
from rollout.strategies.base import Prompt
from rollout.strategies.branching import ActivePath, level_budget
from rollout.strategies.budgets import Tally
from rollout.strategies.fallback import COPIES, Ended
from rollout.strategies.finish import answer_detectors, is_repetitive
from rollout.strategies.rule_settings import BRANCHINGS, BUDGETS, FALLBACK_CUTS, FALLBACKS
from rollout.strategies.settings import NO_FALLBACK, TreePOSettings
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
    """Grows trees of ``settings.n`` leaves (fewer only if the fallback is 'none' or the budget
    'response_tokens').

    Raises:
        ValueError: settings that name an unknown rule or lack an answer detector.
    """

    Settings = TreePOSettings

    def __init__(self, settings: TreePOSettings) -> None:
        self.settings = settings
        self._detectors = answer_detectors(settings)
        self._branching = BRANCHINGS.get(settings.branching)
        self._reads_entropy = bool(getattr(self._branching, "reads_entropy", False))
        self._budget = BUDGETS.get(settings.budget)
        no_fallback = settings.fallback == NO_FALLBACK
        self._chooser = None if no_fallback else FALLBACKS.get(settings.fallback)
        self._cut = FALLBACK_CUTS.get(settings.fallback_cut)

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
        return self._next_level(state, received)

    def tree(self, state: TreePOState) -> Tree | None:
        return None if state.outstanding else self._tree(state)

    def finished_part(self, state: TreePOState) -> Tree:
        """The trajectories that ended in complete levels, as a tree. They stay leaves of the
        finished tree under the same path keys; a fallback may cut them, and go on from there.
        """
        return self._tree(state).pruned()

    def _tree(self, state: TreePOState) -> Tree:
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
        self, state: TreePOState, level: Sequence[ExtendResult]
    ) -> tuple[TreePOState, list[ExtendRequest]]:
        """Decide what follows a complete level: ``level`` gave the last segments of the arena."""
        segments = state.segments
        new = range(len(segments) - len(level), len(segments))
        active = [i for i in new if not segments[i].finish_reason]
        if not active:
            return self._fall_back(state)
        finished = leaves(segments)
        budget = level_budget(
            active=len(active),
            finished=len(finished),
            finished_this_step=len(level) - len(active),
            width=self._width(segments, active, finished),
        )
        paths = [_active_path(segments, i, level[i - new[0]]) for i in active]
        copies = self._branching(paths, budget, self.settings)
        assert len(copies) == len(active) and sum(copies) == budget and min(copies) >= 1
        parents = [i for i, k in zip(active, copies, strict=True) for _ in range(k)]
        branches = state.counters.branches + budget - len(active)
        counters = replace(state.counters, branches=branches)
        return self._ask(replace(state, counters=counters), parents)

    def _width(
        self, segments: Sequence[Segment], active: Sequence[int], finished: Sequence[int]
    ) -> int:
        """How many leaves the tree may have."""
        lengths = [response_length(segments, leaf) for leaf in finished]
        ongoing = [response_length(segments, i) for i in active] or lengths
        tally = Tally(
            finished=len(finished),
            finished_tokens=sum(lengths),
            mean_length=sum(ongoing) / len(ongoing),
        )
        return min(self.settings.n, self._budget(tally, self.settings))

    def _fall_back(self, state: TreePOState) -> tuple[TreePOState, list[ExtendRequest]]:
        """Nothing is active: go on where leaves are missing, or end."""
        finished = leaves(state.segments)
        missing = self._width(state.segments, (), finished) - len(finished)
        if missing <= 0 or self._chooser is None:
            return state, []
        responses = [self._ended(state.segments, leaf) for leaf in finished]
        chosen = self._chooser(responses, state.fallback_rounds)[: -(-missing // COPIES)]
        if chosen:
            segments, cuts = self._cut_at(state.segments, chosen, state.fallback_rounds)
            state = replace(state, segments=segments)
            parents = [index for index in cuts for _ in range(COPIES)][:missing]
        else:
            parents = [0] * min(missing, state.initial_divergence)
        counters = replace(
            state.counters,
            fallbacks=state.counters.fallbacks + len(parents),
            restarts=state.counters.restarts + parents.count(0),
        )
        state = replace(state, counters=counters, fallback_rounds=state.fallback_rounds + 1)
        return self._ask(state, parents)

    def _cut_at(
        self, segments: tuple[Segment, ...], chosen: Sequence[Ended], round: int
    ) -> tuple[tuple[Segment, ...], list[int]]:
        """The arena with a segment's end where each chosen response is cut, and its index."""
        places = []
        for response in chosen:
            kept = self._cut(response, response.draw(round), self.settings)
            assert 0 <= kept < response.num_tokens, f"a cut at {kept} of {response.num_tokens}"
            places.append(place_of(segments, response.leaf, kept))
        return cut(segments, places)

    def _ended(self, segments: tuple[Segment, ...], leaf: int) -> Ended:
        borders = [response_length(segments, index) for index in path(segments, leaf)[:-1]]
        return Ended(
            leaf=leaf,
            path_key=segments[leaf].path_key,
            logprobs=response_logprobs(segments, leaf),
            borders=tuple(borders),
            is_complete=self._may_be_cut(segments, leaf),
        )

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
        forks, unfinished = num_forks(segments), heads(segments)
        requests = []
        for request_id, parent in enumerate(parents, start=state.next_request_id):
            above = response_length(segments, parent)
            room = settings.max_response_length - above
            key = segments[parent].path_key
            spec = extend_spec(
                settings,
                min(settings.segment_length, room),
                above,
                wants_entropy=self._reads_entropy,
            )
            requests.append(
                ExtendRequest(
                    request_id=request_id,
                    parent=parent,
                    path_key=child_key(key, forks[key]),
                    level=segments[parent].level + (parent not in unfinished),
                    spec=spec,
                )
            )
            forks[key] += 1
        state = replace(
            state,
            outstanding=tuple(requests),
            next_request_id=state.next_request_id + len(requests),
        )
        return state, requests


def _active_path(segments: Sequence[Segment], index: int, result: ExtendResult) -> ActivePath:
    segment = segments[index]
    return ActivePath(
        path_key=segment.path_key,
        level=segment.level,
        logprobs=response_logprobs(segments, index),
        segment_logprobs=segment.logprobs,
        segment_entropy=result.entropy,
    )
