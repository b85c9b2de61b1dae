"""The asynchronous pipeline's schedule without processes: over all orders of events in a small
world, and over random ones in larger worlds with crashes, no token is trained on too late, every
batch is full, each prompt is used once an epoch, and nothing ever waits for nothing.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scored_trees import build, verdict
from some_problems import problems

from rollout.growth import Growth
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from treepo import async_schedule as schedule
from treepo.algorithm_settings import AdvantageSettings
from treepo.async_schedule import Rules, Schedule, can_all_be_met, num_admitted, room
from treepo.data_order import DataPosition, ProblemOrder, shuffle
from treepo.pools import Pools, dump_pools, load_pools

ALGORITHM = AdvantageSettings(adv_estimator="grpo", filter_groups=True)


@dataclass(frozen=True, kw_only=True)
class FakeState:
    """A tree that needs ``length`` slices, one token each."""

    length: int
    versions: tuple[int, ...]
    segments: tuple[()] = ()


class World:
    """Workers and a learner that end what they do when they are told to.

    Args:
        length: slices that the tree of a problem needs, by number and step begun.
        has_signal: whether its responses score differently.
        has_gradient: whether the update of a step follows anything.
    """

    def __init__(
        self,
        rules: Rules,
        num_problems: int,
        num_workers: int,
        length: Callable[[int, int], int],
        has_signal: Callable[[int, int], bool] = lambda problem, step: True,
        has_gradient: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self.rules, self.num_workers = rules, num_workers
        self.length, self.has_signal, self.has_gradient = length, has_signal, has_gradient
        self.order = ProblemOrder(problems(num_problems), 0)
        self.consumed: Counter[str] = Counter()
        self.batches: list[list[int]] = []  # staleness of each group, by update
        self._start(Pools(), ProblemOrder.start, 0, 0)

    def _start(self, pools: Pools, position: DataPosition, step: int, version: int) -> None:
        self.state = schedule.begin(
            self.rules,
            self.order,
            position=position,
            pools=pools,
            num_workers=self.num_workers,
            step=step,
            version=version,
        )
        self.running: list[tuple[str, int]] = []
        self._saved = (dump_pools(pools), position, step, version, Counter(self.consumed))
        self._begin_what_can()

    def crash(self) -> None:
        """The run is killed, and goes on from what was saved when the last step ended."""
        data, position, step, version, consumed = self._saved
        self.consumed = Counter(consumed)
        self.batches = self.batches[:step]
        stored = DataPosition.of(json.loads(json.dumps(asdict(position))))
        self._start(load_pools(data), stored, step, version)

    def fork(self) -> World:
        """The same world, to go on in another way."""
        other = copy.copy(self)
        other.running, other.batches = list(self.running), list(self.batches)
        other.consumed = Counter(self.consumed)
        return other

    def signature(self) -> tuple:
        """Equal for worlds that go on alike."""
        state = self.state

        def of(entries) -> tuple:
            return tuple(
                (e.problem.id, e.begun, e.oldest_version, getattr(e, "num_segments", 0))
                for e in entries
            )

        return (
            *(state.step, state.version, state.published, state.position, tuple(self.running)),
            *(of(state.unfinished), of(state.experience), state.training is None),
            tuple((w.version, w.is_loading, of(w.growing)) for w in state.workers),
        )

    @property
    def is_done(self) -> bool:
        return self.state.step == self.rules.total_steps

    def end(self, index: int) -> None:
        """Number ``index`` of what runs ends."""
        kind, number = self.running.pop(index)
        getattr(self, f"_end_{kind}")(number)
        self._check()
        self._begin_what_can()

    def _begin_what_can(self) -> None:
        if self.is_done:
            return
        self.state, ranks = schedule.load(self.state)
        # The version is that of now, whatever is published before it arrives.
        self.running += [("load", rank * 1000 + self.state.published) for rank in ranks]
        self.state, begun = schedule.slices(self.state, self._prompts)
        self.running += [("slice", rank) for rank, _ in begun]
        self.state, taken = schedule.batch(self.state)
        if taken is not None:
            self._take(taken)

    def _take(self, taken) -> None:
        version = self.state.version
        assert len(taken) == self.rules.batch_size
        tokens = [s.policy_versions for g in taken for s in g.tree.segments[1:]]
        self.batches.append([version - group.oldest_version for group in taken])
        assert max(version - int(v.min()) for v in tokens) <= self.rules.max_staleness
        assert max(self.batches[-1]) <= self.rules.max_staleness
        self.consumed.update(group.problem.id for group in taken)
        if self.has_gradient(self.state.step):
            self.running.append(("update", 0))
        else:
            self._update_ended(is_skipped=True)

    def _update_ended(self, is_skipped: bool) -> None:
        self.state = schedule.update_ended(self.state, is_skipped=is_skipped)
        state = self.state
        saved = dump_pools(state.pools())
        self._saved = (saved, state.position, state.step, state.version, Counter(self.consumed))
        if is_skipped:
            self._begin_what_can()
        else:
            self.running.append(("publish", state.version))

    def _end_update(self, number: int) -> None:
        self._update_ended(is_skipped=False)

    def _end_publish(self, version: int) -> None:
        self.state = schedule.weights_published(self.state, version)

    def _end_load(self, number: int) -> None:
        self.state = schedule.weights_loaded(self.state, number // 1000, number % 1000)

    def _end_slice(self, rank: int) -> None:
        worker = self.state.workers[rank]
        results = [self._grown(entry, worker.version) for entry in worker.growing]
        self.state = schedule.slice_ended(self.state, rank, results)
        verdicts = [
            [verdict(1.0), verdict(0.0 if self.has_signal(_number(e), e.begun) else 1.0)]
            for e, _ in self.state.unjudged
        ]
        self.state, _, filtered = schedule.judged(self.state, verdicts, ALGORITHM)
        self.consumed.update(group.problem.id for group in filtered)

    def _grown(self, entry, version: int) -> Tree | Growth:
        old = () if isinstance(entry.work, Prompt) else entry.work.state.versions
        state = FakeState(length=self.length(_number(entry), entry.begun), versions=(*old, version))
        name = entry.problem.id
        if len(state.versions) < state.length:
            return Growth(problem_id=name, state=state, partials=())
        tree = build([-1, 0, 0], [1, state.length, state.length])
        versions = np.array(state.versions, np.int32)
        responses = [replace(s, policy_versions=versions) for s in tree.segments[1:]]
        return replace(tree, problem_id=name, segments=(tree.segments[0], *responses))

    def _prompts(self, of, step: int, epoch: int) -> list[Prompt]:
        return [Prompt(problem_id=p.id, token_ids=p.prompt_token_ids, root_key=step) for p in of]

    def _check(self) -> None:
        state = self.state
        held = [entry.problem.id for entry in state.outstanding]
        assert len(held) == len(set(held)), "a prompt is in flight twice"
        assert Counter(held) + self.consumed == drawn(self.order, state.position)
        assert len(state.growing) + len(state.unfinished) <= self.rules.num_in_flight


def _number(entry) -> int:
    return int(entry.problem.id[2:])


def drawn(order: ProblemOrder, position: DataPosition) -> Counter[str]:
    """How often each problem was handed out and not given back."""
    size = len(order.problems)
    counts = Counter({p.id: position.epoch for p in order.problems})
    begun = shuffle(order.seed, position.epoch, size)[: position.offset]
    counts.update(order.problems[i].id for i in begun)
    counts.subtract(order.problems[i].id for i in position.deferred)
    return +counts


def rules(**values) -> Rules:
    defaults = {
        "batch_size": 1,
        "max_staleness": 1,
        "on_stale": "finish",
        "num_in_flight": 2,
        "total_steps": 3,
        "max_response_length": 16,
    }
    return Rules(**{**defaults, **values})


def every_world(start: World, most: int) -> Iterator[World]:
    """The worlds that any order of events leads to, each once."""
    waiting, known = [start], {start.signature()}
    while waiting:
        world = waiting.pop()
        yield world
        if world.is_done:
            continue
        assert world.running, "nothing runs, and nothing may begin"
        for index in range(len(world.running)):
            after = world.fork()
            after.end(index)
            if (signature := after.signature()) not in known:
                known.add(signature)
                waiting.append(after)
        assert len(known) <= most


@pytest.mark.parametrize("on_stale", ["finish", "drop"])
@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 2), (2, 4)])
def test_over_all_orders_of_events_nothing_is_too_old_lost_or_stuck(
    on_stale, batch_size, in_flight
):
    start = World(
        rules(batch_size=batch_size, num_in_flight=in_flight, on_stale=on_stale),
        num_problems=5,
        num_workers=2,
        length=lambda problem, step: 1 + problem % 2,
    )
    ages: Counter[int] = Counter()
    worlds = list(every_world(start, most=3000))
    for world in worlds:
        if world.is_done:
            assert len(world.batches) == 3
            ages.update(age for batch in world.batches for age in batch)
    assert len(worlds) > 100 and set(ages) == {0, 1}, (len(worlds), ages)
    dropped = {world.state.num_dropped > 0 for world in worlds}
    assert (True in dropped) == (on_stale == "drop")


# Version 2 is published before version 1 is.
@example(
    size=1, extra=3, num_workers=3, in_flight=7, cap=3, on_stale="finish", total_steps=7, salt=1,
    hurry="none",
)  # fmt: skip
@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(1, 4),
    extra=st.integers(0, 9),
    num_workers=st.integers(1, 3),
    in_flight=st.integers(1, 12),
    cap=st.integers(1, 4),
    on_stale=st.sampled_from(["finish", "drop"]),
    total_steps=st.integers(1, 12),
    salt=st.integers(0, 2**16),
    hurry=st.sampled_from(["none", "update", "slice"]),
)
def test_at_random_with_crashes_nothing_is_too_old_lost_or_stuck(
    size, extra, num_workers, in_flight, cap, on_stale, total_steps, salt, hurry
):
    rng = np.random.default_rng(salt)
    world = World(
        rules(
            batch_size=size,
            max_staleness=cap,
            on_stale=on_stale,
            num_in_flight=in_flight,
            total_steps=total_steps,
        ),
        num_problems=size + extra,
        num_workers=num_workers,
        length=lambda p, s: 1 + int(np.random.default_rng([salt, p, s]).integers(0, 6)) ** 2 // 4,
        has_signal=lambda p, s: rng.random() < 0.7,
        has_gradient=lambda s: np.random.default_rng([salt, s, 2]).random() < 0.9,
    )
    while not world.is_done:
        assert world.running, "nothing runs, and nothing may begin"
        if rng.random() < 0.02:
            world.crash()
            continue
        hurried = [i for i, (kind, _) in enumerate(world.running) if kind == hurry]
        index = hurried[0] if hurried and rng.random() < 0.9 else rng.integers(len(world.running))
        world.end(int(index))
    assert len(world.batches) == total_steps


def test_a_long_response_is_waited_for_or_dropped():
    """Problem 0 takes long; the others one slice. Two workers, one tree each."""

    def run(on_stale: str) -> Schedule:
        world = World(
            rules(on_stale=on_stale, total_steps=6, max_staleness=2),
            num_problems=4,
            num_workers=2,
            length=lambda problem, step: 9 if problem == first else 1,
        )
        while not world.is_done:
            # The long tree's worker ends nothing as long as anybody else works.
            slow = next(
                (w for w, worker in enumerate(world.state.workers)
                 if any(_number(e) == first for e in worker.growing)),
                None,
            )  # fmt: skip
            others = [i for i, what in enumerate(world.running) if what != ("slice", slow)]
            world.end(others[0] if others else 0)
        return world.state

    first = int(shuffle(0, 0, 4)[0])
    assert run("finish").num_dropped == 0
    assert run("drop").num_dropped > 0


def brute_force(deadlines: tuple[int, ...], version: int, size: int) -> bool:
    """Whether each group can have an update of its own choice before its deadline."""
    for updates in itertools.product(*(range(version, d + 1) for d in deadlines)):
        if all(count <= size for count in Counter(updates).values()):
            return True
    return False


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 5), max_size=6),
    st.integers(2, 5),
    st.integers(2, 3),
    st.integers(1, 2),
)
def test_room_is_what_an_assignment_of_groups_to_updates_leaves(deadlines, new, version, size):
    fits = brute_force(tuple(deadlines), version, size)
    assert can_all_be_met(deadlines, version, size) == fits
    found = room(deadlines, new, version, size)
    if found > 0:
        assert brute_force((*deadlines, new), version, size) or not fits
    if fits:
        most = max(
            n for n in range(13) if n == 0 or brute_force_many(deadlines, new, n, version, size)
        )
        assert max(found, 0) == most


def brute_force_many(deadlines, new: int, count: int, version: int, size: int) -> bool:
    """As ``brute_force`` with ``count`` groups more, by filling the updates one after the other."""
    left = sorted([*deadlines, *[new] * count])
    while left:
        if left[0] < version:
            return False
        left, version = left[size:], version + 1
    return True


def test_trees_go_on_where_they_were_and_move_to_a_worker_that_has_nothing():
    lengths = {number: 9 for number in range(8)}
    world = World(
        rules(batch_size=4, num_in_flight=8, max_staleness=1),
        num_problems=8,
        num_workers=2,
        length=lambda problem, step: lengths[problem],
    )

    def growing(rank: int) -> set[int]:
        return {_number(entry) for entry in world.state.workers[rank].growing}

    def end_slice(rank: int) -> None:
        world.end(world.running.index(("slice", rank)))

    first, second = growing(0), growing(1)
    assert len(first) == len(second) == 4 and not first & second
    for rank, expected in ((0, first), (1, second), (1, second)):
        end_slice(rank)
        assert growing(rank) == expected
    lengths |= dict.fromkeys(second, 1)  # these end now, and no more may be begun under version 0
    end_slice(1)
    assert not growing(1) and ("update", 0) in world.running
    end_slice(0)
    assert len(growing(0)) == len(growing(1)) == 2 and growing(0) | growing(1) == first


@pytest.mark.parametrize(("version", "cap", "size"), [(0, 2, 4), (3, 1, 2), (5, 4, 3)])
def test_with_one_version_everywhere_as_many_prompts_are_begun_as_areal_s_rule_allows(
    version, cap, size
):
    """arXiv 2505.24298, section 5.1: groups begun <= (version + cap + 1) * batch size."""
    world = World(
        rules(batch_size=size, max_staleness=cap, num_in_flight=99, total_steps=50),
        num_problems=200,
        num_workers=1,
        length=lambda problem, step: 1,
    )
    state = schedule.begin(
        world.rules, world.order, position=DataPosition(), pools=Pools(), num_workers=1,
        step=version, version=version,
    )  # fmt: skip
    # version * size groups were trained on before
    assert num_admitted(state, version, 99) + version * size == (version + cap + 1) * size
    state, _ = schedule.slices(state, world._prompts)
    assert len(state.growing) == (cap + 1) * size
    assert num_admitted(state, version, 99) == 0
