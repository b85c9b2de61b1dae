"""Every problem exactly once an epoch, from any position, whatever the batch size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_problems import problems

from treepo.data_order import DataPosition, ProblemOrder, shuffle


@given(
    size=st.integers(1, 12),
    seed=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=30),
)
def test_batches_hold_no_problem_twice_and_epochs_hold_each_once(
    size: int, seed: int, cuts: list[int]
) -> None:
    order, position = ProblemOrder(problems(size), seed), ProblemOrder.start
    consumed: Counter[str] = Counter()
    for cut in cuts:
        batch, position = order.next_batch(position, min(cut, size))
        ids = [problem.id for problem in batch]
        assert len(ids) == min(cut, size) == len(set(ids))
        consumed.update(ids)
        # In all, what the shuffles up to here hold, less what is deferred.
        expected = Counter({f"p:{i}": position.epoch for i in range(size)})
        expected.update(
            f"p:{i}" for i in shuffle(seed, position.epoch, size)[: position.offset].tolist()
        )
        expected.subtract(f"p:{i}" for i in position.deferred)
        assert +consumed == +expected


@pytest.mark.parametrize(("size", "batch"), [(10, 5), (10, 10), (7, 3), (50, 24), (1, 1)])
def test_whole_epochs_are_permutations(size: int, batch: int) -> None:
    order, position = ProblemOrder(problems(size), 4), ProblemOrder.start
    consumed: Counter[str] = Counter()
    for _ in range(size):  # size batches are `batch` whole epochs
        taken, position = order.next_batch(position, batch)
        consumed.update(problem.id for problem in taken)
    assert set(consumed.values()) == {batch} and len(consumed) == size
    assert not position.deferred


def test_a_position_stored_as_json_gives_the_same_batches() -> None:
    order, position = ProblemOrder(problems(7), 0), ProblemOrder.start
    seen_deferred = False
    for _ in range(20):
        stored = json.loads(json.dumps(asdict(position)))
        fresh = ProblemOrder(problems(7), 0).next_batch(stored, 5)
        batch, position = order.next_batch(position, 5)
        assert [p.id for p in fresh[0]] == [p.id for p in batch]
        assert fresh[1] == position
        seen_deferred |= bool(position.deferred)
    assert seen_deferred


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert shuffle(0, 0, 100).tolist() == shuffle(0, 0, 100).tolist()
    orders = [tuple(shuffle(s, e, 100)) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(orders)) == 4
    assert all(sorted(o) == list(range(100)) for o in orders)


def test_the_first_batches_are_uniform_over_the_problems() -> None:
    counts = Counter(int(shuffle(seed, 0, 5)[0]) for seed in range(2000))
    assert all(abs(counts[i] - 400) < 90 for i in range(5)), counts  # five standard deviations


def test_a_batch_larger_than_the_data_is_an_error_with_the_numbers() -> None:
    order = ProblemOrder(problems(3), 0)
    with pytest.raises(ValueError, match="batch of 4 problems cannot be drawn from 3"):
        order.next_batch(order.start, 4)
    with pytest.raises(ValueError, match="holds no problems"):
        ProblemOrder([], 0)


def test_a_position_of_other_data_is_refused() -> None:
    order = ProblemOrder(problems(3), 0)
    for position in (DataPosition(offset=4), DataPosition(deferred=(3,))):
        with pytest.raises(ValueError, match="the data changed"):
            order.next_batch(position, 1)
