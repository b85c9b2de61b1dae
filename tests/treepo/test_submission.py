"""What a step expects its trees to draw, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scored_trees import build, verdict
from some_problems import problems

from rollout.extend import LENGTH, STOP, ExtendResult
from rollout.growth import Growth, Partial
from rollout.length_statistics import PAUSED, LengthStatistics, Observation
from rollout.strategies.base import STRATEGIES, Prompt
from rollout.strategies.settings import FlatSettings, TreePOSettings
from rollout.tree import EOS, TRUNCATED
from treepo import async_schedule as schedule
from treepo.data_order import DataPosition, ProblemOrder
from treepo.pools import Group, Pools, Unfinished
from treepo.submission import drawn, expected_tokens, length_error, of_growth, of_tree

FLAT = FlatSettings(n=3, max_response_length=100, stop_token_ids=[1])


def arrays(count: int, version: int = 0, last: int = 7) -> dict[str, np.ndarray]:
    return dict(
        token_ids=np.array([7] * (count - 1) + [last] * (count > 0), np.int32),
        logprobs=np.zeros(count, np.float32),
        sampling_logprobs=np.zeros(count, np.float32),
        policy_versions=np.full(count, version, np.int32),
    )


def entry(number: int, work=None) -> Unfinished:
    problem = problems(number + 1)[number]
    prompt = Prompt(problem_id=problem.id, token_ids=problem.prompt_token_ids, root_key=number)
    return Unfinished(problem=problem, work=work or prompt, begun=1, oldest_version=0)


def growth(number: int, lengths, finished: int = 0) -> Growth:
    """A flat group whose first ``finished`` responses ended and whose others are as long."""
    strategy = STRATEGIES.get("flat")(FLAT)
    state, requests = strategy.start(entry(number).work)
    ended = [
        ExtendResult(request=request, finish_reason=STOP, **arrays(length, 2, last=1))
        for request, length in zip(requests[:finished], lengths, strict=False)
    ]
    state, _ = strategy.advance(state, ended)
    partials = tuple(
        Partial(request=request, **arrays(length, 3))
        for request, length in zip(requests[finished:], lengths[finished:], strict=True)
    )
    return Growth(problem_id=f"p:{number}", state=state, partials=partials)


def expected(growing, statistics, segment_length=0, finished_part=None) -> list[float]:
    return expected_tokens(
        growing, statistics, segment_length=segment_length, rollout=FLAT,
        finished_part=finished_part,
    )  # fmt: skip


def seen(**lengths: int) -> LengthStatistics:
    return LengthStatistics(
        observations=tuple(
            Observation(
                prompt_id=name.replace("p", "p:"), policy_version=0, sampling="train",
                length=length, finish_reason=EOS, cap=100,
            )
            for name, length in lengths.items()
        )
    )  # fmt: skip


def test_a_new_prompt_is_as_long_as_what_was_seen_of_it_in_each_of_its_paths():
    found = expected([entry(0), entry(1)], seen(p0=10, p1=40))
    assert found == pytest.approx([30, 120])
    assert expected([entry(0), entry(1)], seen(p0=10, p1=40), 16) == pytest.approx([30, 48])


def test_an_unfinished_prompt_is_expected_to_draw_the_rest_of_each_path():
    work = growth(1, [12, 30, 0])
    assert drawn(work) == [12, 30, 0]
    found = expected([entry(0), entry(1, work)], seen(p0=10, p1=40))
    assert found == pytest.approx([30, 28 + 10 + 40])
    assert expected([entry(1, work)], seen(p1=40), 16) == pytest.approx([16 + 10 + 16])


def test_a_finished_sibling_tells_the_length_of_the_others():
    flat = STRATEGIES.get("flat")(FLAT)
    work = growth(1, [20, 5, 5], finished=1)
    of_others = seen(p0=50)
    told = expected([entry(1, work)], of_others, 0, lambda g: flat.finished_part(g.state))
    assert told == pytest.approx([15 + 15])
    assert expected([entry(1, work)], of_others)[0] > 60, "it is not looked at"


def test_before_anything_has_ended_a_path_is_expected_to_reach_its_limit():
    assert expected([entry(0)], LengthStatistics()) == [300]
    assert expected([entry(0)], LengthStatistics(), 16) == [48]


def test_what_is_over_is_observed_as_it_ended_and_what_goes_on_as_cut():
    tree = build([-1, 0, 0], [2, 4, 9])
    last = replace(tree.segments[2], finish_reason=TRUNCATED)
    tree = replace(tree, segments=(*tree.segments[:2], last))
    found = [(o.length, o.finish_reason, o.has_ended) for o in of_tree(tree, 9)]
    assert found == [(4, EOS, True), (9, TRUNCATED, False)]
    cut = of_growth(growth(1, [12, 30, 0]), 100)
    assert [(o.length, o.finish_reason, o.policy_version) for o in cut] == [
        (12, PAUSED, 3),
        (30, PAUSED, 3),
    ]


def test_of_what_an_update_leaves_too_old_to_train_on_the_lengths_so_far_are_kept():
    entries = [entry(1, growth(1, [12, 30, 0])), replace(entry(2), oldest_version=1)]
    group = Group(
        problem=problems(4)[3], tree=build([-1, 0]), verdicts=(verdict(1.0),), begun=1,
        oldest_version=1, num_segments=1,
    )  # fmt: skip
    rules = schedule.Rules(
        batch_size=1, max_staleness=1, on_stale="drop", num_in_flight=4, total_steps=9,
        max_response_length=100,
    )  # fmt: skip
    state = schedule.begin(
        rules,
        ProblemOrder(problems(4), 0),
        position=DataPosition(epoch=0, offset=4),
        pools=Pools(unfinished=tuple(entries), experience=(group,)),
        num_workers=1,
        step=1,
        version=1,
    )
    state, taken = schedule.batch(state)
    assert taken == (group,) and state.unfinished == (entries[1],) and state.num_dropped == 1
    assert [(o.length, o.finish_reason) for o in state.lengths.observations] == [
        (12, PAUSED),
        (30, PAUSED),
    ]


def test_a_path_of_a_tree_counts_from_the_prompt():
    settings = TreePOSettings(n=2, segment_length=4, max_depth=5, max_response_length=20)
    strategy = STRATEGIES.get("treepo")(settings)
    state, requests = strategy.start(entry(0).work)
    level = [ExtendResult(request=r, finish_reason=LENGTH, **arrays(4)) for r in requests]
    state, requests = strategy.advance(state, level)
    partials = tuple(Partial(request=r, **arrays(i)) for i, r in enumerate(requests))
    assert drawn(Growth(problem_id="p:0", state=state, partials=partials)) == [4, 5]


def test_a_path_counts_by_the_mean_of_what_it_draws_in_the_step_not_by_its_mean_cut_there():
    # Of a prompt 10 and 40 were seen, so a step of 16 draws 10 or 16 of each of three paths.
    twice = LengthStatistics(observations=(*seen(p0=10).observations, *seen(p0=40).observations))
    assert expected([entry(0)], twice, 16) == pytest.approx([3 * 13])


def test_the_error_of_predictions_is_that_of_the_mean_lengths_of_trees_that_ended():
    of_p = [replace(o, prompt_id="p") for o in seen(p0=10).observations]
    statistics = LengthStatistics(observations=(*of_p, *seen(p1=40).observations))
    known = build([-1, 0, 0], [2, 4, 9])  # 10 was expected of 6.5
    other = replace(known, problem_id="q")  # the mean of all, 25
    assert length_error([known], statistics, 100) == pytest.approx(3.5 / 6.5)
    found = length_error([known, other, growth(1, [3, 3, 3])], statistics, 100)
    assert found == pytest.approx((3.5 + 18.5) / 13)
    assert length_error([growth(1, [3, 3, 3])], statistics, 100) is None
