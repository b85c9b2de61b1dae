"""The pools of segmented rollout: each prompt once an epoch, no token older than the cap, and the
rules of refilling, of parts of groups and of batches.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_trees import build, verdict
from some_problems import problems

from rollout.growth import Growth, GrowthLimits
from rollout.metrics import CostLedger
from rollout.strategies.base import Prompt
from rollout.strategies.settings import FlatSettings
from rollout.tree import Tree
from treepo.advantages import estimate
from treepo.algorithm_settings import AdvantageSettings
from treepo.cli import compose
from treepo.config import TrainConfig
from treepo.data_order import DataPosition, ProblemOrder, shuffle
from treepo.opening import read_pools
from treepo.pools import (
    POOLS_FILE,
    Group,
    Pools,
    Unfinished,
    dump_pools,
    load_pools,
    num_new_prompts,
    take_batch,
)
from treepo.segment_settings import SegmentSettings
from treepo.segmented import SegmentBatch, Servants, segmented_step

N = 4  # responses a prompt
BASE = compose(
    "train",
    TrainConfig,
    ["rollout=flat", f"rollout.n={N}", "algorithm=grpo", "cluster.num_learner_ranks=1"],
)


@dataclass(frozen=True, kw_only=True)
class FakeState:
    """A group whose response i ends in its segment ``lengths[i]``, one token a segment."""

    begun: int
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]
    versions: tuple[int, ...] = ()  # of the segments so far
    segments: tuple = ()


class World:
    """Trees that need given numbers of segments, and a run that trains on them step by step."""

    def __init__(self, num_problems: int, size: int, lengths, rewards, **rules) -> None:
        """``rules``: of the segments, ``filter_groups``, ``is_ahead``: a step draws while the one
        before makes its update.
        """
        self.is_ahead = rules.pop("is_ahead", False)
        filters = rules.pop("filter_groups", True)
        trainer = replace(
            BASE.trainer,
            train_batch_size=size,
            ppo_mini_batch_size=size,
            segments=SegmentSettings(segment_length=1, **rules),
        )
        algorithm = AdvantageSettings(adv_estimator="grpo", filter_groups=filters)
        self.config = replace(BASE, trainer=trainer, algorithm=algorithm)
        self.num_problems = num_problems
        self.lengths, self.rewards = lengths, rewards  # of (problem number, step begun)
        self.pools, self.position = Pools(), ProblemOrder.start
        self.step = self.version = self.trains_at = 0
        self.updates = False  # whether an update runs while this step draws
        self.drawn: list[str] = []
        self.grown: list[tuple[list[str], int]] = []
        self.stops: list[int] = []
        self.judged: Counter[tuple[str, int]] = Counter()

    def run_step(self) -> SegmentBatch:
        """One step after a resume: records that were written and read again."""
        self.step += 1
        self.grown.clear()
        self.trains_at = self.version + self.updates
        batch = segmented_step(
            load_pools(dump_pools(self.pools)),
            DataPosition.of(json.loads(json.dumps(asdict(self.position)))),
            step=self.step,
            version=self.version,
            trains_at=self.trains_at,
            order=ProblemOrder(problems(self.num_problems), 0),
            config=self.config,
            rollout=FlatSettings(n=N),
            servants=Servants(
                prompts=self._prompts,
                grow=self._grow,
                judge=self._judge,
                finished_part=lambda growth: self._tree(growth.problem_id, growth.state),
            ),
        )
        self.pools, self.position = batch.pools, batch.after
        if self.is_ahead:
            self.version, self.updates = self.trains_at, bool(batch.kept)
        else:
            self.version += bool(batch.kept)
        return batch

    def _prompts(self, of):
        self.drawn = [problem.id for problem in of]
        return [
            Prompt(problem_id=p.id, token_ids=p.prompt_token_ids, root_key=self.step) for p in of
        ]

    def _grow(self, growing, limits: GrowthLimits):
        work = [entry.work for entry in growing]
        self.grown.append(([entry.problem_id for entry in work], limits.segment_length))
        self.stops.append(limits.stop_when_finished)
        return [self._grown(entry, limits) for entry in work], CostLedger()

    def _grown(self, work, limits: GrowthLimits) -> Tree | Growth:
        if isinstance(work, Prompt):
            number = int(work.problem_id[2:])
            state = FakeState(
                begun=self.step,
                lengths=self.lengths(number, self.step),
                rewards=self.rewards(number, self.step),
            )
        else:
            state = work.state
        longest = max(state.lengths)
        more = limits.segment_length or longest - len(state.versions)
        state = replace(state, versions=state.versions + (self.version,) * more)
        if len(state.versions) >= longest:
            return self._tree(work.problem_id, state)
        return Growth(problem_id=work.problem_id, state=state, partials=())

    def _tree(self, name: str, state: FakeState) -> Tree:
        ended = [i for i, length in enumerate(state.lengths) if length <= len(state.versions)]
        tree = build([-1, *[0] * len(ended)], [1, *(state.lengths[i] for i in ended)])
        segments = [tree.segments[0]]
        for i, segment in zip(ended, tree.segments[1:], strict=True):
            versions = np.array(state.versions[: state.lengths[i]], np.int32)
            segments.append(replace(segment, path_key=100 + i, policy_versions=versions))
        segments[0] = replace(segments[0], path_key=state.begun)
        return replace(tree, problem_id=name, segments=tuple(segments))

    def _judge(self, of, trees):
        found = []
        for problem, tree in zip(of, trees, strict=True):
            begun = tree.segments[0].path_key
            rewards = self.rewards(int(problem.id[2:]), begun)
            keys = [tree.segments[leaf].path_key for leaf in tree.leaves]
            for key in keys:
                self.judged[f"{problem.id} of step {begun}", key] += 1
            found.append([verdict(rewards[key - 100]) for key in keys])
        return found


def trained_leaves(scored) -> list[int]:
    """Numbers of the responses that an update trains on."""
    (advantages,) = estimate([scored], AdvantageSettings(adv_estimator="grpo"))
    return [
        scored.tree.segments[leaf].path_key - 100
        for leaf, weight in zip(scored.tree.leaves, advantages.leaf_weight, strict=True)
        if weight
    ]


def name_of(scored) -> str:
    return f"{scored.tree.problem_id} of step {scored.tree.segments[0].path_key}"


def oldest(scored) -> int:
    return min(s.policy_versions.min(initial=10**6) for s in scored.tree.segments[1:])


# --- all rules at random -----------------------------------------------------------------------

RULES = st.fixed_dictionaries(
    {
        "refill": st.sampled_from(["constant", "keep_in_flight", "to_target"]),
        "train_on": st.sampled_from(["all", "full_batch"]),
        "filter_groups": st.booleans(),
    }
)


@settings(deadline=None, max_examples=120)
@given(
    size=st.integers(1, 4),
    extra=st.integers(0, 10),
    salt=st.integers(0, 2**16),
    num_steps=st.integers(1, 16),
    floor=st.integers(0, N),
    cap=st.integers(0, 3),
    is_ahead=st.booleans(),
    on_stale=st.sampled_from(["finish", "drop"]),
    rules=RULES,
)
def test_each_prompt_is_trained_on_or_filtered_exactly_once_an_epoch_and_never_too_late(
    size, extra, salt, num_steps, floor, cap, is_ahead, on_stale, rules
) -> None:
    def draws(problem: int, step: int, most: int) -> tuple[int, ...]:
        rng = np.random.default_rng([salt, problem, step, most])
        return tuple(int(x) for x in rng.integers(0, most, N))

    if floor:
        rules |= {"group_policy": "finished_part", "min_finished": floor}
    if cap:
        rules |= {"max_staleness": cap, "on_stale": on_stale}
    world = World(
        size + extra,
        size,
        lambda p, s: tuple(1 + x for x in draws(p, s, 5)),
        lambda p, s: tuple(float(x) for x in draws(p, s, 2)),
        is_ahead=is_ahead,
        **rules,
    )
    in_flight: set[str] = set()
    consumed: Counter[str] = Counter()
    trained: Counter[tuple[str, int]] = Counter()
    touched: set[str] = set()  # problems in flight of which a response was trained on
    for _ in range(num_steps):
        before = in_flight
        batch = world.run_step()
        in_flight = {problem.id for problem in world.pools.problems}
        assert len(world.drawn) == len(set(world.drawn)) == batch.num_new
        for scored in batch.kept:
            assert not cap or world.trains_at - oldest(scored) <= cap
            leaves = trained_leaves(scored)
            assert leaves, "a group without anything to train on"
            trained.update((name_of(scored), leaf) for leaf in leaves)
        if rules["train_on"] == "full_batch" and on_stale == "drop":
            assert len(batch.kept) in (0, size)
        # Whatever was in flight or begun and is no more was settled, or dropped.
        began = Counter(before) + Counter(world.drawn)
        gone = began - Counter(in_flight)
        settled = {tree.problem_id for tree in batch.settled.trees}
        assert batch.num_dropped == 0 or on_stale == "drop"
        consumed.update(settled - in_flight)
        dropped = gone - Counter(settled - in_flight)
        consumed.update(name for name in dropped if name in touched)  # the others are begun anew
        touched -= set(dropped)
        touched |= {scored.tree.problem_id for scored in batch.kept}
        touched &= in_flight
        # What the position calls consumed is consumed, or in flight.
        position = world.position
        expected = Counter({f"p:{i}": position.epoch for i in range(world.num_problems)})
        epoch = shuffle(0, position.epoch, world.num_problems)
        expected.update(f"p:{i}" for i in epoch[: position.offset])
        expected.subtract(f"p:{i}" for i in position.deferred)
        assert consumed + Counter(in_flight) == +expected
    assert max(trained.values(), default=1) == 1, "a response was trained on twice"
    assert max(world.judged.values(), default=1) == 1, "a response was judged twice"


# --- one rule at a time, by hand ----------------------------------------------------------------


@given(salt=st.integers(0, 2**16), size=st.integers(1, 3), num_segments=st.integers(1, 5))
@settings(deadline=None, max_examples=15)
def test_under_wait_all_a_group_trains_in_the_step_in_which_its_longest_response_ends(
    salt, size, num_segments
):
    def lengths(problem: int, step: int) -> tuple[int, ...]:
        rng = np.random.default_rng([salt, problem, step])
        return tuple(int(x) for x in rng.integers(1, num_segments + 1, N))

    world = World(40, size, lengths, lambda p, s: (1.0, 0.0, 0.0, 0.0))
    expected: Counter[tuple[int, str]] = Counter()
    found: Counter[tuple[int, str]] = Counter()
    for step in range(1, 9):
        batch = world.run_step()
        assert batch.num_new == size
        for name in world.drawn:
            ends = step + max(lengths(int(name[2:]), step)) - 1
            expected[ends, f"{name} of step {step}"] += 1
        found.update((step, name_of(scored)) for scored in batch.kept)
        assert all(trained_leaves(scored) == [0, 1, 2, 3] for scored in batch.kept)
        assert all(not names or length == 1 for names, length in world.grown)
        of_responses = [
            len(set(segment.policy_versions.tolist()))
            for scored in batch.kept
            for segment in scored.tree.segments[1:]
        ]
        if of_responses:
            metrics = batch.metrics()
            assert metrics["training/versions_per_response/mean"] == np.mean(of_responses)
            assert metrics["training/versions_per_response/max"] == max(of_responses)
            longest = max(step + 1 - g.tree.segments[0].path_key for g in batch.kept)
            assert metrics["training/segments_per_group/max"] == longest <= num_segments
    assert found == Counter({k: v for k, v in expected.items() if k[0] <= 8})


def test_a_finished_part_trains_at_the_floor_and_the_rest_against_the_whole_group():
    rewards = (1.0, 0.0, 1.0, 1.0)
    world = World(
        9, 1, lambda p, s: (1, 2, 4, 4) if s == 1 else (9, 9, 9, 9), lambda p, s: rewards,
        group_policy="finished_part", min_finished=2,
    )  # fmt: skip
    steps = [world.run_step() for _ in range(4)]
    assert [len(batch.kept) for batch in steps] == [0, 1, 0, 1]
    part, whole = steps[1].kept[0], steps[3].kept[0]
    assert trained_leaves(part) == [0, 1] and trained_leaves(whole) == [2, 3]
    (of_part,) = estimate([part], AdvantageSettings(adv_estimator="grpo"))
    (of_whole,) = estimate([whole], AdvantageSettings(adv_estimator="grpo"))
    # Baseline and deviation of all that is finished: {1, 0} has mean .5 and deviation sqrt(.5);
    # {1, 0, 1, 1} has mean .75 and deviation .5.
    assert of_part.leaf_advantage == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert of_whole.leaf_advantage == pytest.approx([0, 0, 0.5, 0.5], rel=1e-5)
    assert of_whole.weight.tolist() == [0, 0, 0, 1, 1]
    assert max(world.judged.values()) == 1


def test_growth_stops_at_a_number_of_trees_that_those_in_their_last_step_count_to():
    """Under a cap of 1 what was begun a step before must end now: 2 of the 3 that are asked for."""
    world = World(
        40, 2, lambda p, s: (4, 4, 4, 4), lambda p, s: (1.0, 0.0, 0.0, 0.0), max_staleness=1,
        stop_when_finished=3,
    )  # fmt: skip
    for _ in range(2):
        world.run_step()  # nothing trains, so nothing gets older
    assert world.stops == [3, 3] and len(world.grown) == 1
    world.version += 1
    world.stops.clear()
    world.run_step()
    assert [length for _, length in world.grown] == [0, 1]
    assert world.stops == [0, 1], "four end in any case, and the call stops at one more"


def test_a_part_without_a_signal_is_trained_on_with_a_later_one():
    world = World(
        9, 1, lambda p, s: (1, 1, 2, 3) if s == 1 else (9, 9, 9, 9),
        lambda p, s: (1.0, 1.0, 0.0, 0.0),
        group_policy="finished_part", min_finished=1,
    )  # fmt: skip
    steps = [world.run_step() for _ in range(3)]
    assert [[trained_leaves(g) for g in batch.kept] for batch in steps] == [[], [[0, 1, 2]], [[3]]]


def test_a_part_that_still_waits_becomes_one_with_the_next():
    world = World(
        9, 2, lambda p, s: (1, 2, 3, 3) if p % 2 else (3, 3, 3, 3),
        lambda p, s: (1.0, 0.0, 0.0, 0.0),
        group_policy="finished_part", min_finished=1, train_on="full_batch",
    )  # fmt: skip
    batches = [world.run_step() for _ in range(4)]
    trained = [[(name_of(g), leaf) for leaf in trained_leaves(g)] for b in batches for g in b.kept]
    flat = [pair for group in trained for pair in group]
    assert len(flat) == len(set(flat)) and all(len(b.kept) in (0, 2) for b in batches)


def test_a_prompt_at_the_cap_is_grown_to_its_end_at_once():
    world = World(
        40, 1, lambda p, s: (1, 1, 1, 2 if s > 1 else 9), lambda p, s: (1.0, 0.0, 0.0, 0.0),
        max_staleness=2,
    )  # fmt: skip
    first = world.run_step()
    name = world.drawn[0]
    assert not first.kept  # no update, so the first prompt is not older afterwards
    for version in (0, 0, 1):
        assert world.version == version
        assert world.run_step() and world.grown[0][1] == 1
    assert world.version == 2
    batch = world.run_step()
    assert world.grown[0] == ([name], 0), "without a limit"
    assert name in [g.tree.problem_id for g in batch.kept]
    (scored,) = [g for g in batch.kept if g.tree.problem_id == name]
    assert oldest(scored) == 0 and trained_leaves(scored) == [0, 1, 2, 3]


def test_a_prompt_beyond_the_cap_is_dropped_and_begun_anew():
    world = World(
        40, 1, lambda p, s: (1, 1, 1, 1 if s > 1 else 9), lambda p, s: (1.0, 0.0, 0.0, 0.0),
        max_staleness=1, on_stale="drop",
    )  # fmt: skip
    world.run_step()
    (name,) = world.drawn
    dropped = [world.run_step().num_dropped for _ in range(3)]
    assert dropped == [0, 0, 1] and world.drawn == [name]
    assert world.version == 3 and not world.pools.unfinished


def waiting(version: int, number: int) -> Group:
    tree = replace(build([-1, 0]), problem_id=f"p:{number}")
    return Group(
        problem=problems(number + 1)[number], tree=tree, verdicts=(verdict(1.0),), begun=1,
        oldest_version=version, num_segments=1,
    )  # fmt: skip


def test_a_full_batch_is_the_oldest_groups_and_does_not_wait_at_the_cap():
    pool = [waiting(version, i) for i, version in enumerate((3, 1, 2, 1))]

    def taken(size: int, version: int, **rules) -> tuple[list[str], list[str]]:
        rules = SegmentSettings(segment_length=1, **rules)
        parts = take_batch(pool, rules, size, version)
        return tuple([group.problem.id[2:] for group in part] for part in parts)

    assert taken(2, 4) == (["1", "3", "2", "0"], [])
    assert taken(2, 4, train_on="full_batch") == (["1", "3"], ["2", "0"])
    assert taken(5, 4, train_on="full_batch") == ([], ["1", "3", "2", "0"])
    at_cap = {"train_on": "full_batch", "max_staleness": 2}
    assert taken(5, 2, **at_cap) == ([], ["1", "3", "2", "0"])
    assert taken(5, 3, **at_cap) == (["1", "3", "2", "0"], [])
    assert taken(1, 3, **at_cap) == (["1", "3"], ["2", "0"])


@pytest.mark.parametrize(
    ("rules", "unfinished", "experience", "expected"),
    [
        ({}, 0, 0, 8), ({}, 30, 9, 8), ({}, 90, 5, 5), ({}, 100, 0, 0),
        ({"refill": "keep_in_flight"}, 10, 3, 6),  # of 2 x 8
        ({"refill": "keep_in_flight", "prompts_in_flight": 40}, 10, 3, 30),
        ({"refill": "keep_in_flight"}, 20, 3, 0),
        ({"refill": "to_target"}, 10, 0, 8),  # 8 wanted, a quarter ends: 32, at most 8
        ({"refill": "to_target"}, 28, 0, 4),
        ({"refill": "to_target"}, 28, 1, 0),  # 7 wanted of 28
        ({"refill": "to_target"}, 0, 9, 0),
    ],
)  # fmt: skip
def test_how_many_prompts_a_step_begins(rules, unfinished, experience, expected):
    of_100 = problems(100)
    growing = [
        Unfinished(
            problem=problem,
            work=Prompt(problem_id=problem.id, token_ids=problem.prompt_token_ids, root_key=0),
            begun=1,
            oldest_version=0,
        )
        for problem in of_100[:unfinished]
    ]
    pools = Pools(
        unfinished=tuple(growing),
        experience=tuple(waiting(0, 99 - i) for i in range(experience)),
        num_grown=40,
        num_finished=10,
    )
    rules = SegmentSettings(segment_length=1, **rules)
    assert num_new_prompts(pools, rules, 8, 100) == expected


def test_pools_that_are_damaged_foreign_or_of_another_version_are_refused():
    data = dump_pools(Pools(num_grown=3))
    assert load_pools(data).num_grown == 3
    version = data.replace(b"treepo pools 2 ", b"treepo pools 99 ")
    with pytest.raises(ValueError, match="format 99, and this version reads 2"):
        load_pools(version)
    for at in (len(data) // 2, len(data) - 1):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(ValueError, match="damaged"):
            load_pools(flipped)
    with pytest.raises(ValueError, match="damaged"):
        load_pools(data[:-1])
    for foreign in (b"", bytes(200), pickle.dumps((1, None)), b"treepo poodles 2 x\n"):
        with pytest.raises(ValueError, match="no file of pools"):
            load_pools(foreign)


def test_a_checkpoint_whose_pools_cannot_be_read_is_named_with_the_way_on(tmp_path):
    config = SimpleNamespace(
        trainer=SimpleNamespace(segments=SegmentSettings(segment_length=4)),
    )
    folder = tmp_path / "global_step_4"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"pools.pkl cannot be read.*Move .*global_step_4 away"):
        read_pools(config, folder)
    (folder / POOLS_FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pools.pkl cannot be read: this is no file of pools"):
        read_pools(config, folder)
    (folder / POOLS_FILE).write_bytes(dump_pools(Pools(num_grown=7)))
    assert read_pools(config, folder).num_grown == 7
    assert read_pools(config, None).num_grown == 0
