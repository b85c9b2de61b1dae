"""A fallback that cuts inside a segment: the arena stays a tree of what was drawn."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rollout.strategies.arena import cut, heads, num_forks, place_of
from rollout.strategies.settings import TreePOSettings
from rollout.strategies.treepo import TreePO
from rollout.tree import DEPTH, TRUNCATED
from treepo.base.keys import child_key

SHORT = dict(
    n=12, segment_length=4, max_depth=5, max_response_length=20, stop_token_ids=[1],
    repetition_count=0,
)  # fmt: skip
INSIDE = ("lowest_logprob", "block_softmax", "block_softmax_inverse", "misaligned")


def treepo(**changes):
    return TreePO(TreePOSettings(**{**SHORT, **changes}))


def inside(rule):
    block = {} if rule == "lowest_logprob" else {"fallback_block_length": 3}
    return treepo(fallback_cut=rule, **block)


def responses(drive, segments, leaves):
    """(path key of its last segment, tokens) of each."""
    return {segments[i].path_key: drive.path_tokens(segments, i).tolist() for i in leaves}


def chain(drive):
    """Prompt, then 4, 4 and 2 tokens; below the first segment a second child of 3."""

    def script(context, request):
        if request.level == 2 and request.path_key == child_key(child_key(7, 0), 1):
            return [30, 31, 1]
        return [20, 21, 22, 23] if request.level < 3 else [24, 1]

    strategy = treepo(n=2, initial_divergence_min=1, initial_divergence_max=1, fallback="none")
    return drive.grow(strategy, drive.prompt(7), drive.ScriptedEngine(script)).segments


def test_a_segment_is_cut_in_pieces_that_keep_its_key_level_and_children(drive):
    segments = list(chain(drive))
    assert [(s.parent, s.level, s.num_tokens) for s in segments] == [
        (-1, 0, 3), (0, 1, 4), (1, 2, 4), (1, 2, 3), (2, 3, 2),
    ]  # fmt: skip
    segments[1] = replace(segments[1], policy_versions=np.array([5, 5, 6, 7], np.int32))
    arena, ends = cut(segments, [(1, 3), (1, 1), (1, 4), (0, 3), (3, 2)])
    assert [(s.parent, s.level, s.num_tokens) for s in arena[:7]] == [
        (-1, 0, 3), (0, 1, 1), (1, 1, 2), (2, 1, 1), (3, 2, 4), (3, 2, 2), (5, 2, 1),
    ]  # fmt: skip
    assert ends == [2, 1, 3, 0, 5]
    assert {arena[i].path_key for i in (1, 2, 3)} == {segments[1].path_key}
    assert [arena[i].token_ids.tolist() for i in (1, 2, 3)] == [[20], [21, 22], [23]]
    assert [arena[i].policy_versions.tolist() for i in (1, 2, 3)] == [[5], [5, 6], [7]]
    assert [arena[i].logprobs.tolist() for i in (1, 2, 3)] == [[-1], [-2, -3], [-4]]
    assert [arena[i].finish_reason for i in (5, 6)] == ["", "eos"]
    assert heads(arena) == {1, 2, 5} and heads(segments) == set()
    # the children of all pieces count together
    assert num_forks(arena) == num_forks(segments)


def test_cutting_nowhere_new_changes_nothing(drive):
    segments = chain(drive)
    arena, ends = cut(segments, [(2, 4), (0, 3)])
    for one, other in zip(arena, segments, strict=True):
        assert one.parent == other.parent and one.finish_reason == other.finish_reason
        assert np.array_equal(one.token_ids, other.token_ids)
    assert ends == [2, 0]


def test_random_cuts_keep_every_path(drive):
    """Against paths written out token by token."""
    rng = np.random.default_rng(0)
    for key in range(30):
        engine = drive.ScriptedEngine(drive.random_script(0.05))
        tree = drive.grow(treepo(), drive.prompt(key), engine)
        segments, leaves = tree.segments, tree.leaves
        before = responses(drive, segments, leaves)
        for _ in range(4):
            places, wanted = [], []
            for leaf in rng.choice(leaves, 3):
                tokens = drive.path_tokens(segments, leaf).tolist()
                kept = int(rng.integers(0, len(tokens) - 3))
                places.append(place_of(segments, int(leaf), kept))
                wanted.append(tokens[: 3 + kept])
            segments, ends = cut(segments, places)
            assert [drive.path_tokens(segments, i).tolist() for i in ends] == wanted
            assert all(s.parent < i and s.num_tokens for i, s in enumerate(segments))
            leaves = [i for i, s in enumerate(segments) if s.finish_reason]
            assert responses(drive, segments, leaves) == before


def check(drive, tree, engine, settings):
    """What holds for every tree, wherever it was cut."""
    segments = tree.segments
    cut_heads = heads(segments)
    named = set()  # (path key, depth) names a draw: none is used twice
    for index, segment in enumerate(segments):
        assert segment.parent < index
        context = drive.path_tokens(segments, segment.parent)
        named |= {(segment.path_key, len(context) + k) for k in range(segment.num_tokens)}
        if not index:
            continue
        parent = segments[segment.parent]
        if segment.path_key == parent.path_key:  # a later piece
            assert segment.level == parent.level
            continue
        # what the engine was shown is what the record says
        assert np.array_equal(engine.prompts[segment.path_key], context)
        assert segment.level == parent.level + (segment.parent not in cut_heads)
        assert segment.level <= settings.max_depth
    assert len(named) == sum(s.num_tokens for s in segments)
    parents = {segment.parent for segment in segments}
    assert tree.leaves == tuple(i for i in range(len(segments)) if i not in parents)
    for leaf in tree.leaves:
        path = tree.path(leaf)
        levels = [segments[i].level for i in path]
        assert levels == sorted(levels) and set(levels) == set(range(levels[-1] + 1))
        response = tree.path_token_ids(leaf, with_prompt=False)
        assert 1 <= len(response) <= settings.max_response_length
        assert not np.isin(response[:-1], settings.stop_token_ids).any()
        if segments[leaf].finish_reason == DEPTH:
            # pieces only lengthen a path: depth never ends it before its length would
            assert len(response) >= settings.max_depth * settings.segment_length
    assert tree.num_leaves == settings.n == 1 + tree.counters.branches + tree.counters.fallbacks


@pytest.mark.parametrize("rule", INSIDE)
@pytest.mark.parametrize("eos_rate", [0.6, 0.9])
def test_trees_cut_inside_segments_record_what_the_engine_saw(drive, rule, eos_rate):
    strategy = inside(rule)
    pieces = 0
    for key in range(20):
        engine = drive.ScriptedEngine(drive.early_ends(eos_rate), by_token=True)
        tree = drive.grow(strategy, drive.prompt(key), engine)
        check(drive, tree, engine, strategy.settings)
        pieces += len(heads(tree.segments))
    assert pieces >= 20, "too few cuts to test anything"


@pytest.mark.parametrize("rule", INSIDE)
def test_they_do_not_depend_on_order_grouping_or_a_pickle_between(drive, rule):
    strategy = inside(rule)
    for key in range(4):
        script = drive.early_ends(0.6)
        expected = drive.grow(strategy, drive.prompt(key), drive.ScriptedEngine(script, True))
        assert len(heads(expected.segments)) > 0
        for seed in range(4):
            tree = drive.grow_in_disorder(
                strategy,
                drive.prompt(key),
                drive.ScriptedEngine(script, True),
                np.random.default_rng(seed),
                between=lambda state: pickle.loads(pickle.dumps(state)),
            )
            assert tree.same_tokens(expected) and tree.counters == expected.counters


def test_a_path_cut_inside_a_segment_may_use_its_whole_length(drive):
    """The response 20 21 22 23 24 1 is cut before its second token, of the lowest log-prob. What
    goes on stands at level 1, so that 5 levels carry it to max_response_length.
    """

    def script(context, request):
        if len(context) - 3 in (1, 5, 9, 13, 17):  # below the cut
            return [40, 41, 42, 43]
        return [20, 21, 22, 23] if request.level == 1 else [24, 1]

    strategy = treepo(
        n=3, fallback_cut="lowest_logprob", initial_divergence_min=1, initial_divergence_max=1,
    )  # fmt: skip
    engine = drive.ScriptedEngine(script)
    inner = engine.extend

    def extend(segments, request):
        result = inner(segments, request)
        result.logprobs[:] = np.where(result.token_ids == 21, -9, -1)
        return result

    engine.extend = extend
    tree = drive.grow(strategy, drive.prompt(), engine)
    ends = Counter(tree.segments[leaf].finish_reason for leaf in tree.leaves)
    assert ends[TRUNCATED] >= 1 and ends[DEPTH] == 0
    long = [leaf for leaf in tree.leaves if tree.segments[leaf].finish_reason == TRUNCATED]
    for leaf in long:
        lengths = [tree.segments[i].num_tokens for i in tree.path(leaf)[1:]]
        assert lengths == [1, 4, 4, 4, 4, 3] and sum(lengths) == 20
        assert [tree.segments[i].level for i in tree.path(leaf)[1:]] == [1, 1, 2, 3, 4, 5]


def test_groups_by_level_are_nested_partitions_of_the_leaves(drive):
    """What the advantages are computed from: the leaves that share an ancestor at level j + 1 share
    one at level j.
    """
    from treepo.advantages import leaf_ancestors

    for rule in INSIDE:
        for key in range(10):
            engine = drive.ScriptedEngine(drive.early_ends(0.6), by_token=True)
            tree = drive.grow(inside(rule), drive.prompt(key), engine)
            ancestors = leaf_ancestors(tree)
            assert (ancestors[:, 0] == 0).all()
            for upper, lower in pairwise(ancestors.T):
                for group in set(lower[lower >= 0].tolist()):
                    assert len(set(upper[lower == group].tolist())) == 1
                    assert (upper[lower == group] >= 0).all()
