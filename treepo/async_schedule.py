"""The fully asynchronous pipeline as a state machine: who may begin what, and when.

Rollout workers grow trees slice by slice, each at its own pace and under the newest weights that it
holds; the learner updates whenever a batch is there. Nobody waits for anybody but where the cap on
staleness says so (AReaL, arXiv 2505.24298; UloRL's segments are the slices).

The cap as deadlines. A group begun under version o must be trained on by the update that starts
from version o + ``max_staleness`` at the latest: that is its deadline d. The update from version v
takes ``batch_size`` = B groups, so all deadlines can be met from version v on exactly if for every
d the number of groups with a deadline <= d is at most (d - v + 1) B (:func:`room`). With one
version in force everywhere that is AReaL's rule, begun <= (v + max_staleness + 1) B. A prompt is
begun only if it holds afterwards, and under 'finish' a batch is taken only if it holds for the
groups that stay: otherwise the learner waits for older groups, which are being finished meanwhile.
Under 'drop' the learner does not wait, and what has missed its deadline is given up and begun anew.

Frozen states and pure functions: an event (a slice ended, verdicts came, an update ended, weights
were published or loaded) makes a new state, and ``load``, ``slices`` and ``batch`` say what is to
be done now. ``treepo/asynchronous.py`` has it done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rewards.records import RewardResult
from rollout.growth import Growth
from rollout.length_statistics import LengthStatistics
from rollout.strategies.base import Prompt
from rollout.tree import Tree
from treepo.algorithm_settings import AdvantageSettings
from treepo.data import Problem
from treepo.data_order import DataPosition, ProblemOrder
from treepo.pools import (
    Group,
    Pools,
    Unfinished,
    begin_trees,
    finished_group,
    hands_on,
    leaf_keys,
    put_aside,
)
from treepo.submission import of_what_is_over

# Prompts of new problems; told the step, from 1, and the epoch, which name their draws.
MakePrompts = Callable[[Sequence[Problem], int, int], Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """
    Attributes:
        batch_size: groups an update (``trainer.train_batch_size``).
        max_staleness: updates between the begin of a prompt and its training; >= 1.
        on_stale: 'finish' or 'drop', see the module.
        num_in_flight: most trees that grow at a time, over all workers.
        total_steps: of the run; no prompt is begun that none of them can train on.
        max_response_length: tokens.
    """

    batch_size: int
    max_staleness: int
    on_stale: str
    num_in_flight: int
    total_steps: int
    max_response_length: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Worker:
    """A rollout worker.

    Attributes:
        version: of the weights in force there.
        growing: the trees of its slice, as they were when it began; empty: none runs.
        is_loading: newer weights.
    """

    version: int
    growing: tuple[Unfinished, ...] = ()
    is_loading: bool = False

    @property
    def is_free(self) -> bool:
        return not self.growing and not self.is_loading


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """Where a run stands.

    Attributes:
        step: steps done.
        version: updates done: the version of the learner's weights.
        published: the newest version that workers can load.
        unfinished: trees that no worker grows now, oldest first.
        homes: which worker grew an unfinished tree last, by problem: it may have kept its keys and
            values.
        unjudged: finished trees without verdicts.
        experience: judged groups that no update took yet.
        training: the batch of the update that runs; None: none does.
        num_begun, num_finished, num_dropped: prompts, since the run or this life of it began.
    """

    rules: Rules
    order: ProblemOrder
    position: DataPosition
    workers: tuple[Worker, ...]
    step: int
    version: int
    published: int
    unfinished: tuple[Unfinished, ...] = ()
    homes: Mapping[str, int] = field(default_factory=dict)
    unjudged: tuple[tuple[Unfinished, Tree], ...] = ()
    experience: tuple[Group, ...] = ()
    training: tuple[Group, ...] | None = None
    lengths: LengthStatistics = LengthStatistics(capacity=16384)
    num_begun: int = 0
    num_finished: int = 0
    num_dropped: int = 0

    @property
    def growing(self) -> list[Unfinished]:
        """Trees in running slices."""
        return [entry for worker in self.workers for entry in worker.growing]

    @property
    def outstanding(self) -> list[Unfinished | Group]:
        """All that was begun and that no update took yet."""
        judging = [entry for entry, _ in self.unjudged]
        return [*self.unfinished, *self.growing, *judging, *self.experience]

    @property
    def next_version(self) -> int:
        """From which the next update to begin starts."""
        return self.version + (self.training is not None)

    @property
    def is_quiet(self) -> bool:
        """No slice, load or update runs, and no worker has older weights than the learner."""
        return self.training is None and all(
            worker.is_free and worker.version == self.version for worker in self.workers
        )

    def pools(self) -> Pools:
        """For a checkpoint: trees in running slices as they were before. No update may run."""
        assert self.training is None and not self.unjudged
        return Pools(
            unfinished=tuple(sorted([*self.growing, *self.unfinished], key=_age)),
            experience=self.experience,
            lengths=self.lengths,
        )


def begin(
    rules: Rules,
    order: ProblemOrder,
    *,
    position: DataPosition,
    pools: Pools,
    num_workers: int,
    step: int,
    version: int,
) -> Schedule:
    """A run, or a later life of one: all workers hold ``version``."""
    return Schedule(
        rules=rules,
        order=order,
        position=position,
        workers=(Worker(version=version),) * num_workers,
        step=step,
        version=version,
        published=version,
        unfinished=pools.unfinished,
        experience=pools.experience,
        lengths=pools.lengths,
    )


# Deadlines.


def room(deadlines: Sequence[int], deadline: int, version: int, size: int) -> int:
    """How many more groups with ``deadline`` could meet it, and all others theirs: the least of
    (d - version + 1) * size - |deadlines <= d| over d >= ``deadline``. Negative: not even these.
    """
    return min(
        (d - version + 1) * size - sum(other <= d for other in deadlines)
        for d in {deadline, *(other for other in deadlines if other > deadline)}
    )


def can_all_be_met(deadlines: Sequence[int], version: int, size: int) -> bool:
    """Whether updates of ``size`` groups from ``version`` on can meet all deadlines."""
    return not deadlines or room(deadlines, min(deadlines), version, size) >= 0


def _deadlines(state: Schedule, entries: Sequence[Unfinished | Group]) -> list[int]:
    return [entry.oldest_version + state.rules.max_staleness for entry in entries]


def _age(entry: Unfinished | Group) -> tuple[int, int]:
    return entry.oldest_version, entry.begun


def num_admitted(state: Schedule, version: int, wanted: int) -> int:
    """How many prompts may be begun under ``version`` now, at most ``wanted``."""
    rules, outstanding, upcoming = state.rules, state.outstanding, state.next_version
    alive = [d for d in _deadlines(state, outstanding) if d >= upcoming]
    in_time = room(alive, version + rules.max_staleness, upcoming, rules.batch_size)
    steps_left = rules.total_steps - state.step - (state.training is not None)
    used = steps_left * rules.batch_size - len(outstanding)
    free = len(state.order.problems) - len(outstanding)
    return max(0, min(wanted, in_time, used, free))


# What is to be done now.


def load(state: Schedule) -> tuple[Schedule, list[int]]:
    """Free workers that are to load the published weights."""
    ranks = [
        rank
        for rank, worker in enumerate(state.workers)
        if worker.is_free and worker.version < state.published
    ]
    for rank in ranks:
        state = _with_worker(state, rank, replace(state.workers[rank], is_loading=True))
    return state, ranks


def slices(
    state: Schedule, make_prompts: MakePrompts
) -> tuple[Schedule, list[tuple[int, tuple[Unfinished, ...]]]]:
    """(worker, trees) of the slices that are to begin. Free workers divide the unfinished trees
    evenly, each its own first, then the oldest; then as many new prompts as may be begun.
    """
    begun = []
    free = [rank for rank, worker in enumerate(state.workers) if worker.is_free]
    share = -(-state.rules.num_in_flight // len(state.workers))
    for number, rank in enumerate(free):
        worker = state.workers[rank]
        quota = min(share, -(-len(state.unfinished) // (len(free) - number)))
        own_first = sorted(
            state.unfinished,
            key=lambda entry: (state.homes.get(entry.problem.id, rank) != rank, _age(entry)),
        )
        old, left = own_first[:quota], sorted(own_first[quota:], key=_age)
        in_flight = len(state.unfinished) + len(state.growing)
        wanted = min(share - len(old), state.rules.num_in_flight - in_flight)
        new: list[Unfinished] = []
        if admitted := num_admitted(state, worker.version, wanted):
            state, new = _new_prompts(state, worker.version, admitted, make_prompts)
        if entries := (*old, *new):
            state = replace(state, unfinished=tuple(left))
            state = _with_worker(state, rank, replace(worker, growing=entries))
            begun.append((rank, entries))
    return state, begun


def _new_prompts(
    state: Schedule, version: int, number: int, make_prompts: MakePrompts
) -> tuple[Schedule, list[Unfinished]]:
    held = list({entry.problem.id: entry.problem for entry in state.outstanding}.values())
    problems, position = state.order.next_batch(state.position, number, besides=held)
    step = state.step + 1
    entries = begin_trees(problems, make_prompts(problems, step, position.epoch), step, version)
    return replace(state, position=position, num_begun=state.num_begun + number), entries


def batch(state: Schedule) -> tuple[Schedule, tuple[Group, ...] | None]:
    """What the learner is to update on now: the oldest of the experience pool; None: nothing."""
    rules = state.rules
    if state.training is not None or len(state.experience) < rules.batch_size:
        return state, None
    if state.unjudged or state.step == rules.total_steps:
        return state, None
    oldest_first = sorted(state.experience, key=_age)
    taken = tuple(oldest_first[: rules.batch_size])
    state_after = replace(state, experience=tuple(oldest_first[rules.batch_size :]), training=taken)
    if rules.on_stale == "drop":
        return _without_late(state_after), taken
    left = _deadlines(state, state_after.outstanding)
    if not can_all_be_met(left, state.version + 1, rules.batch_size):
        return state, None
    return state_after, taken


def _without_late(state: Schedule) -> Schedule:
    """Without what has missed its deadline; of running slices it is seen when they end."""
    waiting: list[Unfinished | Group] = [*state.unfinished, *state.experience]
    late = [entry for entry in waiting if is_late(state, entry)]
    return replace(
        state,
        unfinished=tuple(e for e in state.unfinished if not is_late(state, e)),
        experience=tuple(e for e in state.experience if not is_late(state, e)),
        position=state.order.give_back(state.position, [entry.problem for entry in late]),
        lengths=_seen(state, [e.work for e in late if isinstance(e, Unfinished)]),
        num_dropped=state.num_dropped + len(late),
    )


def _seen(state: Schedule, over: Sequence[Tree | Prompt | Growth]) -> LengthStatistics:
    """Lengths of responses with those of trees that are over now."""
    return state.lengths.add(of_what_is_over(over, state.rules.max_response_length))


def is_late(state: Schedule, entry: Unfinished | Group) -> bool:
    """Whether no update to come may train on it."""
    return entry.oldest_version + state.rules.max_staleness < state.next_version


# Events.


def slice_ended(state: Schedule, rank: int, results: Sequence[Tree | Growth]) -> Schedule:
    """A worker's slice ended with ``results``, in the order of its trees."""
    entries = state.workers[rank].growing
    pairs = list(zip(entries, results, strict=True))
    late = [entry for entry in entries if is_late(state, entry)]
    assert not late or state.rules.on_stale == "drop", "an update began too early"
    alive = [(entry, result) for entry, result in pairs if not is_late(state, entry)]
    finished = tuple((entry, tree) for entry, tree in alive if isinstance(tree, Tree))
    unfinished = [
        put_aside(e, result, {}, None) for e, result in alive if isinstance(result, Growth)
    ]
    over = [result for e, result in pairs if isinstance(result, Tree) or is_late(state, e)]
    state = _with_worker(state, rank, replace(state.workers[rank], growing=()))
    ended = {entry.problem.id for entry in entries}
    homes = {name: home for name, home in state.homes.items() if name not in ended}
    return replace(
        state,
        homes=homes | {entry.problem.id: rank for entry in unfinished},
        unfinished=tuple(sorted([*state.unfinished, *unfinished], key=_age)),
        unjudged=(*state.unjudged, *finished),
        position=state.order.give_back(state.position, [entry.problem for entry in late]),
        lengths=_seen(state, over),
        num_finished=state.num_finished + len(finished),
        num_dropped=state.num_dropped + len(late),
    )


def judged(
    state: Schedule, verdicts: Sequence[Sequence[RewardResult]], algorithm: AdvantageSettings
) -> tuple[Schedule, list[Group], list[Group]]:
    """Verdicts on ``unjudged`` came, by tree and leaf. Groups with a signal go to the experience
    pool; a group without is filtered, which consumes its prompt.

    Returns:
        the state, all groups, and of these the filtered ones.
    """
    groups = []
    for (entry, tree), of_tree_ in zip(state.unjudged, verdicts, strict=True):
        named = dict(zip(leaf_keys(tree), of_tree_, strict=True))
        group = finished_group(entry, tree, named, is_whole=True)
        assert group is not None, "a finished tree has leaves"
        groups.append(group)
    handed = [group for group in groups if hands_on(group, 1, algorithm)]
    filtered = [group for group in groups if group not in handed]
    return replace(state, unjudged=(), experience=(*state.experience, *handed)), groups, filtered


def update_ended(state: Schedule, *, is_skipped: bool) -> Schedule:
    """The update ended; a skipped one has left the weights as they were."""
    assert state.training is not None
    return replace(
        state, training=None, step=state.step + 1, version=state.version + (not is_skipped)
    )


def step_skipped(state: Schedule) -> Schedule:
    """The step ends without an update: too many prompts in a row had no signal. All that waits goes
    on in the next.
    """
    assert state.training is None
    return replace(state, step=state.step + 1)


def weights_published(state: Schedule, version: int) -> Schedule:
    """Workers can load ``version``. One that comes after a newer one changes nothing: a tree that
    went on under older weights than those it began under would be older than it says.
    """
    return replace(state, published=max(state.published, version))


def weights_loaded(state: Schedule, rank: int, version: int) -> Schedule:
    """The worker's new weights are proved."""
    return _with_worker(state, rank, Worker(version=version))


def _with_worker(state: Schedule, rank: int, worker: Worker) -> Schedule:
    workers = (*state.workers[:rank], worker, *state.workers[rank + 1 :])
    return replace(state, workers=workers)
