"""Further batches until enough prompts have a signal: bounded, deterministic, every prompt once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_trees import build, verdict
from some_problems import problems

from rollout.metrics import CostLedger
from treepo.algorithm_settings import AdvantageSettings
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.data import Problem
from treepo.data_order import DataPosition, ProblemOrder, shuffle
from treepo.dynamic_sampling import GenBatch, further_prompts, gather
from treepo.sizes import derived_sizes
from treepo.step import make_prompts


def sampler(has_signal):
    """A draw that gives trees of two leaves, whose rewards differ where ``has_signal(id)``."""
    calls: list[tuple[int, list[str]]] = []

    def draw(number: int, batch: list[Problem]) -> GenBatch:
        calls.append((number, [p.id for p in batch]))
        return GenBatch(
            problems=batch,
            trees=[replace(build([-1, 0, 0]), problem_id=p.id) for p in batch],
            verdicts=[[verdict(1.0), verdict(0.0 if has_signal(p.id) else 1.0)] for p in batch],
            ledger=CostLedger(generated_tokens=len(batch)),
        )

    return draw, calls


def settings(most: int) -> AdvantageSettings:
    return AdvantageSettings(filter_groups=True, max_num_gen_batches=most)


def ids(groups) -> list[str]:
    return [group.tree.problem_id for group in groups]


def test_without_further_batches_a_step_is_one_batch_whatever_it_holds():
    draw, calls = sampler(lambda _: False)
    order = ProblemOrder(problems(9), 0)
    step = gather(draw, order, order.start, 4, settings(1))
    assert len(calls) == step.num_gen_batches == 1 and step.kept == [] and step.returned == []
    assert step.after == DataPosition(offset=4)


def test_without_the_filter_every_group_is_kept():
    draw, calls = sampler(lambda _: False)
    order = ProblemOrder(problems(9), 0)
    step = gather(draw, order, order.start, 4, AdvantageSettings())
    assert len(step.kept) == 4 and len(calls) == 1


def test_further_batches_by_hand():
    """The shuffle of seed 0 is walked from the left; even problems have a signal."""
    row = [f"p:{i}" for i in shuffle(0, 0, 20)]

    def even(name: str) -> bool:
        return int(name[2:]) % 2 == 0

    draw, calls = sampler(even)
    order = ProblemOrder(problems(20), 0)
    step = gather(draw, order, order.start, 4, settings(3))
    start, informative = 0, 0
    for number, (told, drawn) in enumerate(calls):
        assert told == number and drawn == row[start : start + len(drawn)]
        if number:  # missing over the share so far, rounded up
            share = informative / start
            assert len(drawn) == min(4, int(np.ceil((4 - informative) / share)) if share else 4)
        start += len(drawn)
        informative = sum(map(even, row[:start]))
    assert len(calls) > 1
    wanted = [name for name in row[:start] if even(name)]
    assert ids(step.kept) == wanted[:4] and [p.id for p in step.returned] == wanted[4:]
    assert step.sampled.ledger.generated_tokens == step.counts.num_groups == start
    assert step.metrics()["training/num_gen_batches"] == len(calls)


@pytest.mark.parametrize(
    ("informative", "sampled", "size", "expected"),
    [(0, 4, 4, 4), (4, 4, 4, 0), (5, 8, 4, 0), (2, 4, 4, 4), (3, 4, 4, 2), (1, 24, 24, 24),
     (23, 24, 24, 2), (20, 24, 24, 5)],
)  # fmt: skip
def test_a_further_batch_is_as_large_as_the_share_so_far_makes_necessary(
    informative, sampled, size, expected
):
    assert further_prompts(informative, sampled, size) == expected


@given(
    size=st.integers(1, 6),
    extra=st.integers(0, 14),
    most=st.integers(1, 4),
    seed=st.integers(0, 3),
    signal=st.integers(0, 2**20 - 1),
    num_steps=st.integers(1, 12),
)
def test_each_prompt_is_trained_on_or_filtered_exactly_once_an_epoch_over_any_resume(
    size: int, extra: int, most: int, seed: int, signal: int, num_steps: int
) -> None:
    num_problems = size + extra
    # whether a problem has a signal changes from one sampling to the next, as it does in training
    seen: Counter[str] = Counter()

    def has_signal(name: str) -> bool:
        seen[name] += 1
        return bool(signal >> ((int(name[2:]) * 7 + seen[name]) % 20) & 1)

    draw, calls = sampler(has_signal)
    position, consumed = ProblemOrder.start, Counter[str]()
    for _ in range(num_steps):
        order = ProblemOrder(problems(num_problems), seed)  # as after a resume
        position = DataPosition.of(json.loads(json.dumps(asdict(position))))
        calls.clear()
        step = gather(draw, order, position, size, settings(most))
        drawn = [name for _, batch in calls for name in batch]
        assert len(calls) <= most and len(drawn) == len(set(drawn)) <= most * size
        assert len(step.kept) <= size
        if len(step.kept) < size and len(calls) < most:
            assert len(drawn) == num_problems, "it stopped early only for lack of other prompts"
        returned = [p.id for p in step.returned]
        assert len(step.kept) == size or not returned
        consumed.update(drawn)
        consumed.subtract(returned)
        position = step.after
        expected = Counter({f"p:{i}": position.epoch for i in range(num_problems)})
        expected.update(
            f"p:{i}" for i in shuffle(seed, position.epoch, num_problems)[: position.offset]
        )
        expected.subtract(f"p:{i}" for i in position.deferred)
        assert consumed == expected
        assert [f"p:{i}" for i in position.deferred[: len(returned)]] == returned


def test_what_was_given_back_comes_first_in_the_next_step():
    order = ProblemOrder(problems(10), 0)
    first, position = order.next_batch(order.start, 6)
    position = order.give_back(position, first[4:])
    second, position = order.next_batch(position, 3)
    assert [p.id for p in second[:2]] == [p.id for p in first[4:]]
    assert not position.deferred


def test_no_two_draws_of_a_run_have_the_same_key():
    batch = problems(3)
    keys = [
        prompt.root_key
        for where in ((1,), (1, 1), (1, 2), (2,), (2, 1), (11,), (1, 11))
        for prompt in make_prompts(batch, 0, "train", *where)
    ]
    assert len(set(keys)) == len(keys)


def test_the_sizes_say_how_many_prompts_a_step_may_take():
    config = compose("train", TrainConfig, ["+experiment=quickstart", "algorithm=dynamic"])
    assert derived_sizes(config)["dynamic sampling"] == "up to 3 batches, 72 prompts a step"
