import pickle
from collections import Counter

import numpy as np
import pytest

from rollout.extend import LENGTH, ExtendResult
from rollout.strategies.base import STRATEGIES
from rollout.strategies.branching import ActivePath, even, level_budget
from rollout.strategies.settings import TreePOSettings
from rollout.tree import ANSWER, DEPTH, EOS, REPETITION, TRUNCATED
from treepo.base.keys import child_key

SHORT = dict(
    n=8, segment_length=4, max_depth=5, max_response_length=20, stop_token_ids=[1],
    repetition_count=0,
)  # fmt: skip


def treepo(**changes):
    return STRATEGIES.get("treepo")(TreePOSettings(**{**SHORT, **changes}))


def leaf_reasons(tree):
    return Counter(tree.segments[leaf].finish_reason for leaf in tree.leaves)


def check_tree(tree, drive, engine, settings):
    """What holds for every tree, however it grew."""
    for index, segment in enumerate(tree.segments):
        assert type(segment.parent) is int and segment.parent < index
        assert segment.level == len(tree.path(index)) - 1 <= settings.max_depth
        if index:
            assert segment.num_tokens <= settings.segment_length
            # what the engine was shown is what the record says
            prompt = drive.path_tokens(tree.segments, segment.parent)
            assert np.array_equal(engine.prompts[segment.path_key], prompt)
    parents = {segment.parent for segment in tree.segments}
    assert tree.leaves == tuple(i for i in range(len(tree.segments)) if i not in parents)
    for leaf in tree.leaves:
        assert tree.segments[leaf].finish_reason
        response = tree.path_token_ids(leaf, with_prompt=False)
        assert 1 <= len(response) <= settings.max_response_length
        assert not np.isin(response[:-1], settings.stop_token_ids).any()
    inner = set(range(len(tree.segments))) - set(tree.leaves)
    assert not any(tree.segments[i].finish_reason for i in inner)
    assert len({segment.path_key for segment in tree.segments}) == len(tree.segments)
    assert tree.num_leaves == 1 + tree.counters.branches + tree.counters.fallbacks


@pytest.mark.parametrize("eos_rate", [0.0, 0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("changes", [{}, dict(initial_divergence_max=8), dict(n=1, **{
    "initial_divergence_min": 1, "initial_divergence_max": 1})])  # fmt: skip
def test_every_tree_reaches_its_width_and_records_what_the_engine_saw(drive, eos_rate, changes):
    strategy = treepo(**changes)
    for key in range(25):
        engine = drive.ScriptedEngine(drive.random_script(eos_rate))
        tree = drive.grow(strategy, drive.prompt(key), engine)
        check_tree(tree, drive, engine, strategy.settings)
        assert tree.num_leaves == strategy.settings.n


@pytest.mark.parametrize("eos_rate", [0.05, 0.3])
def test_without_a_fallback_there_may_be_fewer_leaves(drive, eos_rate):
    strategy = treepo(fallback="none")
    widths = set()
    for key in range(25):
        engine = drive.ScriptedEngine(drive.random_script(eos_rate))
        tree = drive.grow(strategy, drive.prompt(key), engine)
        check_tree(tree, drive, engine, strategy.settings)
        assert tree.counters.fallbacks == 0
        widths.add(tree.num_leaves)
    assert min(widths) < 8 and max(widths) <= 8


@pytest.mark.parametrize("eos_rate", [0.03, 0.2])
def test_the_tree_does_not_depend_on_the_order_or_grouping_of_results(drive, eos_rate):
    strategy = treepo(initial_divergence_max=4)
    for key in range(5):
        script = drive.random_script(eos_rate)
        expected = drive.grow(strategy, drive.prompt(key), drive.ScriptedEngine(script))
        for seed in range(8):
            rng = np.random.default_rng(seed)
            engine = drive.ScriptedEngine(script)
            tree = drive.grow_in_disorder(strategy, drive.prompt(key), engine, rng)
            assert tree.same_tokens(expected)
            assert tree.counters == expected.counters


def test_an_unfinished_tree_goes_on_from_its_pickle_in_a_new_machine(drive):
    script = drive.random_script(0.1)
    expected = drive.grow(treepo(), drive.prompt(), drive.ScriptedEngine(script))
    rng = np.random.default_rng(0)
    engine = drive.ScriptedEngine(script)
    state, waiting = treepo().start(drive.prompt())
    while waiting:
        strategy = pickle.loads(pickle.dumps(treepo()))
        state = pickle.loads(pickle.dumps(state))
        request = state.outstanding[rng.integers(len(state.outstanding))]
        state, new = strategy.advance(state, [engine.extend(state.segments, request)])
        waiting = state.outstanding
        assert list(state.outstanding) == new or not new
    assert treepo().tree(state).same_tokens(expected)


def test_results_handed_over_one_state_twice_give_the_same_states(drive):
    strategy = treepo()
    engine = drive.ScriptedEngine(drive.random_script(0.1))
    state, requests = strategy.start(drive.prompt())
    results = [engine.extend(state.segments, request) for request in requests]
    first, asked_first = strategy.advance(state, results)
    second, asked_second = strategy.advance(state, results)
    assert asked_first == asked_second and len(first.segments) == len(second.segments)
    assert len(state.segments) == 1, "the state handed in is not changed"


def test_an_answer_nobody_asked_for_is_a_broken_invariant(drive):
    strategy = treepo()
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    state, requests = strategy.start(drive.prompt())
    result = engine.extend(state.segments, requests[0])
    state, _ = strategy.advance(state, [result])
    with pytest.raises(AssertionError, match="unasked"):
        strategy.advance(state, [result])


# --- budget ---


@pytest.mark.parametrize(
    ("active", "finished", "finished_this_step", "width", "budget"),
    [
        (2, 0, 0, 16, 4),  # plain doubling
        (1, 1, 1, 16, 4),  # the one that ended hands its two on
        (6, 4, 2, 16, 12),  # no more than the width leaves
        (6, 10, 0, 16, 6),  # full: everyone goes on alone
        (3, 12, 2, 16, 4),
    ],
)
def test_early_finishers_hand_their_budget_on(active, finished, finished_this_step, width, budget):
    assert budget == level_budget(
        active=active, finished=finished, finished_this_step=finished_this_step, width=width
    )


def test_a_tree_without_early_ends_doubles_until_it_is_full(drive):
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    tree = drive.grow(treepo(n=12), drive.prompt(), engine)
    levels = Counter(segment.level for segment in tree.segments)
    assert levels == {0: 1, 1: 2, 2: 4, 3: 8, 4: 12, 5: 12}
    forks = Counter(s.parent for s in tree.segments if s.level == 4)
    assert sorted(forks.values()) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_left_over_copies_go_to_paths_drawn_by_their_keys(drive):
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    favoured = Counter()
    for key in range(200):
        tree = drive.grow(
            treepo(n=5), drive.prompt(key), engine=drive.ScriptedEngine(engine.script)
        )
        forks = [sum(s.parent == i for s in tree.segments) for i in range(3, 7)]
        assert sorted(forks) == [1, 1, 1, 2]
        favoured[forks.index(2)] += 1
    assert all(30 <= favoured[k] <= 70 for k in range(4)), favoured


def test_the_even_split_ignores_the_order_of_the_paths(drive):
    logprobs = np.zeros(1, np.float32)
    paths = [
        ActivePath(path_key=key, level=1, logprobs=logprobs, segment_logprobs=logprobs)
        for key in (11, 7, 99, 3)
    ]
    copies = dict(zip(paths, even(paths, 11, TreePOSettings()), strict=True))
    turned = [paths[k] for k in (3, 1, 0, 2)]
    assert dict(zip(turned, even(turned, 11, TreePOSettings()), strict=True)) == copies
    assert sorted(copies.values()) == [2, 3, 3, 3]


def test_a_finisher_s_budget_reaches_the_survivor(drive):
    def script(context, request):
        first = request.path_key == child_key(7, 0)
        return [1] if request.level == 1 and first else [5, 6, 7, 8]

    tree = drive.grow(treepo(), drive.prompt(7), drive.ScriptedEngine(script))
    levels = Counter(segment.level for segment in tree.segments)
    assert levels == {0: 1, 1: 2, 2: 4, 3: 7, 4: 7, 5: 7}
    assert tree.counters.branches == 7 and tree.counters.fallbacks == 0


# --- initial divergence ---


def test_the_initial_divergence_takes_every_value_of_its_range(drive):
    strategy = treepo(initial_divergence_min=2, initial_divergence_max=8)
    counts = Counter(len(strategy.start(drive.prompt(key))[1]) for key in range(700))
    assert set(counts) == {2, 3, 4, 5, 6, 7, 8}
    assert all(60 <= count <= 140 for count in counts.values()), counts
    again = [len(strategy.start(drive.prompt(key))[1]) for key in range(10)]
    assert again == [len(strategy.start(drive.prompt(key))[1]) for key in range(10)]


# --- ends ---


def test_a_segment_of_only_eos_becomes_a_leaf(drive):
    def script(context, request):
        return [1] if request.level == 2 else [5, 6, 7, 8]

    tree = drive.grow(treepo(n=4, fallback="none"), drive.prompt(), drive.ScriptedEngine(script))
    assert leaf_reasons(tree) == {EOS: 4}
    assert [tree.segments[leaf].token_ids.tolist() for leaf in tree.leaves] == [[1]] * 4


@pytest.mark.parametrize("eos", [1, 8, 9])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_any_of_several_eos_ids_is_seen_at_any_position(drive, eos, position):
    def script(context, request):
        return [20, 21, 22, 23][:position] + [eos]

    strategy = treepo(stop_token_ids=[1, 8, 9], fallback="none")
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    assert leaf_reasons(tree) == {EOS: 2}


@pytest.mark.parametrize("position", range(4))
def test_a_stop_sequence_ends_a_path_wherever_the_segments_border_cuts_it(drive, position):
    response = [20, 21, 22, 23, 24, 25, 26, 27, 28]

    def script(context, request):
        return response[len(context) - 3 :][:4]

    stop = response[position : position + 5]  # longer than a segment
    strategy = treepo(stop_token_sequences=[stop], fallback="none")
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    assert set(leaf_reasons(tree)) == {EOS}
    for leaf in tree.leaves:
        assert tree.path_token_ids(leaf, with_prompt=False).tolist() == response[: position + 5]


def test_an_eos_that_just_fits_counts_even_if_the_engine_calls_it_length(drive):
    strategy = treepo(fallback="none")
    state, requests = strategy.start(drive.prompt())
    results = [
        ExtendResult(
            request=request,
            token_ids=np.array([5, 6, 7, 1], np.int32),
            logprobs=np.zeros(4, np.float32),
            sampling_logprobs=np.zeros(4, np.float32),
            finish_reason=LENGTH,
            policy_versions=np.zeros(4, np.int32),
        )
        for request in requests
    ]
    state, requests = strategy.advance(state, results)
    assert not requests
    assert leaf_reasons(strategy.tree(state)) == {EOS: 2}


def test_the_response_limit_counts_tokens_below_the_prompt_and_shortens_the_last_segment(drive):
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    strategy = treepo(max_response_length=18)
    tree = drive.grow(strategy, drive.prompt(token_ids=range(30, 40)), engine)
    assert leaf_reasons(tree) == {TRUNCATED: 8}
    assert all(len(tree.path_token_ids(leaf)) == 10 + 18 for leaf in tree.leaves)
    assert {tree.segments[leaf].num_tokens for leaf in tree.leaves} == {2}


def test_the_depth_limit_ends_paths_that_have_tokens_left(drive):
    def script(context, request):
        return [5, 6] if request.level == 1 else [5, 6, 7, 8]

    tree = drive.grow(treepo(n=2), drive.prompt(), drive.ScriptedEngine(script))
    assert leaf_reasons(tree) == {DEPTH: 2}
    assert {len(tree.path_token_ids(leaf, with_prompt=False)) for leaf in tree.leaves} == {18}


def test_a_repetition_across_segments_ends_the_path(drive):
    strategy = treepo(
        n=2, repetition_ngram=2, repetition_count=5, max_depth=10, max_response_length=40
    )
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(lambda c, r: [5, 6, 5, 6]))
    assert leaf_reasons(tree) == {REPETITION: 2}
    assert {len(tree.path_token_ids(leaf, with_prompt=False)) for leaf in tree.leaves} == {12}


def test_a_finished_repetition_is_an_eos(drive):
    strategy = treepo(n=2, repetition_ngram=1, repetition_count=3)
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(lambda c, r: [5, 5, 5, 1]))
    assert leaf_reasons(tree) == {EOS: 2}


def answer_over_a_boundary(context, request):
    """The answer's tokens 30, 31 stand on both sides of the first boundary."""
    return [5, 6, 7, 30] if request.level == 1 else [31, 8, 9, 10]


def test_an_answer_across_a_segment_boundary_ends_the_path(drive):
    strategy = treepo(n=4, finish="boxed_as_eos", answer_token_ids=[[77], [30, 31]])
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(answer_over_a_boundary))
    assert leaf_reasons(tree) == {ANSWER: 4}
    assert {tree.segments[leaf].level for leaf in tree.leaves} == {2}


def test_an_answer_does_not_end_the_path_where_eos_must_follow(drive):
    strategy = treepo(n=4, finish="boxed_and_eos", answer_token_ids=[[30, 31]])
    engine = drive.ScriptedEngine(answer_over_a_boundary)
    tree = drive.grow(strategy, drive.prompt(), engine)
    assert leaf_reasons(tree) == {TRUNCATED: 4}

    def with_eos(context, request):
        tokens = answer_over_a_boundary(context, request)
        return [*tokens[:2], 1] if request.level == 3 else tokens

    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(with_eos))
    assert leaf_reasons(tree) == {ANSWER: 4}
    assert {tree.segments[leaf].level for leaf in tree.leaves} == {3}


def test_an_answer_in_the_prompt_is_not_the_responses(drive):
    strategy = treepo(n=2, finish="boxed_as_eos", answer_token_ids=[[30, 31]])
    engine = drive.ScriptedEngine(drive.random_script(0.0, vocabulary=20))
    tree = drive.grow(strategy, drive.prompt(token_ids=[30, 31, 30]), engine)
    assert leaf_reasons(tree) == {TRUNCATED: 2}


def test_two_forks_that_draw_equal_tokens_stay_two_nodes(drive):
    engine = drive.ScriptedEngine(lambda context, request: [5, 6, 7, 8])
    tree = drive.grow(treepo(), drive.prompt(), engine)
    check_tree(tree, drive, engine, TreePOSettings(**SHORT))
    assert tree.num_leaves == 8
    assert Counter(s.level for s in tree.segments) == {0: 1, 1: 2, 2: 4, 3: 8, 4: 8, 5: 8}


# --- fallback ---


def test_a_fallback_cuts_at_boundaries_of_the_path_and_goes_on_twice(drive):
    strategy = treepo(n=16)
    cuts = Counter()
    for key in range(100):
        engine = drive.ScriptedEngine(drive.random_script(0.35))
        tree = drive.grow(strategy, drive.prompt(key), engine)
        check_tree(tree, drive, engine, strategy.settings)
        assert tree.num_leaves == 16
        cuts[tree.counters.restarts > 0, tree.counters.fallbacks > tree.counters.restarts] += 1
    assert cuts[True, True] > 10, "cuts at the prompt and further down both occur"


def test_each_fallback_of_a_tree_draws_anew(drive):
    # nothing is ever active and each leaf is cut once a round: 1, 3, then 9 leaves
    strategy = treepo(n=9, initial_divergence_min=1, initial_divergence_max=1)
    engine = drive.ScriptedEngine(lambda context, request: [1])
    state, requests = strategy.start(drive.prompt())
    rounds = [state.fallback_rounds]
    while requests:
        results = [engine.extend(state.segments, request) for request in requests]
        state, requests = strategy.advance(state, results)
        rounds.append(state.fallback_rounds)
    assert rounds == [0, 1, 2, 2]


def test_your_own_rules_go_in_by_path(drive, tmp_path):
    file = tmp_path / "rules.py"
    file.write_text(
        "def first_takes_all(paths, budget, settings):\n"
        "    return [budget - len(paths) + 1] + [1] * (len(paths) - 1)\n"
        "def shortest(responses, round):\n"
        "    return sorted(responses, key=lambda r: (r.num_tokens, r.path_key))\n"
        "def last_token(response, draw, settings):\n"
        "    return response.num_tokens - 1\n"
        "def two_more(tally, settings):\n"
        "    return tally.finished + 2\n"
    )
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    tree = drive.grow(treepo(branching=f"{file}:first_takes_all"), drive.prompt(), engine)
    assert [sum(s.parent == i for s in tree.segments) for i in (0, 1, 2)] == [2, 3, 1]
    rules = dict(
        fallback=f"{file}:shortest", fallback_cut=f"{file}:last_token", budget=f"{file}:two_more"
    )

    def two_lengths(context, request):
        first = request.path_key == child_key(7, 0)
        return [20, 1] if first else [21, 22, 1]

    tree = drive.grow(treepo(n=4, **rules), drive.prompt(7), drive.ScriptedEngine(two_lengths))
    # the response 20, 1 is cut before its last token
    assert [s.token_ids.tolist() for s in tree.segments[1:4]] == [[20], [1], [21, 22, 1]]
    assert [s.parent for s in tree.segments[1:]] == [0, 1, 0, 1, 1]


def test_an_odd_number_of_missing_leaves_is_filled_exactly(drive):
    strategy = treepo(n=5)
    for key in range(20):
        engine = drive.ScriptedEngine(lambda context, request: [1])
        tree = drive.grow(strategy, drive.prompt(key), engine)
        assert tree.num_leaves == 5
        assert all(segment.parent == 0 for segment in tree.segments[1:])  # depth 0 is the only cut
        assert (tree.counters.branches, tree.counters.fallbacks, tree.counters.restarts) == (
            1,
            3,
            3,
        )


def test_without_a_candidate_new_paths_leave_the_prompt(drive):
    def script(context, request):
        return [5, 5, 5, 5]

    strategy = treepo(
        n=7, initial_divergence_min=3, initial_divergence_max=3, repetition_ngram=1,
        repetition_count=4,
    )  # fmt: skip
    tree = drive.grow(strategy, drive.prompt(), drive.ScriptedEngine(script))
    assert leaf_reasons(tree) == {REPETITION: 7}
    assert all(segment.parent == 0 for segment in tree.segments[1:])
    assert (tree.counters.fallbacks, tree.counters.restarts) == (4, 4)


def test_only_leaves_with_an_answer_or_eos_are_cut(drive):
    """The path through token 5 ends by repetition, the one through token 20 by EOS."""

    def script(context, request):
        if request.level == 1:
            first = request.path_key == child_key(7, 0)
            return [5, 6, 7, 8] if first else [2, 3, 4, 20]
        return [9, 9, 9, 9] if 5 in context else [21, 1]

    strategy = treepo(n=9, repetition_ngram=1, repetition_count=4)
    for key in range(20):
        tree = drive.grow(strategy, drive.prompt(key, (7, 8)), drive.ScriptedEngine(script))
        assert tree.num_leaves == 9
    tree = drive.grow(strategy, drive.prompt(7), drive.ScriptedEngine(script))
    assert leaf_reasons(tree) == {REPETITION: 2, EOS: 7}
    assert sum(s.parent == 1 for s in tree.segments) == 2, "nothing was cut below the repetition"


def test_the_fallback_runs_with_the_papers_settings(drive):
    strategy = STRATEGIES.get("treepo")(TreePOSettings(stop_token_ids=[1]))
    engine = drive.ScriptedEngine(drive.random_script(0.001, vocabulary=20000))
    fallbacks = 0
    for key in range(3):
        tree = drive.grow(strategy, drive.prompt(key), engine)
        check_tree(tree, drive, engine, strategy.settings)
        assert tree.num_leaves == 16
        fallbacks += tree.counters.fallbacks
    assert fallbacks > 0


def test_one_prompt_never_waits_for_another(drive):
    strategy = treepo()
    engine = drive.ScriptedEngine(drive.random_script(0.0))
    slow, _ = strategy.start(drive.prompt(1))
    tree = drive.grow(strategy, drive.prompt(2), engine)
    assert tree.num_leaves == 8
    assert strategy.tree(slow) is None


@pytest.mark.parametrize("cut", ["segment", "lowest_logprob", "misaligned"])
def test_what_is_finished_on_the_way_stays_a_leaf_of_the_whole_tree(drive, cut):
    strategy = treepo(fallback_cut=cut)
    parts_seen = fallbacks = 0
    for key in range(12):
        engine = drive.ScriptedEngine(drive.early_ends(0.4), by_token=True)
        state, requests = strategy.start(drive.prompt(key))
        parts = [strategy.finished_part(state)]
        while requests:
            results = [engine.extend(state.segments, request) for request in requests]
            state, requests = strategy.advance(state, results)
            parts.append(strategy.finished_part(state))
        whole = strategy.tree(state)
        assert parts[-1].same_tokens(whole)
        in_whole = {whole.segments[leaf].path_key: leaf for leaf in whole.leaves}
        assert len(in_whole) == whole.num_leaves, "a path key is no name of a leaf"
        for part in parts:
            used = {index for leaf in part.leaves for index in part.path(leaf)}
            assert used | {0} == set(range(len(part.segments))), "a segment that no leaf uses"
            for leaf in part.leaves:
                other = in_whole[part.segments[leaf].path_key]
                reasons = part.segments[leaf].finish_reason, whole.segments[other].finish_reason
                assert reasons[0] == reasons[1] != ""
                assert np.array_equal(part.path_token_ids(leaf), whole.path_token_ids(other))
            parts_seen += 0 < part.num_leaves < whole.num_leaves
        fallbacks += whole.counters.fallbacks
    assert parts_seen and fallbacks, "the case did not arise"
